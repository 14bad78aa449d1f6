"""Overlays that the user has made: taken as they are where they are one and empty, and never removed."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig.command import invoke
from rig.devices import loop
from rig.disks import WAYS, Setup, blockdev, drive
from rig.harms import harm
from rig.machines import MIB, SIZE, Content, create_encrypted, fill, machine, make_chain, run

import qmpmerge
from qmpmerge.errors import FileExists, InUse, NotAnOverlay, NotSeen, OverlayNotEmpty, QemuRefused
from qmpmerge.images import qcow2
from qmpmerge.operations import reuse, snapshot
from qmpmerge.operations.orders import Order
from qmpmerge.targets.target import Target


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return make_chain(tmp_path, ("base.raw", "a.qcow2"))


@pytest.fixture
def content(images: list[Path]) -> Content:
    content = Content()
    fill(images, content)
    return content


@pytest.fixture
def setup(tmp_path: Path, images: list[Path], content: Content) -> Iterator[Setup]:
    with drive(tmp_path, images, content) as setup:
        yield setup


def make(file: Path | str, *options: str, backing: str = "a.qcow2", form: str = "qcow2", size: int = SIZE) -> str:
    """An overlay as a user makes one beside a VM that runs."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", *options, "-b", backing, "-F", form, file, str(size))
    return str(file)


@pytest.mark.parametrize("way", WAYS)
async def test_an_overlay_with_features_of_its_own(
    tmp_path: Path, images: list[Path], content: Content, way: str
) -> None:
    made = make(tmp_path / "o.qcow2", "-o", "cluster_size=4k,compression_type=zstd,lazy_refcounts=on")
    run("qemu-img", "bitmap", "--add", made, "daily")
    before = os.stat(made)
    with WAYS[way](tmp_path, images, content) as setup:
        async with setup.target() as target:
            (found,) = await qmpmerge.snapshot(target, {setup.disk: made}, reuse=True)
            view = await target.chain(found.node, details=True)
            assert (str(view.chain), view.oddities) == ("base.raw <-- a.qcow2 <-- o.qcow2", ())
            assert (found.file, found.backing) == (made, "a.qcow2")
            assert (view.details[-1].cluster_size, view.details[-1].compression) == (4096, "zstd")
            assert [(one.name, one.recording) for one in view.details[-1].bitmaps] == [("daily", True)]
        setup.moved(made)
        setup.write(0x41, MIB, MIB)
        setup.check()
        setup.off()
    assert (os.stat(made).st_ino, os.stat(made).st_mode) == (before.st_ino, before.st_mode)
    content.check(made)


async def test_a_device(setup: Setup, tmp_path: Path, content: Content) -> None:
    """As a logical volume: what is on it decides, and the name by which it is given is what is opened."""
    for folder in ("store", "vg"):
        (tmp_path / folder).mkdir()
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "store/volume", str(2 * SIZE))
    with loop(tmp_path / "store/volume") as device:
        (tmp_path / "vg/snap1").symlink_to(device)
        order = f"vda={tmp_path}/vg/snap1"
        none = invoke("snapshot", setup.machine.target, order, "--reuse", "--json").document["error"]
        assert (none["name"], none["facts"]["reason"]) == ("not-an-overlay", "it has no qcow2 header")
        run(*shlex.split(none["facts"]["command"]))  # which the hint says
        assert "--reuse" in invoke("snapshot", setup.machine.target, order).err
        done = invoke("snapshot", setup.machine.target, order, "--reuse", "--json")
        assert (done.code, done.document["overlays"][0]["backing"]) == (0, f"{tmp_path}/a.qcow2"), done.err
        setup.write(0x42, 2 * MIB, MIB)
        setup.check()
        chain = invoke("chain", setup.machine.target, "--json").document
        assert [image["file"] for image in chain["images"]][-1] == f"{tmp_path}/vg/snap1"
        assert chain["oddities"] == []
        merged = invoke("commit", setup.machine.target, "vda", "--base", "[1]")
        assert merged.code == 0, merged.err
        setup.check()
        setup.off()
    content.check(tmp_path / "base.raw")


async def test_a_device_is_found_from_the_images_below(
    setup: Setup, tmp_path: Path, content: Content, images: list[Path]
) -> None:
    """By a note, since no folder shows what a device holds; nothing is merged or started past it."""
    (tmp_path / "store").mkdir()
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "store/volume", str(2 * SIZE))
    with loop(tmp_path / "store/volume") as device:
        (tmp_path / "snap1").symlink_to(device)
        make(tmp_path / "snap1", backing=str(images[1]))
        async with qmpmerge.live(setup.machine.target) as target:
            await qmpmerge.snapshot(target, {"vda": tmp_path / "snap1"}, reuse=True)
        setup.write(0x43, MIB, MIB)
        setup.off()
        assert invoke("active", str(images[0]), "--drive").out == f"file={tmp_path}/snap1,format=qcow2\n"
        error = invoke("commit", str(images[1]), "--json").document["error"]
        assert (error["name"], error["facts"]["dependents"]) == ("dependents", [f"{tmp_path}/snap1"])
        run("dd", "if=/dev/zero", f"of={device}", "bs=64k", "count=1")  # as after a boot, when another volume is there
        assert invoke("active", str(images[0]), "--json").document["error"]["name"] == "no-active"
        assert invoke("commit", str(images[1]), "--json").document["error"]["name"] == "not-seen"


# --- what is none ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "options", "named"),
    [
        ("it has 4194304 bytes and the disk 8388608", [], {"size": SIZE // 2}),
        ("its header names base.raw, and not", [], {"backing": "base.raw", "form": "raw"}),
        ("its header names nowhere.qcow2, and not", [], {"backing": "nowhere.qcow2"}),
        ("its header records raw for its backing file, which is qcow2", [], {"form": "raw"}),
        ("its data is in another file", ["-o", "data_file={}/o.data"], {}),
    ],
)
async def test_what_is_no_overlay_of_the_disk(
    setup: Setup, tmp_path: Path, reason: str, options: list[str], named: dict[str, Any]
) -> None:
    make(tmp_path / "o.qcow2", *(option.format(tmp_path) for option in options), **named)
    await refused(setup, tmp_path / "o.qcow2", reason)


async def test_one_that_was_cut_off(setup: Setup, tmp_path: Path) -> None:
    """The guest would have nothing but errors from its first write on."""
    make(tmp_path / "o.qcow2")
    os.truncate(tmp_path / "o.qcow2", 65536)
    await refused(setup, tmp_path / "o.qcow2", "it was not closed as it should have been, or is damaged")


async def refused(setup: Setup, file: Path, reason: str) -> None:
    """It is refused for that, and the file is as it was."""
    before = file.read_bytes()
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(NotAnOverlay) as error:
            await qmpmerge.snapshot(target, {"vda": file}, reuse=True)
        assert len((await target.chain("vda")).chain) == 2
    assert error.value.reason.startswith(reason)
    assert file.read_bytes() == before


async def test_nor_is_another_file(setup: Setup, tmp_path: Path, images: list[Path]) -> None:
    file = tmp_path / "o.qcow2"
    file.write_text("precious")
    await refused(setup, file, "it has no qcow2 header")
    run("qemu-img", "create", "-q", "-f", "qcow2", file, str(SIZE))
    await refused(setup, file, "its header names no backing file")
    run("qemu-img", "snapshot", "-c", "s", file)
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", file)
    await refused(setup, file, "it has internal snapshots")
    await refused(setup, images[0], "QEMU has it in a chain already")
    create_encrypted(
        *("-f", "qcow2", "-u", "--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s"),
        *("-b", "a.qcow2", "-F", "qcow2", file, str(SIZE)),
    )
    await refused(setup, file, "it is encrypted")


async def test_one_that_is_not_there(setup: Setup, tmp_path: Path) -> None:
    """The hint is a command that makes it, even beside a VM that runs."""
    file = tmp_path / "o.qcow2"
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(NotAnOverlay) as error:
            await qmpmerge.snapshot(target, {"vda": file}, reuse=True)
        assert (error.value.reason, f"`{error.value.command}`" in error.value.hint) == (
            "No such file or directory",
            True,
        )
        run(*shlex.split(error.value.command))
        await qmpmerge.snapshot(target, {"vda": file}, reuse=True)


async def test_one_on_which_another_is_built(setup: Setup, tmp_path: Path) -> None:
    make(tmp_path / "o.qcow2")
    make(tmp_path / "p.qcow2", backing="o.qcow2")
    await refused(setup, tmp_path / "o.qcow2", f"{tmp_path}/p.qcow2 is built on it")


async def test_one_that_somebody_else_has_open(setup: Setup, tmp_path: Path) -> None:
    made = make(tmp_path / "o.qcow2")
    (tmp_path / "other").mkdir()
    with machine(tmp_path / "other", "-blockdev", blind(made).removeprefix("json:")) as other:
        async with qmpmerge.live(setup.machine.target) as target:
            with pytest.raises(InUse) as error:
                await qmpmerge.snapshot(target, {"vda": made}, reuse=True, force={"in-use"})
    assert str(other.process.pid) in str(error.value)


async def test_a_link_in_another_folder_must_lead_there_too(setup: Setup, tmp_path: Path) -> None:
    """QEMU resolves a relative name from the name that it is given."""
    make(tmp_path / "o.qcow2")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links/o.qcow2"
    link.symlink_to(tmp_path / "o.qcow2")
    await refused(setup, link, "its header names a.qcow2, and not")
    make(tmp_path / "o.qcow2", backing=f"{tmp_path}/a.qcow2")
    async with qmpmerge.live(setup.machine.target) as target:
        await qmpmerge.snapshot(target, {"vda": link}, reuse=True)


# --- what has data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["write -P 170 0 64k", "write -z 0 64k", "write -c -P 170 0 64k"])
async def test_one_that_has_something_of_its_own(setup: Setup, tmp_path: Path, write: str) -> None:
    made = make(tmp_path / "o.qcow2")
    run("qemu-io", "-c", write, blind(made))
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(OverlayNotEmpty) as error:
            await qmpmerge.snapshot(target, {"vda": made}, reuse=True)
    assert (error.value.held, error.value.exit_code) == (65536, 3)
    assert Path(made).exists()


def blind(overlay: str) -> str:
    """The overlay by itself: what is below it is in use."""
    return f'json:{{"driver":"qcow2","node-name":"o","backing":null,"file":{{"driver":"file","filename":"{overlay}"}}}}'


async def test_tables_alone_are_no_data(setup: Setup, tmp_path: Path) -> None:
    """As after a discard, or where clusters are there for later (`preallocation`)."""
    made = make(tmp_path / "o.qcow2", "-o", "extended_l2=on,preallocation=metadata,cluster_size=128k")
    assert not qcow2.is_empty(made)
    async with qmpmerge.live(setup.machine.target) as target:
        await qmpmerge.snapshot(target, {"vda": made}, reuse=True)
    setup.check()


@harm("overlay-not-empty", "the guest sees what the overlay holds in the place of what it has written")
def test_a_plain_snapshot_shows_other_data(setup: Setup, tmp_path: Path) -> None:
    made = make(tmp_path / "o.qcow2")
    run("qemu-io", "-c", "write -P 170 0 64k", blind(made))
    setup.check()
    take(setup, made)
    setup.machine.io("vda", "read -P 170 0 64k")


def take(setup: Setup, file: str) -> None:
    """As with plain QMP."""
    execute = setup.machine.session.execute
    active = execute("query-block")[0]["inserted"]["node-name"]
    execute("blockdev-add", driver="qcow2", node_name="o", backing=None, file={"driver": "file", "filename": file})
    execute("blockdev-snapshot", node=active, overlay="o")


@harm("not-an-overlay", "the next start of the VM shows another disk, or the disk shrinks under the guest")
def test_a_plain_snapshot_takes_any_image(setup: Setup, tmp_path: Path) -> None:
    made = make(tmp_path / "o.qcow2", backing="base.raw", form="raw", size=SIZE // 2)
    take(setup, made)
    (told,) = setup.machine.session.execute("query-block")
    assert told["inserted"]["image"]["virtual-size"] == SIZE // 2
    setup.off()
    run("qemu-io", "-c", f"read -P {0x10} {MIB} 64k", made)  # a.qcow2 has 0x11 there


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a mount namespace")
async def test_one_that_is_another_where_qemu_is(tmp_path: Path, images: list[Path]) -> None:
    """By TCP, so that nobody tells where that is: another file lies there under the name."""
    made, other = make(tmp_path / "o.qcow2"), make(tmp_path / "other.qcow2")
    run("qemu-io", "-c", "write -P 170 0 64k", blind(other))
    apart = ["unshare", "--mount", "sh", "-c", f'mount --bind {other} {made} && exec "$@"', "sh"]
    monitor = ["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"]
    disk = ["-drive", f"file={images[1]},format=qcow2,if=none,id=vda", "-device", "virtio-blk-pci,drive=vda"]
    with machine(tmp_path, *disk, *monitor, before=apart) as vm:
        (name,) = [one["filename"] for one in vm.session.execute("query-chardev") if "tcp:" in one["filename"]]
        async with qmpmerge.live(f"tcp:127.0.0.1:{re.findall('[0-9]+', name)[-1]}") as target:
            with pytest.raises(NotSeen):
                await qmpmerge.snapshot(target, {"vda": made}, reuse=True)
            assert len((await target.chain("vda")).chain) == 2


# --- all or none -----------------------------------------------------------------------------------------------------


async def test_a_transaction_that_fails_leaves_the_files(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path / "o.qcow2")

    async def failing(target: Target, orders: list[Order]) -> None:
        raise QemuRefused(command="transaction", reason="as if")

    monkeypatch.setattr(snapshot, "_transaction", failing)
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(QemuRefused):
            await qmpmerge.snapshot(target, {"vda": made}, reuse=True)
        assert not [node for node in (await target.layout()).nodes if node.startswith("qmpmerge")]
    assert qcow2.is_empty(made)


async def test_one_written_to_at_the_last_moment(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the checks, before QEMU had it open: it is looked at again when nobody else can write any more."""
    made, really = make(tmp_path / "o.qcow2"), reuse.backing_of

    async def then_written(*arguments: object) -> str:
        name = await really(*arguments)  # type: ignore[arg-type]
        run("qemu-io", "-c", "write -P 170 0 64k", blind(made))
        return name

    monkeypatch.setattr(reuse, "backing_of", then_written)
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(OverlayNotEmpty):
            await qmpmerge.snapshot(target, {"vda": made}, reuse=True)
        assert len((await target.chain("vda")).chain) == 2
    assert Path(made).exists()


async def test_one_bad_one_of_two(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "two").mkdir()
    others = make_chain(tmp_path / "two", ("base.raw",))
    more = ["-drive", f"file={others[0]},format=raw,if=none,id=vdb", "-device", "virtio-blk-pci,drive=vdb"]
    first = ["-drive", f"file={images[1]},format=qcow2,if=none,id=vda", "-device", "virtio-blk-pci,drive=vda"]
    files = {"vda": make(tmp_path / "o.qcow2"), "vdb": make(tmp_path / "two/o.qcow2", backing="nope.raw", form="raw")}
    with machine(tmp_path, *first, *more) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(NotAnOverlay):
                await qmpmerge.snapshot(target, files, reuse=True)
            assert [len(disk.chain or ()) for disk in await target.disks()] == [2, 1]
            files["vdb"] = make(tmp_path / "two/o.qcow2", backing="base.raw", form="raw")
            await qmpmerge.snapshot(target, files, reuse=True)
            assert [len(disk.chain or ()) for disk in await target.disks()] == [3, 2]


async def test_without_the_option_the_hint_names_it(setup: Setup, tmp_path: Path) -> None:
    made = make(tmp_path / "o.qcow2")
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(FileExists) as error:
            await qmpmerge.snapshot(target, {"vda": made})
        assert "`--reuse`" in error.value.hint
        run("qemu-io", "-c", "write -P 170 0 64k", blind(made))
        with pytest.raises(FileExists) as error:
            await qmpmerge.snapshot(target, {"vda": made})
        assert "--reuse" not in error.value.hint


# --- dry runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--reuse"]], ids=" ".join)
def test_a_dry_run_changes_nothing(tmp_path: Path, images: list[Path], content: Content, options: list[str]) -> None:
    made = make(tmp_path / "o.qcow2") if options else f"{tmp_path}/o.qcow2"
    with blockdev(tmp_path, images, content) as setup:
        graph = setup.machine.session.execute("x-debug-query-block-graph")
        before = seen(tmp_path)
        planned = invoke("snapshot", setup.machine.target, f"disk0={made}", *options, "--dry-run", "--json")
        text = invoke("snapshot", setup.machine.target, f"disk0={made}", *options, "--dry-run")
        assert seen(tmp_path) == before
        assert setup.machine.session.execute("x-debug-query-block-graph") == graph
        assert not [event for event in setup.machine.session.events if "JOB" in event["event"]]
    assert (planned.code, planned.document["verdict"], text.code) == (0, "planned", 0)
    assert planned.document["overlays"] == [
        {
            "disk": "disk0",
            "file": made,
            "node": None,
            "backing": "a.qcow2",
            "backing_file": str(images[1]),
        }
    ]
    assert text.out == f"disk0: {made} would be the active image, on {images[1]}\n"


def seen(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All files but those of the machine itself."""
    files = [file for file in folder.iterdir() if file.suffix in (".qcow2", ".raw") or file.name.startswith(".")]
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def test_a_dry_run_says_no_as_the_snapshot_would(setup: Setup, tmp_path: Path) -> None:
    for file, name in ((tmp_path / "a.qcow2", "file-exists"), (tmp_path / "none/o.qcow2", "cannot-create")):
        arguments = ("snapshot", setup.machine.target, f"vda={file}", "--json")
        dry, real = invoke(*arguments, "--dry-run"), invoke(*arguments)
        assert (dry.code, real.code) == (3, 3)
        assert dry.document["error"] == real.document["error"]
        assert real.document["error"]["name"] == name
    assert not list(tmp_path.glob("none*"))
