"""The offline door: images not in use are merged by the same engine, and every other image is left as it was."""

import contextlib
import hashlib
import itertools
import json
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rig.command import invoke
from rig.devices import loop
from rig.disks import BACKEND, blockdev, device, drive, nbd_server, nodes, remove, storage_daemon
from rig.folder import beside
from rig.headers import raw_header
from rig.machines import MIB, SIZE, Content, create_encrypted, fill, have, machine, make_chain, run
from rig.wire import heard

import qmpmerge
from qmpmerge.chain.outcome import Outcome
from qmpmerge.errors import (
    CannotCompare,
    Failed,
    FileExists,
    ForeignName,
    ImageUnreadable,
    InUse,
    JobFailed,
    NeedsSecret,
    NoSuchDisk,
    NotVerified,
    OptionsConflict,
    QemuRefused,
    Refused,
    SharedBase,
    Unknown,
    WouldLose,
)
from qmpmerge.images import qcow2, qemuimg
from qmpmerge.processes import holders
from qmpmerge.qemu import storagedaemon

NAMES = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")
RANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all": ({}, ["base.raw"]),
    "shallow": ({"shallow": True}, ["base.raw", "a.qcow2", "b.qcow2"]),
    "upper": ({"base": "[2]"}, ["base.raw", "a.qcow2"]),
    "below-active": ({"top": "[3]"}, ["base.raw", "c.qcow2"]),
    "lowest": ({"top": "[2]"}, ["base.raw", "b.qcow2", "c.qcow2"]),
    "middle": ({"base": "[2]", "top": "[3]"}, ["base.raw", "a.qcow2", "c.qcow2"]),
    "shallow-middle": ({"top": "[3]", "shallow": True}, ["base.raw", "a.qcow2", "c.qcow2"]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the images are, and nothing else."""
    (tmp_path / "vm").mkdir()
    return tmp_path / "vm"


@pytest.fixture
def images(folder: Path) -> list[Path]:
    return make_chain(folder)


async def merged(image: Path | str, *, allow: Sequence[str] = (), secret: str | None = None, **rest: Any) -> Outcome:
    """The merged files keep their names: what becomes of them is test_disposal's matter."""
    async with qmpmerge.offline(image, allow=allow, secret=secret) as target:
        return await qmpmerge.commit(target, merged_files="keep", **rest)


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """All that a write would change: content, and the time of the last one."""
    return {
        str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if stat.S_ISREG(file.lstat().st_mode)
    }


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """No file is written, made or removed in the block."""
    before = state(folder)
    yield
    assert state(folder) == before


def header(image: Path | str) -> tuple[str | None, str | None]:
    """Backing name and format as written."""
    found = qcow2.read(str(image))
    assert found is not None
    return found.backing, found.backing_format


def basenames(outcome: Outcome) -> list[str]:
    return [os.path.basename(file) for file in outcome.after.files]


# --- every range ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["relative", "absolute"])
@pytest.mark.parametrize("name", RANGES)
async def test_every_range(name: str, link: str, folder: Path, images: list[Path], content: Content) -> None:
    if link == "absolute":
        for below, image in itertools.pairwise(images):
            run("qemu-img", "rebase", "-u", "-F", below.suffix[1:], "-b", below, image)
    options, expected = RANGES[name]
    outcome = await merged(images[3], **options)
    assert basenames(outcome) == expected
    assert outcome.verdict == ("merged" if expected[-1] == "c.qcow2" else "pivoted")
    assert outcome.verified
    assert beside(folder) == sorted(NAMES)
    if outcome.verdict == "merged":
        kept = outcome.after.files
        place = next(place for place, name in enumerate(NAMES) if str(folder / name) != kept[place])
        below_it = kept[place - 1]
        wanted = below_it if link == "absolute" else os.path.basename(below_it)
        assert header(kept[place]) == (wanted, Path(below_it).suffix[1:])
    content.check(outcome.after.active.file)
    if outcome.verdict == "pivoted":
        content.check(images[3])  # what is left of it shows the same, for now


@pytest.mark.parametrize("name", ["all", "shallow", "below-active", "lowest", "middle"])
async def test_the_result_is_that_of_a_live_merge(
    name: str, folder: Path, images: list[Path], content: Content, tmp_path: Path
) -> None:
    """The same images, once under a paused QEMU: the same chain, headers and data."""
    options, _expected = RANGES[name]
    other = tmp_path / "live" / "vm"
    shutil.copytree(folder, other)
    copies = [other / image.name for image in images]
    with drive(tmp_path / "live", copies, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            live = await qmpmerge.commit(target, **options)
        setup.check()
        setup.machine.stop()
    outcome = await merged(images[3], **options)
    assert basenames(outcome) == basenames(live)
    assert [image.backing for image in outcome.after] == [image.backing for image in live.after]
    assert [image.backing_format for image in outcome.after] == [image.backing_format for image in live.after]
    assert [image.virtual_size for image in outcome.after] == [image.virtual_size for image in live.after]
    for mine, theirs in zip(outcome.after.files, live.after.files, strict=True):
        run("qemu-img", "compare", "-f", Path(mine).suffix[1:], "-F", Path(mine).suffix[1:], mine, theirs)
    content.check(live.after.active.file)
    content.check(outcome.after.active.file)


async def test_step_by_step_down_to_the_base(images: list[Path], content: Content) -> None:
    for options, expected in (
        ({"base": "[2]", "top": "[3]"}, ["base.raw", "a.qcow2", "c.qcow2"]),
        ({"top": "[2]"}, ["base.raw", "c.qcow2"]),
        ({}, ["base.raw"]),
    ):
        outcome = await merged(images[3], **options)
        assert basenames(outcome) == expected
        content.check(outcome.after.active.file)
        remove(outcome)
    again = await merged(images[0])
    assert (again.verdict, basenames(again)) == ("unchanged", ["base.raw"])


@pytest.mark.parametrize("base", ["base.raw", "base.qcow2"])
async def test_a_larger_top_grows_the_base(base: str, folder: Path) -> None:
    images = make_chain(folder, (base, *NAMES[1:]))
    content = Content(2 * SIZE)
    for image in images[1:]:
        run("qemu-img", "resize", "-q", image, str(2 * SIZE))
    fill(images, content)
    for number, top in enumerate(("[3]", None)):
        run("qemu-io", "-c", content.put(0x70 + number, SIZE + number * MIB, MIB), images[3])
        outcome = await merged(images[3], top=top, verify=True)
        assert outcome.after.base.virtual_size == 2 * SIZE
        content.check(outcome.after.active.file)
        remove(outcome)


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=2M",
        "cluster_size=512",
        "compat=0.10",
        "extended_l2=on,cluster_size=128k",
        "refcount_bits=1",
        "compression_type=zstd",
    ],
)
@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_kinds_of_qcow2(options: str, top: str, folder: Path) -> None:
    content = Content()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "base.qcow2", str(SIZE), cwd=folder)
    images = [folder / name for name in ("base.qcow2", *NAMES[1:])]
    for below, image in itertools.pairwise(images):
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            "-b",
            below.name,
            "-F",
            "qcow2",
            image.name,
            cwd=folder,
        )
    fill(images, content)
    outcome = await merged(images[3], top=top, verify=True)
    content.check(outcome.after.active.file)
    if options.startswith("compat=0.10"):
        told = run("qemu-img", "info", outcome.after.active.file)
        assert "compat: 0.10" in told


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_file_that_does_not_end_at_a_sector(top: str, folder: Path) -> None:
    """QEMU 7.2 and 10.0 wait for ever for a read across the end of such a file through io_uring."""
    base, data = folder / "base.raw", os.urandom(1_000_000)
    base.write_bytes(data)
    names = [(base, "raw"), (folder / "a.qcow2", "qcow2"), (folder / "b.qcow2", "qcow2")]
    for (below, form), (image, _own) in itertools.pairwise(names):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below.name, "-F", form, image, cwd=folder)
    run("qemu-io", "-c", "write -P 7 999424 512", names[1][0])
    outcome = await merged(names[2][0], top=top.replace("3", "2").replace("4", "3"), verify=True)
    expected = data[:999424] + bytes([7]) * 512 + data[999936:]
    assert base.read_bytes()[: len(data)] == expected
    assert outcome.verified


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_compressed_clusters(top: str, folder: Path) -> None:
    content = Content()
    images = make_chain(folder, ("base.qcow2", *NAMES[1:]))
    for number, image in enumerate(images):
        for command_line in (content.put(0x30 + number, number * MIB, MIB), content.put(0x40 + number, 6 * MIB, 65536)):
            run("qemu-io", "-c", command_line.replace("write", "write -c"), image)
    outcome = await merged(images[3], top=top, verify=True)
    content.check(outcome.after.active.file)


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_data_files(top: str, folder: Path) -> None:
    """In the base, in a merged image and in the active one."""
    content = Content()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={folder}/base.data", "base.qcow2", str(SIZE),
        cwd=folder)  # fmt: skip
    images = [folder / name for name in ("base.qcow2", *NAMES[1:])]
    for below, image in itertools.pairwise(images):
        own = ["-o", f"data_file={folder}/{image.stem}.data"] if image.stem != "b" else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *own, "-b", below.name, "-F", "qcow2", image.name, str(SIZE),
            cwd=folder)  # fmt: skip
    fill(images, content)
    outcome = await merged(images[3], top=top)
    content.check(outcome.after.active.file)


async def test_a_data_file_with_a_relative_name(folder: Path) -> None:
    """What is checked must be what is opened: here another file of the name lies where we stand."""
    content = Content()
    images = make_chain(folder, ("base.raw", "a.qcow2"))
    options = ("-b", "base.raw", "-F", "raw", "-o", "data_file=a.data")
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, "a.qcow2", str(SIZE), cwd=folder)
    run("qemu-io", "-c", content.put(0x33, MIB, MIB), "a.qcow2", cwd=folder)
    here = folder.parent / "here"
    here.mkdir()
    (here / "a.data").write_bytes(bytes(SIZE))
    done = invoke("commit", str(images[1]), cwd=here)
    assert (done.code, done.err) == (0, done.err)
    content.check(images[0])


# --- encryption ----------------------------------------------------------------------------------------------------------

SECRET = 'p\u00e4ss, "word" 100%'
GIVEN = ["--object", f"secret,id=s,data={SECRET.replace(',', ',,')}"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw LUKS image and two encrypted overlays on it."""
    folder = tmp_path_factory.mktemp("encrypted")
    cheap = "key-secret=s,iter-time=10,hash-alg=sha512"
    inner = f"encrypt.format=luks,encrypt.{cheap.replace(',', ',encrypt.')}"
    make_encrypted(folder, "-f", "luks", "-o", cheap, "base.luks")
    for below, form, name in (("base.luks", "luks", "a.qcow2"), ("a.qcow2", "qcow2", "b.qcow2")):
        make_encrypted(folder, "-u", "-f", "qcow2", "-o", inner, "-b", below, "-F", form, name)
    return folder


def make_encrypted(folder: Path, *arguments: str) -> None:
    create_encrypted(*GIVEN, *arguments, str(SIZE), cwd=folder)


@pytest.fixture
def encrypted(template: Path, folder: Path) -> list[Path]:
    """A chain of three; its passphrase is in the file ``secret`` beside its folder."""
    (folder.parent / "secret").write_text(SECRET + "\n")
    shutil.copytree(template, folder, dirs_exist_ok=True)
    return [folder / name for name in ("base.luks", "a.qcow2", "b.qcow2")]


def decrypted(image: Path) -> bytes:
    """What an encrypted image shows."""
    target = image.parent / "view"
    spec = f"driver={'luks' if image.suffix == '.luks' else 'qcow2'},file.driver=file,file.filename={image}"
    below = f",backing.driver=luks,backing.key-secret=s,backing.file.filename={image.parent}/base.luks"
    keys = ",key-secret=s" if image.suffix == ".luks" else f",encrypt.key-secret=s{below}"
    run("qemu-img", "convert", *GIVEN, "--image-opts", spec + keys, "-O", "raw", target)
    data = target.read_bytes()
    os.unlink(target)
    return data


def write_encrypted(image: Path, command_line: str) -> None:
    spec = (
        f"driver=qcow2,file.driver=file,file.filename={image},encrypt.key-secret=s,backing.encrypt.key-secret=s,"
        f"backing.driver=qcow2,backing.file.filename={image.parent}/a.qcow2,"
        f"backing.backing.driver=luks,backing.backing.key-secret=s,backing.backing.file.filename={image.parent}/base.luks"
    )
    told = run("qemu-io", *GIVEN, "--image-opts", spec, "-c", command_line)
    assert "wrote" in told, told


@pytest.mark.parametrize(
    ("verdict", "options"),
    [("merged", ["commit", "--top", "[2]"]), ("pivoted", ["commit"]), ("pulled", ["pull", "--base", "[1]"])],
)
def test_encrypted_images(verdict: str, options: list[str], encrypted: list[Path]) -> None:
    content = bytearray(decrypted(encrypted[0]))  # what was never written is noise
    content[MIB : 3 * MIB] = b"\x5a" * (2 * MIB)
    write_encrypted(encrypted[2], f"write -P 0x5a {MIB} {2 * MIB}")
    secret = ["--secret", str(encrypted[0].parent.parent / "secret")]
    done = invoke(options[0], str(encrypted[2]), *options[1:], *secret, "--json")
    assert (done.code, done.document["verdict"]) == (0, verdict)
    shown = encrypted[0] if verdict == "pivoted" else encrypted[2]
    assert decrypted(shown) == content
    assert b"\x5a" * 512 not in encrypted[0].read_bytes()


async def test_a_pull_into_an_encrypted_image_of_a_vm(tmp_path: Path, encrypted: list[Path]) -> None:
    """QEMU has its key, which it is not given again to close it for writing; others may be built on it."""
    other = encrypted[0].parent / "other.qcow2"
    run("qemu-img", "create", "-uqf", "qcow2", "-b", "a.qcow2", "-F", "qcow2", other, str(SIZE))
    keys = {"luks,node": "key-secret=s", "qcow2,nod": "encrypt.format=luks,encrypt.key-secret=s"}
    arguments = [f"{part},{keys[part[:9]]}" if part[:9] in keys else part for part in nodes(encrypted)]
    with machine(tmp_path, *GIVEN, *arguments, *device("b")) as vm:
        vm.io(BACKEND, f"write -P 90 {MIB} {MIB}")
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.pull(target, top="[2]")
        assert not [hint for hint in outcome.hints if "stays open for writing" in hint]
        vm.io(BACKEND, f"read -P 90 {MIB} {MIB}")
    assert str(outcome.after) == "a.qcow2 <-- b.qcow2"


async def test_what_is_encrypted_is_not_written_in_clear(encrypted: list[Path], folder: Path) -> None:
    """Unless it is wanted; and it cannot be compared, which is known before hours of copying."""
    write_encrypted(encrypted[2], Content().put(0x5A, MIB, MIB))
    plain = folder / "c.qcow2"
    run("qemu-img", "create", "-qu", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", plain, str(SIZE))
    async with qmpmerge.offline(plain, secret=SECRET) as target:
        with pytest.raises(WouldLose) as refused:
            await qmpmerge.pull(target, base="2")
        assert refused.value.lost == [f"the encryption of {encrypted[2]}: {plain}, which gets its data, has none"]
        for asked in ({"verify": True}, {"merged_files": "delete"}):
            with pytest.raises(CannotCompare) as not_compared:
                await qmpmerge.pull(target, base="2", force=["would-lose"], dry_run=True, **asked)
            assert str(encrypted[2]) in not_compared.value.images
        assert (await qmpmerge.commit(target, top="3", base="2", dry_run=True)).verdict == "planned"
        assert b"\x5a" * 512 not in plain.read_bytes()
        planned = await qmpmerge.pull(target, base="2", force=["would-lose"], dry_run=True)
        assert {check.name for check in planned.checks if check.result == "forced"} == {"would-lose"}
        assert (await qmpmerge.pull(target, base="2", force=["would-lose"])).verdict == "pulled"
    assert b"\x5a" * 512 in plain.read_bytes()


async def test_a_missing_secret(encrypted: list[Path], folder: Path) -> None:
    with unchanged(folder):
        for write in (True, False):
            with pytest.raises(NeedsSecret) as refused:
                async with qmpmerge.offline(encrypted[2], write=write):
                    pass
            assert refused.value.image == str(encrypted[0])
        done = invoke("commit", str(encrypted[2]))
        assert (done.code, "give its passphrase with `--secret FILE`" in done.err) == (3, True)


async def test_a_wrong_secret(encrypted: list[Path], folder: Path) -> None:
    with unchanged(folder), pytest.raises(Refused) as refused:
        await merged(encrypted[2], secret="wrong")
    assert not isinstance(refused.value, InUse)
    assert "Invalid password" in str(refused.value)


def test_a_secret_that_cannot_be_read(encrypted: list[Path], folder: Path) -> None:
    (folder.parent / "binary").write_bytes(b"\xff\xfe")
    with unchanged(folder):
        for file in ("none", "binary", "vm"):
            done = invoke("commit", str(encrypted[2]), "--secret", str(folder.parent / file), "--json")
            assert (done.code, done.document["error"]["name"]) == (3, "secret-unreadable")


def test_the_conversation_does_not_show_the_secret(encrypted: list[Path], folder: Path) -> None:
    (folder.parent / "plain").write_text("correct-horse")
    done = invoke("chain", str(encrypted[2]), "--secret", str(folder.parent / "plain"), "-v")
    assert "object-add" in done.err
    assert "correct-horse" not in done.err


# --- names ---------------------------------------------------------------------------------------------------------------

ODD = {
    "spaces": " a  b ",
    "commas": "a,b,,c=d",
    "colon": "nbd:a:b",
    "percent": "100%s%%",
    "dash": "-rf",
    "newline": "a\nb",
    "quotes": "a'b\"c`d$e",
    "backslash": "a\\b\\",
    "json": 'json:{"driver":"null-co"}',
    "unicode": "\u00e4\u4e2d\U0001f600",
    "tilde": "~",
    "hash": "#block123",
    "index": "[1]",
    "escape": "\x1b[31m",
    "node": "layer1",
    "glob": "*?[a-z]",
}


def odd_chain(folder: Path, stem: str) -> list[Path]:
    """A chain of three whose every name is odd; relative names that look like a protocol begin with ``./``."""
    below: Path | None = None
    images = [folder / f"{stem}{ending}" for ending in ("0.raw", "1.qcow2", "2.qcow2", "3.qcow2")]
    for image in images:
        backing = ["-b", f"./{below.name}", "-F", below.suffix[1:], "-u"] if below else []
        run("qemu-img", "create", "-q", "-f", image.suffix[1:], *backing, image, str(SIZE))
        below = image
    return images


@pytest.mark.parametrize("kind", ODD)
async def test_odd_names(kind: str, folder: Path) -> None:
    inside = folder / f"{ODD[kind]}.d"
    inside.mkdir()
    images = odd_chain(inside, ODD[kind])
    content = Content()
    fill(images, content)
    outcome = await merged(images[3], top="[3]", verify=True)
    assert outcome.after.files == [str(images[0]), str(images[3])]
    assert outcome.after.active.backing in (images[0].name, f"./{images[0].name}")
    content.check(images[3])
    remove(outcome)
    done = invoke("commit", images[3].name if kind != "dash" else f"./{images[3].name}", "--json", cwd=inside)
    assert (done.code, done.document["after"]) == (0, [str(images[0])])
    content.check(images[0])


def test_a_leading_dash_after_two_dashes(folder: Path) -> None:
    images = odd_chain(folder, "-c")
    assert invoke("commit", "-q", "--", images[3].name, cwd=folder).code == 0


@pytest.mark.parametrize("which", [0, 3], ids=["base", "active"])
def test_a_name_that_is_no_utf8_is_refused_clearly(which: int, folder: Path) -> None:
    """QMP is JSON, and JSON is text."""
    images = make_chain(folder)
    odd = folder / os.fsdecode(b"\xff\xfe." + images[which].suffix[1:].encode())
    images[which].rename(odd)
    if which == 0:
        run("qemu-img", "rebase", "-u", "-F", "raw", "-b", odd.name, images[1])
    target = odd if which == 3 else images[3]
    with unchanged(folder):
        for words in (["commit"], ["chain"], ["disks"], ["commit", "--json"], ["chain", "-v"]):
            done = invoke(words[0], str(target), *words[1:])
            assert done.code == 3
            assert "no UTF-8" in done.out + done.err


@pytest.mark.parametrize("top", ["[3]", "[4]"])
def test_relative_names_from_elsewhere(top: str, images: list[Path], content: Content, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    done = invoke("commit", "../vm/c.qcow2", "--top", top, "--json", cwd=here)
    assert done.document["before"] == [str(image) for image in images]
    content.check(done.document["after"][-1])
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_symlinked_active_image(top: str, folder: Path, images: list[Path], content: Content) -> None:
    link = folder / "disk.qcow2"
    link.symlink_to("c.qcow2")
    outcome = await merged(link, top=top)
    assert basenames(outcome) == (["base.raw", "disk.qcow2"] if top == "[3]" else ["base.raw"])
    assert link.is_symlink()
    content.check(link)
    content.check(images[0] if top == "[4]" else images[3])


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_symlinked_active_image_in_another_folder(
    top: str, folder: Path, images: list[Path], content: Content, tmp_path: Path
) -> None:
    """With an absolute name it is merged; a relative one leads nowhere from there, for QEMU neither."""
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "disk.qcow2"
    link.symlink_to(images[3])
    with unchanged(folder), pytest.raises(ImageUnreadable, match="No such file"):
        await merged(link, top=top)
    run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", images[2], images[3])
    outcome = await merged(link, top=top)
    assert header(images[3])[0] == (str(images[0]) if top == "[3]" else str(images[2]))
    content.check(outcome.after.active.file)
    content.check(link)


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_symlinked_base(top: str, folder: Path, images: list[Path], content: Content, tmp_path: Path) -> None:
    golden = tmp_path / "golden.raw"
    images[0].rename(golden)
    images[0].symlink_to(golden)
    with unchanged(tmp_path), pytest.raises(ForeignName, match="leads out"):
        await merged(images[3], top=top)
    with unchanged(tmp_path), pytest.raises(SharedBase):
        await merged(images[3], top=top, allow=[str(golden)])
    outcome = await merged(images[3], top=top, base="[1]", allow=[str(golden)])
    assert images[0].is_symlink()
    content.check(outcome.after.active.file)


async def test_a_missing_format_is_not_forced(folder: Path, images: list[Path]) -> None:
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", images[3])
    images[3].write_bytes(raw_header(b"b.qcow2", None, size=SIZE))
    for options in ([], ["--force", "no-format"]):
        said = invoke("commit", str(images[3]), *options, "--json").document["error"]
        assert (said["name"], "--force" in said["hint"]) == ("no-format", False)


def test_internal_snapshots_are_told_where_there_is_nothing_else(folder: Path) -> None:
    image = folder / "a disk.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", image, "1M")
    run("qemu-img", "snapshot", "-c", "before", image)
    said = invoke("commit", str(image))
    assert (said.code, "nothing to merge" in said.out) == (0, True)
    hint = said.err.split("`")[1].replace("NAME", "before")
    assert "internal snapshot before of" in said.err
    run(*shlex.split(hint))
    assert invoke("commit", str(image)).err == ""


def test_the_command_for_an_internal_snapshot_names_the_image_that_has_it(images: list[Path]) -> None:
    run("qemu-img", "snapshot", "-c", "before", images[1])
    said = invoke("pull", str(images[2]), "--base", str(images[1]))
    assert (said.code, "nothing to merge" in said.out) == (0, True)
    run(*shlex.split(said.err.split("`")[1].replace("NAME", "before")))
    assert "internal snapshot" not in invoke("pull", str(images[2]), "--base", str(images[1])).err


def test_who_names_the_base_is_told_what_is_built_on_it(images: list[Path], content: Content) -> None:
    said = invoke("commit", str(images[0]))
    assert (said.code, "nothing to merge" in said.out) == (0, True)
    told = shlex.split(said.err.split("`")[1])
    assert told == ["qmpmerge", "commit", str(images[3])]
    assert invoke(*told[1:], "--yes").code == 0
    content.check(images[0])


# --- block devices -------------------------------------------------------------------------------------------------------


def on_device(folder: Path, device: str, size: int) -> tuple[list[Path], Content]:
    """A chain of two on a device of 8 MiB."""
    images = [folder / "a.qcow2", folder / "b.qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", device, "-F", "raw", images[0], str(size))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", images[1], str(size), cwd=folder)
    content = Content(size)
    for number, image in enumerate(images):
        run("qemu-io", "-c", content.put(0x51 + number, number * MIB, 2 * MIB), image)
    return images, content


@pytest.mark.parametrize("top", ["[2]", "[3]"])
async def test_a_block_device_as_base(top: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with loop(tmp_path / "disk") as device:
        images, content = on_device(folder, device, SIZE)
        with unchanged(folder), pytest.raises(ForeignName):
            await merged(images[1], top=top)
        outcome = await merged(images[1], top=top, base=device, allow=[device], verify=True)
        assert outcome.after.files == ([device, str(images[1])] if top == "[2]" else [device])
        if top == "[2]":
            content.check(images[1])
        else:
            assert Path(device).read_bytes() == content.data


@pytest.mark.parametrize("top", ["[2]", "[3]"])
async def test_a_block_device_too_small_to_grow_loses_nothing(top: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with loop(tmp_path / "disk") as device:
        images, content = on_device(folder, device, SIZE + 4 * MIB)
        with pytest.raises((JobFailed, QemuRefused, Refused)):
            await merged(images[1], top=top, base=device, allow=[device])
        assert Path(device).read_bytes() == bytes(SIZE)
        content.check(images[1])


async def test_a_block_device_too_small_to_grow_is_refused_clearly(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with loop(tmp_path / "disk") as device:
        images, _content = on_device(folder, device, SIZE + 4 * MIB)
        with unchanged(folder), pytest.raises(Refused, match="cannot grow"):
            await merged(images[1], base=device, allow=[device])


@pytest.mark.parametrize(("top", "left"), [("[2]", 2), (None, 1)])
@pytest.mark.parametrize("name", ["vm-1-disk-{}", "disk{}.qcow2"])
def test_qcow2_on_logical_volumes(top: str | None, left: int, name: str, tmp_path: Path) -> None:
    """Three of them, by the links that a volume manager makes."""
    with contextlib.ExitStack() as stack:
        group = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=writable("/dev"))))
        volumes = [group / name.format(number) for number in range(3)]
        for volume in volumes:
            (tmp_path / volume.name).write_bytes(bytes(SIZE))
            volume.symlink_to(stack.enter_context(loop(tmp_path / volume.name)))
        content = Content(4 * MIB)
        for number, volume in enumerate(volumes):
            below = ["-b", str(volumes[number - 1]), "-F", "qcow2"] if number else []
            run("qemu-img", "create", "-qf", "qcow2", *below, volume, "4M")
            run("qemu-io", "-f", "qcow2", "-c", content.put(0x51 + number, number * MIB, MIB), volume)
        target = [str(volumes[2]), "--format", "qcow2", "--allow", str(group)]
        assert invoke("commit", str(volumes[2])).code == 3  # as a device looks it is not told
        assert invoke("commit", *target[:3]).code == 3
        assert len(invoke("chain", *target, "--json").document["images"]) == 3
        assert invoke("doctor", *target).code == 0
        done = invoke("commit", *target, *(["--top", top] if top else []), "--json")
        assert (done.code, len(done.document["after"])) == (0, left), done.err
        content.check(done.document["after"][-1], "qcow2")


def writable(folder: str) -> str:
    """A folder in which only root may make links."""
    if not os.access(folder, os.W_OK):
        pytest.skip(f"no leave to write to {folder}")
    return folder


def test_a_block_device_is_nothing_odd(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with loop(tmp_path / "disk") as device:
        images, _content = on_device(folder, device, SIZE)
        shown = invoke("chain", str(images[1]), "--allow", device, "--json")
        assert (shown.code, shown.document["oddities"]) == (0, [])


# --- in use --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def name(tmp_path: Path) -> str:
    return f"vm-{os.getpid()}-{tmp_path.name}"


@pytest.mark.parametrize("locking", ["on", "off"])
def test_held_by_a_running_vm(
    locking: str, name: str, folder: Path, images: list[Path], content: Content, tmp_path: Path
) -> None:
    arguments = [part.replace("file,node-name", f"file,locking={locking},node-name") for part in nodes(images)]
    device = ["-device", "virtio-blk-pci,drive=c"]
    with machine(tmp_path, "-name", name, *arguments, *device) as vm, unchanged(folder):
        for top in ("[3]", "[4]"):
            done = invoke("commit", str(images[3]), "--top", top, "--json")
            error = done.document["error"]
            assert (done.code, error["name"]) == (3, "in-use")
            assert f"VM {name}" in error["message"]
            assert f"pid {vm.process.pid}" in error["message"]
            assert f"with `{name}` for TARGET" in error["hint"]
        assert invoke("snapshot", str(images[3]), f"c.qcow2={tmp_path}/new.qcow2").code == 3
        assert invoke("commit", str(images[3]), "--dry-run").code == 3
        assert not (tmp_path / "new.qcow2").exists()
    content.check(images[3])


def test_the_live_command_of_the_hint_works(name: str, images: list[Path], content: Content, tmp_path: Path) -> None:
    with machine(tmp_path, "-name", name, *nodes(images), "-device", "virtio-blk-pci,drive=c") as vm:
        hint = invoke("commit", str(images[3]), "--json").document["error"]["hint"]
        (line,) = [part for part in hint.split("`") if part.startswith("qmpmerge ")]
        assert "c.qcow2" in invoke(*line.split()[1:]).out
        assert invoke("commit", hint.split("`")[1]).code == 0
        vm.stop()
    content.check(images[0])


def test_the_live_command_can_be_pasted(images: list[Path], tmp_path: Path) -> None:
    name = f"my vm; {os.getpid()}"
    with machine(tmp_path, "-name", name, *nodes(images)):
        hint = invoke("commit", str(images[3]), "--json").document["error"]["hint"]
    assert f"`qmpmerge disks '{name}'`" in hint


def test_no_command_for_a_vm_that_only_reads_the_image(images: list[Path], folder: Path, tmp_path: Path) -> None:
    """Typed with the VM for TARGET it would be for the VM's own disk, which nobody has named."""
    with machine(tmp_path, *nodes(images), "-device", "virtio-blk-pci,drive=c"), unchanged(folder):
        said = invoke("pull", str(images[1]), "--json").document["error"]
    assert (said["name"], said["hint"]) == ("in-use", "shut that VM down, or give it a copy of the image")


def test_held_without_a_name_or_a_monitor(images: list[Path], folder: Path, tmp_path: Path) -> None:
    with machine(tmp_path, *nodes(images)) as vm, unchanged(folder):
        error = invoke("commit", str(images[3]), "--json").document["error"]
        assert f"with `pid:{vm.process.pid}` for TARGET" in error["hint"]
        os.unlink(vm.target)
        error = invoke("commit", str(images[3]), "--json").document["error"]
        assert "shut that VM down" in error["hint"]


@pytest.mark.parametrize("which", [0, 1, 3])
def test_held_in_the_middle_or_as_another_vms_base(
    which: int, images: list[Path], folder: Path, tmp_path: Path
) -> None:
    """Any image of the chain, opened read-only as well, and under another name."""
    other = folder / f"other{images[which].suffix}"
    os.link(images[which], other)
    read_only = f"file={other},format={other.suffix[1:]},if=none,id=x,readonly=on"
    with machine(tmp_path, "-drive", read_only) as vm, unchanged(folder):
        error = invoke("commit", str(images[3]), "--json").document["error"]
        used = [one for one in error["facts"].get("refusals", [error]) if one["name"] == "in-use"]
        told = images[3:] if which == 3 else images[: which + 1]  # who has the active image is told before all else
        assert [one["facts"]["file"] for one in used] == list(map(str, told))
        assert all(f"pid {vm.process.pid}" in holder for one in used for holder in one["facts"]["holders"])


def test_who_only_reads_what_lies_below_is_in_the_way_of_a_merge_alone(
    name: str, images: list[Path], content: Content, folder: Path, tmp_path: Path
) -> None:
    """Another VM runs on the same golden base, with an overlay of its own: no command is to be typed for that one."""
    other = folder / "other.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", "base.raw", "-F", "raw", other)
    with machine(tmp_path, "-name", name, "-drive", f"file={other},if=none,id=vda", *device("vda")) as vm:
        refused = invoke("commit", str(images[3]), "--json")
        assert refused.code == 3 and f"`{name}`" not in refused.document["error"]["hint"]
        assert [way["direction"] for way in invoke("plan", str(images[3]), "--json").document["ways"]] == [
            "commit",
            "pull",
        ]
        assert invoke("pull", str(images[3]), "--json").document["verdict"] == "pulled"
        vm.io("vda", "write -P 7 0 64k")
    content.check(images[3])


def test_who_writes_to_what_lies_below_is_in_the_way_of_a_pull_too(images: list[Path], folder: Path) -> None:
    with open(images[1], "r+b") as stream:
        writer = subprocess.Popen(["sleep", "600"], stdin=stream)
    with writer:
        try:
            with unchanged(folder):
                error = invoke("pull", str(images[3]), "--json").document["error"]
        finally:
            writer.kill()
    assert (error["name"], error["facts"]["file"]) == ("in-use", str(images[1]))


def test_held_by_qemu_nbd(images: list[Path], folder: Path, tmp_path: Path) -> None:
    with nbd_server(tmp_path, images[3]), unchanged(folder):
        error = invoke("commit", str(images[3]), "--json").document["error"]
        assert (error["name"], "qemu-nbd (pid" in error["message"]) == ("in-use", True)


def test_held_by_a_storage_daemon(images: list[Path], content: Content, folder: Path, tmp_path: Path) -> None:
    with storage_daemon(tmp_path, images, content) as setup, unchanged(folder):
        error = invoke("commit", str(images[3]), "--json").document["error"]
        assert error["name"] == "in-use"
        assert f"pid {setup.machine.process.pid}" in error["message"]
        assert f"with `pid:{setup.machine.process.pid}` for TARGET" in error["hint"]


def test_held_by_any_program(images: list[Path], folder: Path) -> None:
    """Whatever reads it would read a mixture."""
    with open(images[0], "rb") as stream:
        sleeper = subprocess.Popen(["sleep", "600"], stdin=stream)
    with sleeper:
        try:
            with unchanged(folder):
                error = invoke("commit", str(images[3]), "--json").document["error"]
            assert error["facts"]["holders"] == [f"sleep (pid {sleeper.pid})"]
        finally:
            sleeper.kill()


@pytest.mark.parametrize("way", ["vm", "read-only", "storage-daemon", "nbd"])
async def test_held_by_a_process_that_we_may_not_see(
    way: str, images: list[Path], content: Content, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container, or of another user: the locks are the kernel's and seen by all."""
    monkeypatch.setattr(holders, "users", lambda files, excluding=(): ())
    read_only = f"file={images[1]},format=qcow2,if=none,id=x,readonly=on"
    ways: dict[str, contextlib.AbstractContextManager[object]] = {
        "vm": blockdev(tmp_path, images, content),
        "read-only": machine(tmp_path, "-drive", read_only, "-device", "virtio-blk-pci,drive=x"),
        "storage-daemon": storage_daemon(tmp_path, images, content),
        "nbd": nbd_server(tmp_path, images[3]),
    }
    with ways[way], unchanged(folder):
        with pytest.raises(Refused, match="a process that we may not see") as refused:
            await merged(images[3], top="[3]")
        assert {type(one) for one in refused.value.parts} == {InUse}
    content.check(images[3])


async def test_qemus_own_locks_are_the_last_guard(
    images: list[Path], content: Content, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when somebody opens it between our look and our opening."""
    monkeypatch.setattr(holders, "users", lambda files, excluding=(): ())
    monkeypatch.setattr(holders, "is_locked", lambda file: False)
    with blockdev(tmp_path, images, content), unchanged(folder), pytest.raises(InUse, match="another process"):
        await merged(images[3])
    content.check(images[3])


async def test_while_we_hold_it_nobody_else_writes(images: list[Path], content: Content) -> None:
    """A raw base is locked once the job runs: QEMU lets others write below an image that nobody uses yet."""
    refused: list[Path] = []

    def report(told: qmpmerge.Progress) -> None:
        refused.append(cannot_write(images[0]))

    async with qmpmerge.offline(images[3]) as target:
        for image in images[1:]:
            cannot_write(image)
        await qmpmerge.commit(target, top="[3]", report=report)
    assert refused
    content.check(images[3])


def cannot_write(image: Path) -> Path:
    line = ["qemu-io", "-f", image.suffix[1:], "-c", "write 0 512", str(image)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert "lock" in done.stderr, (image, done.stdout, done.stderr)
    return image


def test_a_chain_in_use_is_shown_and_said_to_be(
    name: str, images: list[Path], content: Content, folder: Path, tmp_path: Path
) -> None:
    with machine(tmp_path, "-name", name, *nodes(images), "-device", "virtio-blk-pci,drive=c") as vm, unchanged(folder):
        shown = invoke("chain", str(images[3]), "--json").document
        assert [image["file"] for image in shown["images"]] == [str(image) for image in images]
        assert [image["backing"] for image in shown["images"]] == [None, *NAMES[:3]]
        odd = [(oddity["name"], f"VM {name}" in oddity["message"], oddity["file"]) for oddity in shown["oddities"]]
        assert odd == [("in-use", True, str(images[3]))], (
            "who only reads what lies below changes nothing of what is shown"
        )
        told = invoke("chain", str(images[3]))
        assert (told.code, f"pid {vm.process.pid}" in told.out + told.err) == (0, True)
        assert invoke("disks", str(images[3])).code == 0


def test_looking_changes_nothing(images: list[Path], content: Content, folder: Path) -> None:
    with unchanged(folder):
        assert invoke("chain", str(images[3]), "--json").document["oddities"] == []
        (disk,) = invoke("disks", str(images[3]), "--json").document["disks"]
        assert (disk["disk"], disk["depth"], disk["file"]) == ("c.qcow2", 4, str(images[3]))
        assert not disk["read_only"]


async def test_a_dry_run_leaves_the_data_alone(images: list[Path], content: Content, folder: Path) -> None:
    async with qmpmerge.offline(images[3]) as target:
        outcome = await qmpmerge.commit(target, top="[3]", dry_run=True)
    assert (outcome.verdict, basenames(outcome)) == ("planned", ["base.raw", "c.qcow2"])
    assert header(images[3]) == ("b.qcow2", "qcow2")
    content.check(images[3])


# --- hostile images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", ["/etc/passwd", "/dev/zero", "fifo", "json:{}", "../secret.raw", "top.qcow2"])
async def test_hostile_names_open_nothing(
    foreign: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon, which is starting meanwhile, never hears of them."""
    os.mkfifo(folder / "fifo")
    (tmp_path / "secret.raw").write_bytes(bytes(SIZE))
    (folder / "top.qcow2").write_bytes(raw_header(foreign.encode(), b"qcow2" if foreign == "top.qcow2" else b"raw"))
    monkeypatch.setattr(storagedaemon.Daemon, "session", lambda daemon, **rest: pytest.fail("it was spoken to"))
    with unchanged(tmp_path):
        for write in (True, False):
            with pytest.raises(Refused) as refused:
                async with qmpmerge.offline(folder / "top.qcow2", write=write):
                    pass
            assert refused.value.name in ("foreign-name", "backing-loop")
    (folder / "top.qcow2").write_bytes(raw_header())
    with pytest.raises(pytest.fail.Exception, match="spoken to"):  # the trap shuts where nothing is refused
        async with qmpmerge.offline(folder / "top.qcow2"):
            pass


async def test_a_data_file_elsewhere(folder: Path, tmp_path: Path) -> None:
    """A merge would write into it."""
    victim = tmp_path / "victim"
    content = Content()
    images = make_chain(folder, ("base.raw", "a.qcow2"))
    options = ("-o", f"data_file={victim}", "-b", "base.raw", "-F", "raw")
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, images[1], str(SIZE))
    run("qemu-io", "-c", content.put(0x12, 0, MIB), images[1])
    with unchanged(tmp_path), pytest.raises(ForeignName) as refused:
        await merged(images[1])
    assert refused.value.backing == str(victim)
    await merged(images[1], allow=[str(victim)])
    content.check(images[0])


def test_what_the_user_has_named_is_merged(folder: Path, tmp_path: Path) -> None:
    images = make_chain(folder, ("base.raw", "a.qcow2"))
    golden = tmp_path / "golden" / "base.raw"
    golden.parent.mkdir()
    images[0].rename(golden)
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", golden, images[1])
    content = Content()
    run("qemu-io", "-c", content.put(0x77, MIB, MIB), images[1])
    with unchanged(tmp_path):
        refused = invoke("commit", str(images[1]), "--json")
        assert (refused.code, refused.document["error"]["name"]) == (3, "foreign-name")
        assert invoke("commit", str(images[1]), "--allow", str(folder)).code == 3
        allowed = ("commit", str(images[1]), "--allow", "golden")
        assert invoke(*allowed, "--json", cwd=tmp_path).document["error"]["name"] == "shared-base"
    assert invoke(*allowed, "--base", "golden/base.raw", cwd=tmp_path).code == 0
    content.check(golden)


async def test_the_first_bytes_of_a_raw_base_are_the_guests(folder: Path) -> None:
    """A guest wrote a qcow2 header into its raw disk: it stays data, and is merged as such."""
    images = make_chain(folder, ("base.raw", "a.qcow2", "b.qcow2"))
    trap = raw_header(b"/etc/passwd", b"raw").ljust(4096, b"\0")
    with open(images[0], "r+b") as file:
        file.write(trap)
    run("qemu-io", "-c", "write -P 9 1M 1M", images[1])
    expected = trap.ljust(MIB, b"\0") + b"\x09" * MIB
    for top, active in (("[2]", images[2]), (None, images[0])):
        outcome = await merged(images[2], top=top, verify=True)
        assert outcome.after.active.file == str(active)
        assert outcome.after.base.format == "raw"
        remove(outcome)
    assert images[0].read_bytes()[: 2 * MIB] == expected


# --- names are given to other files -----------------------------------------------------------------------------------------


class Swapper:
    """Gives a name to another file right before a command is sent for the first time; puts it back afterwards."""

    def __init__(self, image: Path, victim: Path, command: str) -> None:
        self.image, self.victim, self.command = image, victim, command
        self.seen: list[str] = []
        self.away = image.with_name(f"{image.name}.was")

    def __call__(self, direction: str, text: str) -> None:
        command = json.loads(text).get("execute") if direction == "->" else None
        if command == self.command and command not in self.seen:
            self.image.rename(self.away)
            self.image.symlink_to(self.victim)
        self.seen += [command] if command else []

    def put_back(self) -> None:
        if self.away.exists():
            self.image.unlink()
            self.away.rename(self.image)


@pytest.mark.parametrize(
    "command", ["blockdev-add", "blockdev-reopen", "change-backing-file", "block-commit", "job-finalize"]
)
@pytest.mark.parametrize(
    ("swapped", "base", "top"), [(0, "[1]", "[3]"), (1, "[2]", "[3]"), (2, "[1]", "[2]"), (0, "[1]", "[4]")]
)
async def test_a_swapped_name_makes_us_write_to_no_other_file(
    command: str, swapped: int, base: str, top: str, images: list[Path], content: Content, tmp_path: Path
) -> None:
    """The base, the base in the middle, the overlay: all that are opened again to be written."""
    victim = tmp_path / "root" / "victim"
    victim.parent.mkdir()
    shutil.copyfile(images[swapped], victim)
    swapper, outcome = Swapper(images[swapped], victim, command), None
    with unchanged(victim.parent), contextlib.suppress(Refused, Failed, Unknown):
        async with heard(swapper), qmpmerge.offline(images[3]) as target:
            outcome = await qmpmerge.commit(target, base=base, top=top, merged_files="keep")
    has_struck = command in swapper.seen
    assert has_struck == ((command, top) not in [("job-finalize", "[4]"), ("change-backing-file", "[4]")])
    assert (outcome is None) == has_struck
    swapper.put_back()
    content.check(images[3])


class Flicker(Swapper):
    """Gives the name to another file while QEMU is asked what it has open, and again when the job is started."""

    def __call__(self, direction: str, text: str) -> None:
        command = json.loads(text).get("execute", "") if direction == "->" else ""
        if command in ("query-named-block-nodes", self.command):
            if not self.away.exists():
                self.image.rename(self.away)
                self.image.symlink_to(self.victim)
        elif command:
            self.put_back()


@pytest.mark.parametrize(("swapped", "base", "top"), [(0, "[1]", "[3]"), (2, "[1]", "[2]"), (0, "[1]", "[4]")])
async def test_an_image_whose_name_led_elsewhere_when_we_looked_is_not_written_by_its_name(
    swapped: int, base: str, top: str, images: list[Path], content: Content, tmp_path: Path
) -> None:
    """Then it is not known which file it is: nor may it be left to the job to open it."""
    victim = tmp_path / "root" / "victim"
    victim.parent.mkdir()
    shutil.copyfile(images[swapped], victim)
    flicker = Flicker(images[swapped], victim, "block-commit")
    with unchanged(victim.parent), pytest.raises(Refused):
        async with heard(flicker), qmpmerge.offline(images[3]) as target:
            await qmpmerge.commit(target, base=base, top=top, merged_files="keep")
    flicker.put_back()
    content.check(images[3])


@pytest.mark.skipif(not have("strace"), reason="there is no strace")
@pytest.mark.parametrize(("base", "top"), [("[1]", "[2]"), ("[2]", "[3]"), ("[1]", "[4]")])
async def test_no_job_opens_a_name(
    base: str, top: str, images: list[Path], content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, log, place = shutil.which(storagedaemon.DAEMON), tmp_path / "log", tmp_path / "bin"
    place.mkdir()
    (place / storagedaemon.DAEMON).write_text(
        f'#!/bin/sh\nexec strace -D -f -qq -o {log} -e trace=openat {daemon} "$@"\n'
    )
    (place / storagedaemon.DAEMON).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    before = 0

    def trace(direction: str, text: str) -> None:
        nonlocal before
        if direction == "->" and json.loads(text)["execute"] == "block-commit":
            before = len(log.read_text())

    async with heard(trace), qmpmerge.offline(images[3]) as target:
        await qmpmerge.commit(target, base=base, top=top)
    opened = [line for line in log.read_text()[before:].splitlines() if str(images[0].parent) in line]
    assert before and not opened, opened


# --- job control makes no sense here ------------------------------------------------------------------------------------------


def test_jobs_are_those_of_a_running_qemu(images: list[Path]) -> None:
    for words in (["jobs"], ["job", "x", "pivot"]):
        done = invoke(words[0], str(images[3]), *words[1:])
        assert (done.code, "jobs are those of a running QEMU" in done.err) == (4, True)


@pytest.mark.parametrize("top", ["[3]", "[4]"])
def test_past_the_timeout_nothing_goes_on(top: str, images: list[Path], content: Content) -> None:
    words, seconds = ["commit", str(images[3]), "--top", top, "--speed", "1", "--json", "--timeout"], 2
    while (done := invoke(*words, str(seconds))).document["error"]["name"] == "time-up":
        seconds *= 4  # a busy machine had not begun by then
    content.check(images[3])
    assert (done.code, done.document["verdict"]) == (7, "postponed")
    assert "cancelled" in done.document["error"]["message"]


def test_a_job_cannot_be_left_ready(images: list[Path], content: Content, folder: Path) -> None:
    with unchanged(folder):
        done = invoke("commit", str(images[3]), "--wait-ready", "--json")
        assert (done.code, done.document["verdict"]) == (3, "refused")


async def test_a_copy_may_be_kept(images: list[Path], content: Content) -> None:
    outcome = await merged(images[3], ending="keep")
    assert (outcome.verdict, outcome.after.files) == ("kept", [str(image) for image in images])
    content.check(images[0])
    content.check(images[3])


# --- snapshots -------------------------------------------------------------------------------------------------------------


async def test_a_snapshot(images: list[Path], content: Content, folder: Path) -> None:
    with open(images[3], "rb") as file:
        before = hashlib.sha256(file.read()).hexdigest()
    async with qmpmerge.offline(images[3]) as target:
        (overlay,) = await qmpmerge.snapshot(target, {"c.qcow2": folder / "d.qcow2"})
    assert (overlay.disk, overlay.file) == ("c.qcow2", str(folder / "d.qcow2"))
    assert header(folder / "d.qcow2") == ("c.qcow2", "qcow2")
    assert hashlib.sha256(images[3].read_bytes()).hexdigest() == before
    content.check(folder / "d.qcow2")
    assert basenames(await merged(folder / "d.qcow2")) == ["base.raw"]
    content.check(images[0])


@pytest.mark.parametrize("disk", ["c.qcow2", "layer4", "PATH"])
def test_names_of_the_only_disk(disk: str, images: list[Path], content: Content, tmp_path: Path) -> None:
    disk = disk.replace("PATH", str(images[3]))
    done = invoke("snapshot", str(images[3]), f"{disk}={tmp_path}/new.qcow2", "--json")
    assert (done.code, done.document["verdict"]) == (0, "created")
    assert header(tmp_path / "new.qcow2") == (str(images[3]), "qcow2")
    content.check(tmp_path / "new.qcow2")


def test_a_snapshot_of_a_raw_image_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    """And back again."""
    (base,) = make_chain(folder, ("base.raw",))
    content = Content()
    fill([base], content)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "vm/base.raw", "-F", "raw", tmp_path / "new.qcow2")
    done = invoke("snapshot", "vm/base.raw", "base.raw=new.qcow2", "--reuse", cwd=tmp_path)
    assert done.code == 0, done.err
    assert header(tmp_path / "new.qcow2") == ("vm/base.raw", "raw")
    content.check(tmp_path / "new.qcow2")
    run("qemu-io", "-c", content.put(0x44, 0, MIB), tmp_path / "new.qcow2")
    assert invoke("commit", "new.qcow2", cwd=tmp_path).code == 0
    content.check(base)


async def test_a_snapshot_over_an_existing_file_is_refused(images: list[Path], content: Content, folder: Path) -> None:
    (folder / "dangling").symlink_to("nowhere")
    for file in (images[0], folder / "c.qcow2", folder / "dangling", folder):
        async with qmpmerge.offline(images[3]) as target:
            with pytest.raises(FileExists):
                await qmpmerge.snapshot(target, {"c.qcow2": file})
    content.check(images[3])


async def test_there_is_one_disk(images: list[Path], folder: Path) -> None:
    async with qmpmerge.offline(images[3]) as target:
        with pytest.raises(NoSuchDisk) as refused:
            await qmpmerge.snapshot(target, {"c.qcow2": folder / "d.qcow2", "vdb": folder / "e.qcow2"})
        assert refused.value.known == ["c.qcow2"]
        with pytest.raises(OptionsConflict):
            await qmpmerge.snapshot(target, {"c.qcow2": folder / "d.qcow2", "layer4": folder / "e.qcow2"})
        with pytest.raises(NoSuchDisk):
            await qmpmerge.commit(target, "vda")
        assert len(await target.disks()) == 1
    assert beside(folder) == sorted(NAMES)


# --- verified --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["[3]", "[4]"])
@pytest.mark.parametrize("words", [["--verify"], []], ids=["asked", "cheap"])
def test_the_result_says_verified(top: str, words: list[str], images: list[Path], content: Content) -> None:
    done = invoke("commit", str(images[3]), "--top", top, *words, "--json").document
    assert done["verified"] is True


@contextlib.contextmanager
def corrupting(monkeypatch: pytest.MonkeyPatch, base: Path) -> Iterator[None]:
    """After the base was flushed and before it is looked at, a bit of it changes without QEMU."""
    really = qemuimg.differs_at

    async def differs_at(chain: Sequence[qmpmerge.Image], *others: Any) -> int | None:
        with open(base, "r+b") as file:
            file.seek(2 * MIB + 77)
            (byte,) = file.read(1)
            file.seek(2 * MIB + 77)
            file.write(bytes([byte ^ 1]))
        return await really(chain, *others)

    with monkeypatch.context() as patch:
        patch.setattr(qemuimg, "differs_at", differs_at)
        yield


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_base_that_went_wrong_is_found(
    top: str, images: list[Path], content: Content, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with qmpmerge.offline(images[3]) as target:
        with corrupting(monkeypatch, images[0]), pytest.raises(NotVerified, match="they show different data") as failed:
            await qmpmerge.commit(target, top=top, verify=True)
        assert (failed.value.exit_code, failed.value.base) == (5, str(images[0]))
        view = await target.chain()
        assert view.chain.files == [str(image) for image in images]
        assert not await target.jobs()
    assert header(images[3]) == ("b.qcow2", "qcow2")
    content.check(images[3])
    again = await merged(images[3], top=top, verify=True)
    assert again.verified
    content.check(again.after.active.file)


async def test_live_too(images: list[Path], content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with blockdev(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            with corrupting(monkeypatch, images[0]), pytest.raises(NotVerified):
                await qmpmerge.commit(target, top="[3]", verify=True)
            assert (await target.chain()).chain.files == [str(image) for image in images]
            assert (await qmpmerge.commit(target, top="[3]", verify=True)).verified
        setup.check()


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_without_verify_nothing_is_compared(
    top: str, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemuimg, "differs_at", lambda *chains: pytest.fail("it was compared"))
    outcome = await merged(images[3], top=top, verify=False)
    assert not outcome.verified
    content.check(outcome.after.active.file)


async def test_what_is_not_cheap_is_compared_on_demand_only(
    images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpmerge.engine.safeguards.CHEAP_BYTES", 1)
    outcome = await merged(images[3], base="[2]", top="[3]")
    assert not outcome.verified
    remove(outcome)
    assert (await merged(images[3], verify=True)).verified


async def test_a_comparison_that_cannot_be_made_is_no_proof(
    images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreadable(*chains: object) -> None:
        raise ImageUnreadable(file="x", reason="not like this")

    monkeypatch.setattr(qemuimg, "differs_at", unreadable)
    with pytest.raises(NotVerified, match="not like this"):
        await merged(images[3], top="[3]", verify=True)
    content.check(images[3])
    assert not (await merged(images[3], top="[3]")).verified
    content.check(images[3])


@pytest.mark.parametrize("mark", [79, 95], ids=["dirty", "unknown-autoclear"])
def test_a_dry_run_leaves_marks_that_qemu_clears_as_it_opens_for_writing(mark: int, tmp_path: Path) -> None:
    images = make_chain(tmp_path)
    with images[3].open("r+b") as file:
        file.seek(mark)
        file.write(b"\x01" if mark == 79 else b"\x80")
    before = [image.read_bytes() for image in images]
    assert invoke("commit", str(images[3]), "--dry-run").code == 0
    assert [image.read_bytes() for image in images] == before
    run("qemu-io", "-f", "qcow2", "-c", "read 0 512", images[3])
    assert images[3].read_bytes() != before[3], "QEMU clears it"
    assert invoke("commit", str(images[3])).code == 0
