"""A pull where a disk is not alone: in an iothread, on the network, on a golden base, between filters."""

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rig import faults
from rig.disks import BACKEND, Setup, device, drive, form, nbd_server, nodes, storage_daemon
from rig.machines import MIB, Content, machine, run
from rig.pulls import RANGES, slow, version_of, views

import qmpmerge
from qmpmerge.errors import FlushUnavailable, JobFailed

FEW = ["whole", "middle-partial"]


async def pulled(setup: Setup, asked: str) -> qmpmerge.Outcome:
    """What is asked for, done; and the guest, and a fresh look, see nothing odd."""
    options, expected = RANGES[asked]
    async with setup.target() as target:
        outcome = await qmpmerge.pull(target, setup.disk, **options)
        assert not (await target.chain(setup.disk)).oddities
    assert (outcome.verdict, len(outcome.after)) == ("pulled", len(expected.split(" <-- ")))
    setup.check()
    return outcome


# --- iothreads --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scsi(folder: Path, images: Sequence[Path], content: Content) -> Iterator[Setup]:
    """In an iothread from the start, where virtio-blk would wait for its guest's driver: see `test_guest_story`."""
    bus = ["-object", "iothread,id=io", "-device", "virtio-scsi-pci,iothread=io"]
    disk = ["-device", f"scsi-hd,drive={images[-1].stem},id=disk0"]
    with machine(folder, *nodes(images), *bus, *disk) as vm:
        yield Setup(vm, "disk0", content, lambda command: vm.io("/machine/peripheral/disk0", command))


@pytest.mark.parametrize("asked", FEW)
async def test_a_disk_in_an_iothread(asked: str, tmp_path: Path, images: list[Path], content: Content) -> None:
    before = views(images)
    with scsi(tmp_path, images, content) as setup:
        await pulled(setup, asked)
        setup.off()
    assert views(images) == before
    content.check(images[3])


async def test_an_export_in_an_iothread(tmp_path: Path, images: list[Path], content: Content) -> None:
    """QEMU 7.2 aborted when it was asked whether it can flush: it is not asked."""
    with storage_daemon(tmp_path, images, content, iothread=True) as setup:
        if version_of(setup.machine) >= (10, 0):
            await pulled(setup, "partial")
            return
        async with setup.target() as target:
            for merge in (qmpmerge.pull, qmpmerge.commit):
                with pytest.raises(FlushUnavailable, match="iothread"):
                    await merge(target, top="[3]")
        await faults.untouched(setup.machine)
        setup.off()
    async with qmpmerge.open(images[3]) as target:  # what the hint says
        assert (await qmpmerge.pull(target, base="[1]")).verdict == "pulled"
    content.check(images[3])


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "read_only"), [("whole", False), ("partial", True), ("middle-partial", True)])
async def test_a_base_on_the_network(
    asked: str, read_only: bool, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """It is only read."""
    with nbd_server(tmp_path, images[0], read_only=read_only) as uri:
        run("qemu-img", "rebase", "-uf", "qcow2", "-b", uri, "-F", "raw", images[1])
        before = views(images[1:])
        with drive(tmp_path, images, content) as setup:
            outcome = await pulled(setup, asked)
            setup.off()
        assert views(images[1:]) == before
        assert outcome.after.base.backing is None
        assert outcome.after.active.backing == {"whole": None, "partial": uri}.get(asked, "b.qcow2")
        content.check(images[3])
    if asked == "whole":
        content.check(images[3])  # without its server


async def test_a_base_whose_server_dies(tmp_path: Path, images: list[Path], content: Content) -> None:
    with contextlib.ExitStack() as server:
        uri = server.enter_context(nbd_server(tmp_path, images[0]))
        run("qemu-img", "rebase", "-uf", "qcow2", "-b", uri, "-F", "raw", images[1])
        with drive(tmp_path, images, content) as setup:
            async with slow(setup) as pull:
                server.close()
                with pytest.raises(JobFailed, match="Input/output error"):
                    setup.machine.session.ask("block-job-set-speed", device="qmpmerge-pull-vda", speed=0)
                    await pull
            assert not setup.machine.session.execute("query-jobs")
    with nbd_server(tmp_path, images[0]):
        content.check(images[3])


async def test_an_overlay_on_the_network(tmp_path: Path, images: list[Path], content: Content) -> None:
    """What is pulled into lies on a server, which has room for it."""
    run("qemu-img", "rebase", "-uf", "qcow2", "-b", images[2], "-F", "qcow2", images[3])
    with images[3].open("ab") as file:
        file.truncate(16 * MIB)
    with nbd_server(tmp_path, images[3], served_as="raw") as uri:
        disk = ["-drive", f"file={uri},format=qcow2,if=none,id=vda", *device("vda")]
        with machine(tmp_path, *disk) as vm:
            await pulled(Setup(vm, "vda", content, lambda command: vm.io("vda", command)), "partial")
            vm.stop()
    content.check(images[3])


# --- a golden base ----------------------------------------------------------------------------------------------------


async def test_a_golden_base_that_others_run_on(tmp_path: Path) -> None:
    """
    They run on, see what they saw, and more can be started meanwhile; nobody may write to the base. What they need keeps its
    name, also where another VM runs on what was this one's alone.
    """
    golden, folders = tmp_path / "golden", [tmp_path / name for name in ("one", "two", "three")]
    for folder in (golden, *folders):
        folder.mkdir()
    base, contents = golden / "base.raw", [Content() for _ in folders]
    run("qemu-img", "create", "-qf", "raw", base, str(8 * MIB))
    run("qemu-io", "-f", "raw", "-c", "write -P 16 0 4M", base)
    below: dict[Path, Path | str] = {
        folders[0] / "a.qcow2": base,
        folders[0] / "b.qcow2": "a.qcow2",
        folders[0] / "c.qcow2": "b.qcow2",
        folders[1] / "c.qcow2": folders[0] / "a.qcow2",
        folders[2] / "c.qcow2": base,
    }
    for image, backing in below.items():
        run("qemu-img", "create", "-qf", "qcow2", "-b", backing, "-F", form(Path(backing)), image)
    before = faults.digests(golden)
    with contextlib.ExitStack() as vms:
        for content in contents:
            content.put(16, 0, 4 * MIB)
        one, two = (vms.enter_context(drive(folders[n], [folders[n] / "c.qcow2"], contents[n])) for n in (0, 1))
        async with slow(one, merged_files="stash") as pull:
            three = vms.enter_context(drive(folders[2], [folders[2] / "c.qcow2"], contents[2]))
            for number, setup in enumerate((one, two, three)):
                setup.write(0x40 + number, 3 * MIB, MIB)
            write = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 4k", base], capture_output=True, check=False)
            assert b"lock" in write.stderr
            one.machine.session.execute("block-job-set-speed", device="qmpmerge-pull-vda", speed=0)
            outcome = await pull
        for setup in (one, two, three):
            setup.check()
    assert [(Path(file.file).name, file.action) for file in outcome.merged] == [
        ("base.raw", "keep"),
        ("a.qcow2", "keep"),
        ("b.qcow2", "stash"),
    ]
    assert (faults.digests(golden), [file.name for file in golden.iterdir()]) == (before, ["base.raw"])
    for folder, content in zip(folders, contents, strict=True):
        content.check(folder / "c.qcow2")


# --- filters ----------------------------------------------------------------------------------------------------------


def filtered(images: Sequence[Path]) -> list[str]:
    """A chain with a throttle above each image: ``a-throttle``."""
    arguments = []
    for part in nodes(images):
        node, _, below = part.partition(",backing=")
        arguments.append(f"{node},backing={below.partition(',')[0]}-throttle,read-only=on" if below else part)
    arguments[-1] = arguments[-1].removesuffix(",read-only=on")
    for index, image in reversed(list(enumerate(images))):
        read_only = "" if image == images[-1] else ",read-only=on"
        node = f"throttle,node-name={image.stem}-throttle,throttle-group=limits,file={image.stem}{read_only}"
        arguments[4 * index + 4 : 4 * index + 4] = ["-blockdev", node]
    return ["-object", "throttle-group,id=limits,x-iops-total=100000", *arguments, *device("c-throttle")]


@pytest.mark.parametrize("asked", ["whole", "shallow", "middle-partial"])
async def test_filters_between_the_images(asked: str, tmp_path: Path, images: list[Path], content: Content) -> None:
    before = views(images)
    with machine(tmp_path, *filtered(images)) as vm:
        setup = Setup(vm, "disk0", content, lambda command: vm.io(BACKEND, command))
        outcome = await pulled(setup, asked)
        async with setup.target() as target:
            assert (await target.disk()).root == "c-throttle"
        assert [hint for hint in outcome.hints if "a filter above what was merged" in hint]
        vm.stop()
    assert views(images) == before
    content.check(images[3])
