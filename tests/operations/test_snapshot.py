"""Overlays: all or none, never over an existing file, with headers that lead where they should."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig.command import invoke
from rig.disks import Setup, device, drive, remove
from rig.machines import MIB, SIZE, Content, Machine, machine, run

import qmpmerge
from qmpmerge.errors import (
    AgentFailed,
    CannotCreate,
    FileExists,
    NoSuchDisk,
    OptionsConflict,
    QemuRefused,
    Replaced,
    SessionLost,
)
from qmpmerge.folder import File
from qmpmerge.images import qemuimg
from qmpmerge.operations import snapshot
from qmpmerge.operations.orders import Order
from qmpmerge.targets.target import Target


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = tmp_path / "base.raw"
    run("qemu-img", "create", "-q", "-f", "raw", base, str(SIZE))
    return base


@pytest.fixture
def setup(tmp_path: Path, base: Path) -> Iterator[Setup]:
    with drive(tmp_path, [base], Content()) as setup:
        yield setup


@pytest.fixture
def two(tmp_path: Path, base: Path) -> Iterator[Machine]:
    """A machine with two disks, vda and vdb."""
    other = tmp_path / "other.raw"
    run("qemu-img", "create", "-q", "-f", "raw", other, str(SIZE))
    drives: list[str] = []
    for name, image in (("vda", base), ("vdb", other)):
        drives += ["-drive", f"file={image},format=raw,if=none,id={name}", "-device", f"virtio-blk-pci,drive={name}"]
    with machine(tmp_path, *drives) as vm:
        yield vm


async def unchanged(vm: Machine, *left: Path) -> None:
    """No overlay, no node, no file but those that were there."""
    async with qmpmerge.live(vm.target) as target:
        layout = await target.layout()
    assert all(disk.chain is not None and len(disk.chain) == 1 for disk in layout.disks)
    assert not [name for name in layout.nodes if name.startswith("qmpmerge")]
    assert sorted(vm.folder.glob("*.qcow2")) == sorted(left)


async def test_several_disks_at_once(two: Machine, tmp_path: Path) -> None:
    async with qmpmerge.live(two.target) as target:
        made = await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/a.qcow2", "vdb": f"{tmp_path}/b.qcow2"})
        assert [(overlay.disk, overlay.file) for overlay in made] == [
            ("vda", f"{tmp_path}/a.qcow2"),
            ("vdb", f"{tmp_path}/b.qcow2"),
        ]
        assert str((await target.chain("vda")).chain) == "base.raw <-- a.qcow2"
        assert str((await target.chain("vdb")).chain) == "other.raw <-- b.qcow2"


async def test_a_file_that_exists_is_never_overwritten(two: Machine, tmp_path: Path) -> None:
    taken = tmp_path / "taken.qcow2"
    taken.write_text("precious")
    async with qmpmerge.live(two.target) as target:
        with pytest.raises(FileExists):
            await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/a.qcow2", "vdb": str(taken)})
    assert taken.read_text() == "precious"
    await unchanged(two, taken)


def test_an_image_in_use_is_not_to_be_moved_away(setup: Setup, tmp_path: Path) -> None:
    """A daily snapshot under one name meets the active image, and the advice must not displace it under the guest."""
    order = f"{setup.disk}={tmp_path}/daily.qcow2"
    assert invoke("snapshot", setup.machine.target, order).code == 0
    again = invoke("snapshot", setup.machine.target, order, "--json").document["error"]
    assert again["name"] == "file-exists" and "move" not in again["hint"]
    (command,) = again["hint"].split("`")[1::2]
    assert "in-use" in {finding["name"] for finding in invoke(*command.split()[1:], "--json").document["findings"]}


@pytest.mark.parametrize("leads_to", ["nowhere", "precious"])
async def test_nor_is_a_symlink_followed(setup: Setup, tmp_path: Path, leads_to: str) -> None:
    (tmp_path / "precious").write_text("precious")
    link = tmp_path / "link.qcow2"
    link.symlink_to(tmp_path / leads_to)
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(FileExists):
            await qmpmerge.snapshot(target, {"vda": str(link)})
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


async def test_a_failing_transaction_leaves_nothing(
    two: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second disk is in use by a mirror that QEMU was told to make meanwhile."""
    real = snapshot._transaction

    async def meanwhile(target: Target, orders: list[Order]) -> None:
        root = orders[1].disk.root
        two.session.execute("blockdev-add", driver="null-co", node_name="sink", size=SIZE)
        two.session.execute("blockdev-mirror", job_id="j", device=root, target="sink", sync="full")
        await real(target, orders)

    monkeypatch.setattr(snapshot, "_transaction", meanwhile)
    async with qmpmerge.live(two.target) as target:
        with pytest.raises(QemuRefused, match="busy"):
            await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/a.qcow2", "vdb": f"{tmp_path}/b.qcow2"})
    two.session.execute("block-job-cancel", device="j", force=True)
    await unchanged(two)


async def test_an_overlay_that_qemu_cannot_open_leaves_nothing(
    two: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def not_an_image(file: File, **options: object) -> None:
        file.write(b"not an image")

    async with qmpmerge.live(two.target) as target:
        monkeypatch.setattr("qmpmerge.images.qemuimg.create_overlay", not_an_image)
        with pytest.raises(QemuRefused, match="blockdev-add"):
            await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/a.qcow2", "vdb": f"{tmp_path}/b.qcow2"})
    await unchanged(two)


@pytest.mark.parametrize("planted", ["root's", "fifo", "folder"])
@pytest.mark.parametrize("moment", ["create_overlay", "blockdev-add"])
async def test_a_name_that_is_given_to_another_file_is_not_written(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, planted: str
) -> None:
    """Right after the overlay's file was made, or once it is whole, just before QEMU opens it by its name."""
    victim, overlay, really = tmp_path / "root" / "victim", tmp_path / "a.qcow2", qemuimg.create_overlay
    victim.parent.mkdir()
    victim.write_text("precious")
    victim.chmod(0o600)
    before = victim.stat()

    def swap() -> None:
        overlay.rename(tmp_path / "moved")
        os.mkfifo(overlay) if planted == "fifo" else overlay.symlink_to(
            victim if planted == "root's" else victim.parent
        )

    async def swapping(file: File, **options: Any) -> None:
        if moment == "create_overlay":
            swap()
        await really(file, **options)
        if moment == "blockdev-add":
            swap()

    monkeypatch.setattr(qemuimg, "create_overlay", swapping)
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises((QemuRefused, Replaced)):
            await qmpmerge.snapshot(target, {"vda": str(overlay)})
        assert str((await target.chain()).chain) == "base.raw"
    now = victim.stat()
    assert victim.read_text() == "precious"
    assert (now.st_mode, now.st_uid, now.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_mtime_ns)
    assert overlay.is_symlink() or overlay.is_fifo()


async def test_nothing_is_removed_when_the_outcome_is_unknown(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session ends after QEMU got the command: the guest may write to the overlay by now."""

    async def lost(target: Target, orders: list[Order]) -> None:
        raise SessionLost(target=target.name, command="transaction", reason="as if")

    monkeypatch.setattr(snapshot, "_transaction", lost)
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(SessionLost):
            await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/a.qcow2"})
    assert (tmp_path / "a.qcow2").exists()


async def test_one_overlay_a_disk_and_one_disk_an_overlay(two: Machine, tmp_path: Path) -> None:
    async with qmpmerge.live(two.target) as target:
        with pytest.raises(FileExists):
            await qmpmerge.snapshot(
                target, {"vda": f"{tmp_path}/a.qcow2", "vdb": f"{tmp_path}/../{tmp_path.name}/a.qcow2"}
            )
        with pytest.raises(OptionsConflict):
            await qmpmerge.snapshot(
                target, {"vda": f"{tmp_path}/a.qcow2", f"{tmp_path}/base.raw": f"{tmp_path}/b.qcow2"}
            )
        with pytest.raises(NoSuchDisk):
            await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/a.qcow2", "vdz": f"{tmp_path}/b.qcow2"})
    await unchanged(two)


async def test_no_folder(setup: Setup, tmp_path: Path) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(CannotCreate, match="No such file"):
            await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/none/a.qcow2"})
    await unchanged(setup.machine)


@pytest.mark.parametrize(("folder", "written"), [(".", "base.raw"), ("sub", "{}/base.raw")])
async def test_backing_names(setup: Setup, tmp_path: Path, folder: str, written: str) -> None:
    (tmp_path / "sub").mkdir()
    async with qmpmerge.live(setup.machine.target) as target:
        await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/{folder}/a.qcow2"})
        view = await target.chain("vda")
    assert (view.chain.active.backing, view.chain.active.backing_format) == (written.format(tmp_path), "raw")
    assert not view.oddities
    run("qemu-img", "info", "-U", "--backing-chain", tmp_path / folder / "a.qcow2")


async def test_a_relative_file_is_relative_to_the_tool(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    async with qmpmerge.live(setup.machine.target) as target:
        (overlay,) = await qmpmerge.snapshot(target, {"vda": "a.qcow2"})
    assert overlay.file == f"{tmp_path}/here/a.qcow2"


@pytest.mark.parametrize(
    "name", ["sp ace,comma.qcow2", "a:b.qcow2", "-dash.qcow2", "new\nline.qcow2", "quote'\"%.qcow2"]
)
async def test_odd_names(setup: Setup, tmp_path: Path, name: str) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        await qmpmerge.snapshot(target, {"vda": str(tmp_path / name)})
        setup.write(0x31, MIB, MIB)
        await qmpmerge.snapshot(target, {"vda": str(tmp_path / f"2{name}")})
        view = await target.chain("vda")
        assert (view.chain.files, view.oddities) == (
            [str(tmp_path / part) for part in ("base.raw", name, f"2{name}")],
            (),
        )
        outcome = await qmpmerge.commit(target, "vda", top="[2]")
        assert outcome.verdict == "merged"
        remove(outcome)
        assert (await qmpmerge.commit(target, "vda")).verdict == "pivoted"
    setup.check()


async def test_the_overlay_has_owner_mode_size_and_cache_of_the_image_below(tmp_path: Path, base: Path) -> None:
    base.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(base, 65534, 65534)
    disk = ["-drive", f"file={base},format=raw,if=none,id=vda,cache=none,detect-zeroes=on", *device("vda")]
    with machine(tmp_path, *disk) as vm:
        vm.session.execute("block_resize", device="vda", size=SIZE + MIB)
        async with qmpmerge.live(vm.target) as target:
            (overlay,) = await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/a.qcow2"})
            told = (await target.layout()).nodes[overlay.node or ""].info
    made = os.stat(overlay.file)
    assert stat.S_IMODE(made.st_mode) == 0o640
    assert made.st_uid == base.stat().st_uid
    assert told["image"]["virtual-size"] == SIZE + MIB
    assert (told["cache"]["direct"], told["detect_zeroes"]) == (True, "on")


async def test_an_image_of_a_vm_that_was_started_stale(setup: Setup, tmp_path: Path) -> None:
    """The VM writes to what another image is built on: with the overlay that ends, so it is told and not refused."""
    newer = tmp_path / "newer.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "base.raw", "-F", "raw", newer, str(SIZE))
    empty = invoke("snapshot", setup.machine.target, f"vda={tmp_path}/a.qcow2", "--dry-run", "--json")
    assert empty.document["hints"] == []
    blind = f'{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{newer}"}}}}'
    run("qemu-io", "-c", "write 0 64k", f"json:{blind}")
    for options in (["--dry-run"], []):
        told = invoke("snapshot", setup.machine.target, f"vda={tmp_path}/a.qcow2", *options, "--json")
        (hint,) = told.document["hints"]
        assert (told.code, f"{newer} is built on {tmp_path}/base.raw too" in hint) == (0, True)
        (command,) = hint.split("`")[1::2]
        found = invoke(*command.split()[1:], "--json").document["findings"]
        assert "started-stale" in {finding["name"] for finding in found}


async def test_an_agent_that_is_not_there_means_no_snapshot(setup: Setup, tmp_path: Path) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(AgentFailed):
            await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/a.qcow2"}, quiesce=f"{tmp_path}/no-agent")
    await unchanged(setup.machine)
