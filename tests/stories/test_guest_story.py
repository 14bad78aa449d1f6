"""
The classic story on a real guest that never stops writing: nothing that it was told is safe may be missing.

SIGKILL of QEMU is not power loss: the host's page cache survives it.
"""

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from rig.disks import nodes
from rig.guests import Guest, GuestFailed, Writer, check_image, guest
from rig.harms import harm
from rig.machines import MIB, run

import qmpmerge
from qmpmerge.errors import SessionLost
from qmpmerge.qemu import flush, jobs

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]
SEED = 20
SIZE = 64 * MIB


def disk(kind: str, base: Path) -> list[str]:
    """A disk called ``vda`` by QEMU."""
    if kind == "drive":
        form = base.suffix.removeprefix(".")
        drive = f"file={base},format={form},if=none,id=vda,discard=unmap"
        return ["-drive", drive, "-device", "virtio-blk-pci,drive=vda"]
    if kind == "iothread":
        return [
            *explicit(base),
            "-object",
            "iothread,id=io",
            "-device",
            f"virtio-blk-pci,iothread=io,drive={base.stem},id=vda",
        ]
    iothread = ["-object", "iothread,id=io", "-device", "virtio-scsi-pci,iothread=io"]
    return [*explicit(base), *iothread, "-device", f"scsi-hd,drive={base.stem},id=vda"]


def explicit(base: Path) -> list[str]:
    return [part.replace("file,node", "file,discard=unmap,node") for part in nodes([base])]


def three_disks(folder: Path, *, iothread: bool) -> list[Sequence[str]]:
    """``one`` by -drive, ``two`` and ``three`` by -blockdev; the last on virtio-scsi, in an iothread if asked for."""
    bases = {name: folder / f"{name}.raw" for name in ("one", "two", "three")}
    for base in bases.values():
        run("qemu-img", "create", "-q", "-f", "raw", base, str(SIZE))
    scsi = ["-object", "iothread,id=io", "-device", f"virtio-scsi-pci{',iothread=io' if iothread else ''}"]
    return [
        [
            "-drive",
            f"file={bases['one']},format=raw,if=none,id=one,discard=unmap",
            "-device",
            "virtio-blk-pci,drive=one",
        ],
        [*explicit(bases["two"]), "-device", "virtio-blk-pci,drive=two,id=disk-two"],
        [*explicit(bases["three"]), *scsi, "-device", "scsi-hd,drive=three,id=disk-three"],
    ]


PLACES = {"one": "/dev/vda", "disk-two": "/mnt/file", "disk-three": "/dev/sda"}
"""Where the guest writes on each disk: the second one has a file system."""


@pytest.mark.parametrize("iothread", [False, True])
async def test_the_story_on_three_disks_while_the_guest_writes(iothread: bool, tmp_path: Path) -> None:
    async with guest(three_disks(tmp_path, iothread=iothread)) as vm:
        await vm.run("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt && truncate -s 8M /mnt/file")
        writers = [await vm.start_writer(place, SEED, rate=300) for place in PLACES.values()]
        await advance(writers)
        async with qmpmerge.live(vm.monitor) as target:
            for layer in "abc":
                overlays = {name: str(tmp_path / f"{name}-{layer}.qcow2") for name in PLACES}
                await qmpmerge.snapshot(target, overlays, quiesce=layer == "b")
                await advance(writers)
            # What is below b was frozen, what is below c was not.
            assert not has_a_journal_to_replay(tmp_path / "disk-two-a.qcow2")
            assert has_a_journal_to_replay(tmp_path / "disk-two-b.qcow2")
            for top, depth in (("[3]", 2), (None, 1)):
                outcomes = await asyncio.gather(*(qmpmerge.commit(target, name, top=top) for name in PLACES))
                assert [len(outcome.after) for outcome in outcomes] == [depth] * 3
                await advance(writers)
        last = [await writer.stop() for writer in writers]
        for place, number in zip(PLACES.values(), last, strict=True):
            assert (await vm.check(place, SEED, number, issued=number)).clean
        await vm.run("umount /mnt && e2fsck -fn /dev/vdb")
    for name, number in (("one", last[0]), ("three", last[2])):
        verdict = await check_image(tmp_path / f"{name}.raw", SEED, number, form="raw", issued=number)
        assert verdict.clean, verdict.said


async def advance(writers: Sequence[Writer]) -> None:
    await asyncio.gather(*(writer.advance(50) for writer in writers))


def has_a_journal_to_replay(image: Path) -> bool:
    """Whether the ext4 that an image shows was in use: the incompatible feature `recover` (0x4) of its superblock."""
    view = f"{image}.view"
    run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, view)
    superblock = Path(view).read_bytes()[1024:2048]
    assert superblock[0x38:0x3A] == b"\x53\xef"
    return bool(superblock[0x60] & 0x4)


@pytest.mark.parametrize("top", ["[3]", None])
async def test_a_guest_killed_in_the_middle_of_a_merge_goes_on_from_its_chain(top: str | None, tmp_path: Path) -> None:
    base, active = tmp_path / "base.raw", tmp_path / "c.qcow2"
    run("qemu-img", "create", "-q", "-f", "raw", base, str(SIZE))
    async with guest([disk("drive", base)], agent=False) as vm:
        writer = await vm.start_writer("/dev/vda", SEED + 1)
        await writer.advance(100)
        async with qmpmerge.live(vm.monitor) as target:
            for name in ("a.qcow2", "b.qcow2", "c.qcow2"):
                await qmpmerge.snapshot(target, {"vda": str(tmp_path / name)})
                await writer.advance(100)
            with pytest.raises(qmpmerge.errors.StillRunning):
                await qmpmerge.commit(target, "vda", top=top, speed=1024, patience=qmpmerge.Patience(detach=True))
        await writer.advance(100)
        await vm.kill()
    verdict = await check_image(active, SEED + 1, writer.acknowledged)
    assert verdict.clean, verdict.said

    async with guest([disk("drive", active)], agent=False) as vm:
        assert (await vm.check("/dev/vda", SEED + 1, writer.acknowledged)).clean
        last = await write_on(vm, writer.acknowledged)
        async with qmpmerge.live(vm.monitor) as target:
            outcome = await qmpmerge.commit(target, "vda", top=top)
        last = await write_on(vm, last)
    verdict = await check_image(Path(outcome.after.active.file), SEED + 1, last, form=outcome.after.active.format)
    assert verdict.clean, verdict.said


async def write_on(vm: Guest, acknowledged: int) -> int:
    """Go on where a writer ended, past all that it may have had in flight."""
    writer = await vm.start_writer("/dev/vda", SEED + 1, first=acknowledged + 1)
    await writer.advance(600)
    return await writer.stop()


async def test_pulls_while_the_guest_writes_in_an_iothread(tmp_path: Path) -> None:
    """Into the middle and into the active image, then killed: all that was acknowledged is there."""
    base, active = tmp_path / "base.raw", tmp_path / "c.qcow2"
    run("qemu-img", "create", "-q", "-f", "raw", base, str(SIZE))
    async with guest([disk("iothread", base)], agent=False) as vm:
        writer = await vm.start_writer("/dev/vda", SEED + 4)
        await writer.advance(100)
        async with qmpmerge.live(vm.monitor) as target:
            for name in ("a.qcow2", "b.qcow2", "c.qcow2"):
                await qmpmerge.snapshot(target, {"vda": str(tmp_path / name)})
                await writer.advance(100)
            for top, base_name, depth in (("[3]", "[1]", 3), (None, None, 1)):
                outcome = await qmpmerge.pull(target, "vda", top=top, base=base_name)
                assert (outcome.verdict, len(outcome.after)) == ("pulled", depth)
                await writer.advance(100)
        await vm.kill()
    verdict = await check_image(active, SEED + 4, writer.acknowledged)
    assert verdict.clean, verdict.said


@pytest.mark.parametrize("kind", ["drive", "scsi", "iothread"])
async def test_asking_for_a_flush_again_and_again_does_no_harm_to_a_busy_guest(kind: str, tmp_path: Path) -> None:
    """
    Each comes with a graph that is changed and I/O that is drained. An NBD export did harm on 7.2, once in some 40 times; here
    are 180 of them in all.
    """
    base = tmp_path / "base.raw"
    run("qemu-img", "create", "-q", "-f", "raw", base, str(SIZE))
    async with guest([disk(kind, base)], agent=False) as vm:
        writer = await vm.start_writer("/dev/sda" if kind == "scsi" else "/dev/vda", SEED + 2)
        await writer.advance(50)
        async with qmpmerge.live(vm.monitor) as target:
            chain = (await target.disk()).chain
            assert chain is not None
            for _ in range(60):
                await flush.check(target.monitor, chain.base)
                await flush.flush(target.monitor, chain.base)
        await writer.advance(50)
        last = await writer.stop()
    assert (await check_image(base, SEED + 2, last, form="raw")).clean


@harm("known-bad", "QEMU 7.2 aborts with its guest")
async def test_plain_pivot_of_a_busy_nvme_disk(tmp_path: Path) -> None:
    """At one of the first pivots, if a write is under way just then; 10.0 and 11.1 never do. Nothing is lost."""
    base, top = tmp_path / "base.raw", tmp_path / "0.qcow2"
    run("qemu-img", "create", "-q", "-f", "raw", base, str(SIZE))
    disk = ["-drive", f"file={base},format=raw,if=none,id=n0", "-device", "nvme,drive=n0,id=disk0,serial=1"]
    async with guest([disk], agent=False) as vm:
        writer = await vm.start_writer("/dev/nvme0n1", SEED + 3)
        with contextlib.suppress(SessionLost, GuestFailed):
            async with qmpmerge.live(vm.monitor) as target:
                is_bad = target.monitor.version < (10, 0, 0)
                for number in range(30 if is_bad else 3):
                    top = tmp_path / f"{number}.qcow2"
                    (overlay,) = await qmpmerge.snapshot(target, {"n0": str(top)})
                    await writer.advance(100)
                    await plain_pivot(target)
                    await target.monitor.execute("blockdev-del", node_name=overlay.node)
                    await writer.advance(50)
        if not is_bad:
            assert vm.process.returncode is None
            return
        assert await asyncio.wait_for(vm.process.wait(), 60) == -signal.SIGABRT
    verdict = await check_image(top, SEED + 3, writer.acknowledged)
    assert verdict.clean, verdict.said


async def plain_pivot(target: qmpmerge.Target) -> None:
    await target.monitor.execute("block-commit", device="n0", job_id="j", auto_dismiss=False)
    async with target.monitor.listening() as doorbell:
        await jobs.follow(target.monitor, doorbell, "j", ("ready",), tell=lambda job: None)
        await target.monitor.execute("job-complete", id="j")
        await jobs.follow(target.monitor, doorbell, "j", ("concluded",), tell=lambda job: None)
        await target.monitor.execute("job-dismiss", id="j")
