"""
Chains that are only looked at: what is told of them without a daemon is what one tells, nothing is opened that was not
approved, and where there is more to a chain than headers a daemon has it open.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rig.command import invoke
from rig.machines import SIZE, Content, create_encrypted, make_chain, run
from speed.images import empty_chain

import qmpmerge
from qmpmerge.errors import NoSuchJob, Refused, Replaced, TooDeep
from qmpmerge.images import qemuimg, walk
from qmpmerge.images.qemuimg import Info
from qmpmerge.targets import shown


def plain(folder: Path) -> Path:
    return make_chain(folder)[-1]


def raw(folder: Path) -> Path:
    """Whose size is no whole number of sectors."""
    (folder / "only.raw").write_bytes(bytes(1_000_001))
    return folder / "only.raw"


def featured(folder: Path) -> Path:
    """Images that differ in all that is told of one; one bitmap was not closed, since its QEMU was killed."""
    old, new, top = (folder / name for name in ("old.qcow2", "new.qcow2", "top.qcow2"))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", old, str(SIZE))
    run("qemu-img", "snapshot", "-c", "before", old)
    features = "cluster_size=128k,extended_l2=on,lazy_refcounts=on,compression_type=zstd"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", features, "-b", old, "-F", "qcow2", new)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "new.qcow2", "-F", "qcow2", top, str(2 * SIZE), cwd=folder)
    run("qemu-img", "bitmap", "--add", "-g", "32k", new, "daily")
    run("qemu-img", "bitmap", "--add", "--disable", new, "old")
    run("qemu-img", "bitmap", "--add", top, "open")
    run("sh", "-c", 'qemu-io -c "write 0 64k" -c "sigraise 9" "$0" || true', top)
    return top


def linked(folder: Path) -> Path:
    """By a symlinked folder, a symlinked image and ``..``, with odd names in the headers."""
    make_chain(folder, ("base.raw", "a:b.qcow2")[:1])
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", f"file:{folder}/base.raw", "-F", "raw", folder / "a:b.qcow2")
    names = ("-b", "./x/../a:b.qcow2", "-F", "qcow2")
    (folder / "x").mkdir()
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", *names, folder / "real.qcow2", str(SIZE))
    (folder / "disk.qcow2").symlink_to("real.qcow2")
    (folder.parent / "link").symlink_to(folder.name)
    return folder.parent / "link" / "disk.qcow2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm").mkdir()
    return tmp_path / "vm"


@contextmanager
def by_a_daemon() -> Iterator[None]:
    """In this block a daemon is asked."""

    async def nothing(_layers: object) -> None:
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown, "read", nothing)
        yield


async def told(image: Path) -> tuple[bool, Any]:
    """Whether there was a daemon, and all that is told of the disk; but not what nobody can know without one."""
    async with qmpmerge.offline(image, write=False) as target:
        disks = await target.disks(details=True)
        view = await target.chain(details=True)
        return target.pid is not None, (disks, view.disk, view.chain, view.oddities, view.details, await target.jobs())


@pytest.mark.parametrize("make", [plain, raw, featured, linked])
async def test_what_is_told_is_what_a_daemon_tells(make: Callable[[Path], Path], folder: Path) -> None:
    image = make(folder)
    with by_a_daemon():
        by_daemon = await told(image)
    without = await told(image)
    assert (by_daemon[0], without[0]) == (True, False)
    assert without[1] == by_daemon[1]
    shown_by = [invoke(word, str(image), "--json", "--details").document for word in ("disks", "chain")]
    with by_a_daemon():
        assert [invoke(word, str(image), "--json", "--details").document for word in ("disks", "chain")] == shown_by


def with_data_file(folder: Path) -> Path:
    image = make_chain(folder, ("base.raw",))[0].with_name("a.qcow2")
    options = ("-b", "base.raw", "-F", "raw", "-o", f"data_file={folder}/data")
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, image)
    return image


def part_of_a_file(folder: Path) -> Path:
    (folder / "box").write_bytes(bytes(2 * SIZE))
    node = f'{{"driver": "raw", "offset": {SIZE}, "size": {SIZE}, "file": {{"driver": "file", "filename": "{folder}/box"}}}}'
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", f"json:{node}", "-F", "raw", folder / "a.qcow2", str(SIZE))
    return folder / "a.qcow2"


def encrypted(folder: Path) -> Path:
    cheap = ("-o", "key-secret=s,iter-time=10,hash-alg=sha512")
    create_encrypted("-f", "luks", "--object", "secret,id=s,data=x", *cheap, folder / "a.luks", str(SIZE))
    return folder / "a.luks"


def damaged(folder: Path) -> Path:
    """QEMU does not open it, and says why."""
    image = make_chain(folder, ("a.qcow2",))[0]
    with image.open("r+b") as file:
        file.seek(72)
        file.write(b"\x80")  # an incompatible feature that nobody knows
    return image


@pytest.mark.parametrize("make", [with_data_file, part_of_a_file, encrypted, damaged])
async def test_what_takes_a_daemon(make: Callable[[Path], Path], folder: Path) -> None:
    image = make(folder)
    try:
        async with qmpmerge.offline(
            image, write=False, form="luks" if make is encrypted else None, secret="x"
        ) as target:
            assert target.pid is not None
    except Refused as error:
        assert make is damaged and "nsupported" in str(error)


# --- names that are given to other files while it is looked at --------------------------------------------------------------


def meanwhile(monkeypatch: pytest.MonkeyPatch, before: Callable[[], object], after: Callable[[], object]) -> None:
    """Something happens right before qemu-img opens the names, and right after it has."""
    really = qemuimg.chain_info

    async def chain_info(path: str, format: str) -> list[Info]:
        monkeypatch.setattr(qemuimg, "chain_info", really)
        before()
        try:
            return await really(path, format)
        finally:
            after()

    monkeypatch.setattr(qemuimg, "chain_info", chain_info)


@pytest.mark.parametrize("which", [0, 1, 3])
async def test_a_name_that_is_given_to_another_file_is_refused(
    which: int, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its header says just the same."""
    image = images[which]

    def swap() -> None:
        copy = image.with_name("copy")
        shutil.copyfile(image, copy)
        copy.replace(image)

    meanwhile(monkeypatch, swap, lambda: None)
    with pytest.raises(Replaced):
        async with qmpmerge.offline(images[3], write=False):
            pass


async def test_a_name_that_leads_elsewhere_for_a_moment_shows_nothing_of_what_is_there(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, away = tmp_path / "secret.qcow2", tmp_path / "away"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/hostname", "-F", "raw", "-u", secret, str(3 * SIZE))

    def swap() -> None:
        images[2].rename(away)
        images[2].symlink_to(secret)

    meanwhile(monkeypatch, swap, lambda: away.replace(images[2]))
    async with qmpmerge.offline(images[3], write=False) as target:
        chain = (await target.chain()).chain
        assert target.pid is not None
    assert chain.files == list(map(str, images))
    assert {image.virtual_size for image in chain} == {SIZE}


async def test_a_header_that_is_rewritten_meanwhile_is_read_again(
    images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a merge ends: a daemon tells both."""
    meanwhile(
        monkeypatch, lambda: run("qemu-img", "rebase", "-u", "-b", "a.qcow2", "-F", "qcow2", images[3]), os.getpid
    )
    async with qmpmerge.offline(images[3], write=False) as target:
        assert target.pid is not None
        assert [odd.name for odd in (await target.chain()).oddities] == ["disagrees"]


# --- there is no session ------------------------------------------------------------------------------------------------------


async def test_nothing_is_done_to_what_is_only_looked_at(images: list[Path], content: Content) -> None:
    async with qmpmerge.offline(images[3], write=False) as target:
        with pytest.raises(NoSuchJob) as unknown:
            await target.job("c.qcow2")
        assert unknown.value.known == []
        for work in (qmpmerge.commit(target), qmpmerge.pull(target), qmpmerge.snapshot(target, {"c.qcow2": "d.qcow2"})):
            with pytest.raises(ValueError, match="opened with write=False"):
                await work
    assert sorted(file.name for file in images[0].parent.iterdir()) == sorted(file.name for file in images)
    content.check(images[3])


async def test_a_chain_too_deep_to_be_opened_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "DEEPEST", 8)
    images = empty_chain(tmp_path / "deep", 9)
    done = invoke("chain", str(images[-1]), "--json")
    assert [image["file"] for image in done.document["images"]] == list(map(str, images))
    with pytest.raises(TooDeep) as refused:
        async with qmpmerge.offline(images[-1], dry_run=True):
            pass
    assert (refused.value.image, refused.value.limit) == (str(images[-1]), 8)
    with by_a_daemon(), pytest.raises(TooDeep):
        async with qmpmerge.offline(images[-1], write=False):
            pass
