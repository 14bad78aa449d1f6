"""
The safe pull: in every way to a disk, with every image's own view as it was; and the harm of a plain `block-stream` beside.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import advice, faults
from rig.command import invoke
from rig.devices import mounted
from rig.disks import BACKEND, WAYS, Setup, blockdev, device, drive, nodes, storage_daemon
from rig.harms import harm
from rig.machines import MIB, Content, fill, machine, make_chain, run
from rig.pulls import JOB, RANGES, slow, stream, version_of, views

import qmpmerge
from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.engine import blockjob, safeguards
from qmpmerge.engine.pace.progress import Progress
from qmpmerge.engine.pull import Pull
from qmpmerge.engine.run import Run
from qmpmerge.errors import (
    Busy,
    Damaged,
    Dependents,
    Doubtful,
    HeaderNotDurable,
    InUse,
    JobFailed,
    KnownBad,
    MaybeDamaged,
    NoSpace,
    NotDurable,
    NotSeen,
    NotWritable,
    Replaced,
    ShorterLayer,
    StillRunning,
    WouldLose,
)
from qmpmerge.images import space
from qmpmerge.journal import locks
from qmpmerge.journal.spared import NOT_COMPARED
from qmpmerge.qemu import bitmaps, jobs
from qmpmerge.qemu.monitor import Doorbell


@pytest.mark.parametrize("asked", RANGES)
@pytest.mark.parametrize("kind", WAYS)
async def test_pull(kind: str, asked: str, tmp_path: Path, images: list[Path], content: Content) -> None:
    options, expected = RANGES[asked]
    before = views(images)
    with WAYS[kind](tmp_path, images, content) as setup:
        async with setup.target() as target:
            outcome = await qmpmerge.pull(target, setup.disk, **options)
        assert (outcome.verdict, str(outcome.after)) == ("pulled", expected)
        names = [image.backing for image in outcome.after]
        assert names == [None, *[image.name for image in outcome.after.images[:-1]]]
        assert {(one.action, one.now) for one in outcome.merged} == {("keep", one.file) for one in outcome.merged}
        assert not [hint for hint in outcome.hints if "still open" in hint]
        setup.check()
        setup.off()
    assert views(images) == before
    content.check(images[-1])
    left = [file.name for file in tmp_path.iterdir() if "qmpmerge" in file.name]
    assert all(name.endswith(".qmpmerge-pulled") for name in left), left


async def test_the_guest_writes_on(setup: Setup, images: list[Path], content: Content) -> None:
    """All the while, and what it writes is no reason to find that something is missing."""
    async with slow(setup) as pull:
        setup.machine.session.execute("block-job-set-speed", device=JOB, speed=0)
        number = 0
        while not pull.done() or not number:
            await asyncio.to_thread(setup.write, 1 + number % 255, number % 120 * 64 * 1024, 64 * 1024)
            number += 1
        assert (await pull).verdict == "pulled"
    setup.write(0x67, 5 * MIB, 64 * 1024)
    setup.check()
    setup.machine.stop()
    content.check(images[3])


async def test_a_running_vm_on_the_same_images_is_left_alone(tmp_path: Path) -> None:
    """Others are built on them, and run: a commit is refused there."""
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    other = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", "b.qcow2", "-F", "qcow2", other)
    (tmp_path / "second").mkdir()
    theirs = views([other])
    with (
        machine(tmp_path / "second", "-drive", f"file={other},if=none,id=vda", *device("vda")) as second,
        drive(tmp_path, images, content) as setup,
    ):
        async with setup.target() as target:
            assert (await qmpmerge.pull(target)).verdict == "pulled"
        setup.check()
        assert second.process.poll() is None
    assert views([other]) == theirs
    content.check(images[3])


# --- durable before the switch ----------------------------------------------------------------------------------------


async def test_killed_right_after_a_pull_nothing_is_lost(setup: Setup, images: list[Path], content: Content) -> None:
    async with setup.target() as target:
        await qmpmerge.pull(target)
    setup.machine.kill()
    content.check(images[3])


@harm("flush-unavailable", "a pulled image misses what QEMU has in memory alone when it says that it is done")
def test_killed_right_after_a_plain_block_stream_data_is_lost(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    with blockdev(tmp_path, images, content) as setup:
        stream(setup.machine, device="c", auto_dismiss=False)
        setup.machine.kill()
    with pytest.raises(AssertionError, match="differs"):
        content.check(images[3])


FLUSH_FAILS = "inject-error.0.event=none,inject-error.0.iotype=flush,inject-error.0.errno=5"


async def test_an_image_that_cannot_be_flushed_stops_the_pull(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    with machine(tmp_path, *faults.injecting(images, "c", FLUSH_FAILS)) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(NotDurable, match="Input/output error"):
                await qmpmerge.pull(target)
        await faults.untouched(vm)
        vm.stop()
    run("qemu-img", "check", "-q", "-r", "leaks", images[3])  # what was copied and cannot be given back
    content.check(images[3])
    async with qmpmerge.offline(images[3]) as target:
        outcome = await qmpmerge.pull(target, merged_files="delete")
    assert {one.action for one in outcome.merged} == {"keep"} and not outcome.verified, "they may hold what was lost"
    assert any(hint.startswith("not checked: ") and "keep what lay below it" in hint for hint in outcome.hints)
    content.check(images[3])


async def test_an_image_whose_header_cannot_be_written_is_refused(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    failing = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28"
    with machine(tmp_path, *faults.injecting(images, "c", failing)) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(NotWritable, match="No space left"):
                await qmpmerge.pull(target)
        await faults.untouched(vm)
        vm.stop()
    content.check(images[3])


def failing_at_the_end(times: int) -> str:
    """The first so many writes of the header once something was copied."""
    rule = "inject-error.{0}.event=cluster_alloc,inject-error.{0}.iotype=write,inject-error.{0}.sector=0,"
    return ",".join(f"{rule}inject-error.{{0}}.once=on".format(number) for number in range(times))


async def test_a_header_that_fails_at_the_end_is_written_once_more(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """QEMU uses the new chain by then: at once, or where that fails too, when somebody comes to recover."""
    with machine(tmp_path, *faults.injecting(images, "c", failing_at_the_end(2))) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(HeaderNotDurable, match="Input/output error"):
                await qmpmerge.pull(target, base="[2]")
        assert invoke("recover", str(images[3])).code == 0
        vm.kill()
    content.check(images[3])
    async with qmpmerge.offline(images[3]) as target:
        assert str((await target.chain()).chain) == "base.raw <-- a.qcow2 <-- c.qcow2"


async def test_a_header_that_qemu_cannot_write_any_more_is_put_right_with_the_vm_off(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """It refuses to, where nothing is left below: the graph has changed, the header is the old one, both show the same."""
    way_out = f"with the VM off `qmpmerge recover {images[3]}` ends this"
    with machine(tmp_path, *faults.injecting(images, "c", failing_at_the_end(1))) as vm:
        async with qmpmerge.live(vm.target) as target:
            for _ in range(2):
                with pytest.raises(HeaderNotDurable, match=re.escape(way_out)):
                    await qmpmerge.pull(target)
        told = invoke("recover", str(images[3]))
        assert (told.code, way_out in told.err) == (6, True)
        vm.stop()
    assert invoke("recover", str(images[3])).code == 0
    content.check(images[3])
    async with qmpmerge.offline(images[3]) as target:
        assert (await qmpmerge.pull(target)).verdict == "pulled"
    content.check(images[3])


async def test_a_read_error_fails_the_job_and_leaves_the_chain(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """The job is gone before anybody can ask it why."""
    failing = "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,inject-error.0.sector=0"
    with machine(tmp_path, *faults.injecting(images, "base", failing)) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(JobFailed, match="Input/output error"):
                await qmpmerge.pull(target)
        await faults.untouched(vm)
        vm.stop()
    content.check(images[3])


@pytest.mark.parametrize(("kind", "ends"), [("blockdev", "done"), ("blockdev", "cancelled"), ("drive", "done")])
async def test_a_middle_image_is_not_left_open_for_writing(
    kind: str, ends: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """As QEMU 11.1 does: nobody else could start on it. Its node keeps the options that it was given."""
    with WAYS[kind](tmp_path, images, content) as setup:
        async with slow(setup, top="[3]") as pull:
            if ends == "cancelled":
                pull.cancel()
            else:
                (job,) = setup.machine.session.execute("query-block-jobs")
                setup.machine.session.execute("block-job-set-speed", device=job["device"], speed=0)
            with pytest.raises(asyncio.CancelledError) if ends == "cancelled" else contextlib.nullcontext():
                await pull
        (tmp_path / "second").mkdir()
        overlay = tmp_path / "other.qcow2"
        run("qemu-img", "create", "-qf", "qcow2", "-b", "b.qcow2", "-F", "qcow2", overlay)
        theirs = ["-drive", f"file={overlay},if=none,id=vda", *device("vda")]
        with machine(tmp_path / "second", *theirs):  # it does not start where somebody has b open for writing
            setup.check()
        async with setup.target() as target:
            assert (await qmpmerge.pull(target, top="[-2]")).verdict in ("pulled", "unchanged"), (
                "it can be written again"
            )


async def test_the_options_of_a_middle_node_stay(tmp_path: Path, images: list[Path]) -> None:
    explicit = [
        f"{part},detect-zeroes=unmap,discard=unmap" if "node-name=b," in part else part for part in nodes(images)
    ]
    with machine(tmp_path, *explicit, *device("c")) as vm:
        async with qmpmerge.live(vm.target) as target:
            assert (await qmpmerge.pull(target, base="[1]", top="[3]")).verdict == "pulled"
        (node,) = [one for one in vm.session.execute("query-named-block-nodes", flat=True) if one["node-name"] == "b"]
        assert (node["ro"], node["detect_zeroes"]) == (True, "unmap")


async def test_a_node_for_reading_alone_is_told_how_it_is_opened(tmp_path: Path, images: list[Path]) -> None:
    explicit = [part.replace("auto-read-only", "read-only") if "b-file" in part else part for part in nodes(images)]
    with machine(tmp_path, *explicit, *device("c")) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(NotWritable, match="is read-only") as refused:
                await qmpmerge.pull(target, top="[3]")
        assert "`auto-read-only=on`" in refused.value.hint and "chattr" not in refused.value.hint


# --- what was copied is compared ----------------------------------------------------------------------------------------


def at_pending(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do this once what was copied is durable, and before it is compared."""
    flushed = safeguards.make_receiver_durable

    async def acting(run: Run, doorbell: Doorbell) -> None:
        await flushed(run, doorbell)
        act()

    monkeypatch.setattr(safeguards, "make_receiver_durable", acting)


def flip(image: Path, place: int) -> None:
    """Change a byte that the guest sees, behind QEMU's back."""
    told = run("qemu-img", "map", "-U", "--output=json", image)
    found = next(one for one in json.loads(told) if one["start"] <= place < one["start"] + one["length"])
    with image.open("r+b") as file:
        where = found["offset"] + place - found["start"]
        file.seek(where)
        byte = file.read(1)
        file.seek(where)
        file.write(bytes([byte[0] ^ 0xFF]))


COPIED = MIB + 256 * 1024
"""Where b holds data, and what lies above it has none."""
DAMAGED = {
    "blockdev": ({}, 3, COPIED),
    "drive": ({"base": "[1]"}, 3, COPIED),
    "offline": ({}, 3, COPIED),
    "middle": ({"top": "[3]"}, 2, COPIED),
    "storage-daemon": ({}, 3, COPIED),
}


@pytest.mark.parametrize("case", DAMAGED)
async def test_a_copy_that_was_damaged_is_found(
    case: str, tmp_path: Path, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the guest writes, there too; those who read the images below see what they saw, and the next pull remembers."""
    options, into, place = DAMAGED[case]
    with WAYS.get(case, blockdev)(tmp_path, images, content) as setup:

        def act() -> None:
            flip(images[into], place)
            if case not in ("offline", "storage-daemon"):  # which tells only whether anybody has written
                setup.write(0x77, 64 * 1024, 4096)
                setup.write(0x78, 2 * MIB, 128 * 1024)

        before = views(images[:into])
        at_pending(monkeypatch, act)
        async with setup.target() as target:
            with pytest.raises(Damaged) as damaged:
                await qmpmerge.pull(target, setup.disk, verify=True, **options)  # type: ignore[arg-type]
            found = damaged.value
            assert (found.overlay, found.offset, found.exit_code) == (str(images[into]), place // 512 * 512, 6)
            assert not await target.jobs()
            view = await target.chain()
            assert (view.chain.files, view.oddities) == ([str(image) for image in images], ())
            assert not any(node.info.get("dirty-bitmaps") for node in view.layout.nodes.values())
            monkeypatch.undo()
            for ask in (qmpmerge.pull, qmpmerge.commit):
                for dry_run in (True, False):
                    with pytest.raises(Doubtful) as doubtful:
                        await ask(target, setup.disk, base="[1]", merged_files="delete", verify=True, dry_run=dry_run)
                    assert doubtful.value.file == str(images[into])
            told = [(one["name"], one["severity"], one["where"]) for one in advice.findings(tmp_path)]
            assert told.count(("doubtful", "harm", str(images[into]))) == 1
            assert views(images[:into]) == before
            outcome = await qmpmerge.pull(target, setup.disk, force=["doubtful"], **options)  # type: ignore[arg-type]
            assert not outcome.verified and any("was not compared" in hint for hint in outcome.hints)
            assert not locks.is_damaged(Image(str(images[into]), "qcow2", 0))
        setup.off()
    assert views(images[:into]) == before


async def test_damage_that_was_seen_right_before_a_kill_is_not_forgotten(
    tmp_path: Path, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(run: Run, doorbell: Doorbell) -> None:
        raise RuntimeError

    with blockdev(tmp_path, images, content) as setup:
        at_pending(monkeypatch, lambda: flip(images[3], COPIED))
        monkeypatch.setattr(blockjob, "take_back", die)
        async with setup.target() as target:
            with pytest.raises(RuntimeError):
                await qmpmerge.pull(target, verify=True)
        monkeypatch.undo()
        async with setup.target() as target:
            outcome = await qmpmerge.pull(target, merged_files="stash")
        assert {one.action for one in outcome.merged} == {"keep"} and not outcome.verified
        assert locks.is_damaged(Image(str(images[3]), "qcow2", 0))


@harm("doubtful", "the damage is written over the only images that have what is right")
def test_plain_commit_writes_damage_over_what_is_right(images: list[Path], content: Content) -> None:
    before = views(images[:3])
    run(
        "qemu-io", "-f", "qcow2", "-c", f"write -P {content.data[COPIED]} {COPIED} 64k", images[3]
    )  # as a stream copies it
    flip(images[3], COPIED)
    run("qemu-img", "commit", "-f", "qcow2", images[3])
    assert views(images[:3]) != before


async def test_what_the_guest_writes_is_no_damage(
    tmp_path: Path, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the pull, while it is at work, and where it has copied already; nor what is written below the job's filter."""

    def act() -> None:
        setup.write(0x71, COPIED + 64 * 1024, 4096)
        setup.write(0x72, 3 * MIB + 512 * 1024, 192 * 1024)
        session, server = setup.machine.session, str(tmp_path / "server")
        session.execute("nbd-server-start", addr={"type": "unix", "data": {"path": server}})
        session.execute("block-export-add", id="e", type="nbd", name="below", **{"node-name": "c", "writable": True})
        wrote = setup.content.put(0x74, COPIED + 512 * 1024, 64 * 1024)
        run("qemu-io", "-f", "raw", "-c", wrote, f"nbd+unix:///below?socket={server}")
        session.execute("nbd-server-stop")

    at_pending(monkeypatch, act)
    with machine(tmp_path, *nodes(images), *device("c,share-rw=on")) as vm:
        setup = Setup(vm, "disk0", content, lambda command: vm.io(BACKEND, command))
        setup.write(0x70, 4096, 8192)
        async with slow(setup, verify=True) as pull:
            setup.write(0x73, 2 * MIB + 4096, 4096)
            setup.machine.session.execute("block-job-set-speed", device="qmpmerge-pull-disk0", speed=0)
            outcome = await pull
        assert (outcome.verdict, outcome.verified) == ("pulled", True)
        assert not any(hint.startswith("not checked: ") for hint in outcome.hints)
        assert not any(node.get("dirty-bitmaps") for node in vm.session.execute("query-named-block-nodes", flat=True))
        setup.check()
        setup.off()
    content.check(images[3])


async def test_a_copy_that_differs_is_not_switched_to_where_nobody_tells_who_wrote_there(
    tmp_path: Path, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    with storage_daemon(tmp_path, images, content) as setup:
        at_pending(monkeypatch, lambda: setup.write(0x71, COPIED, 4096))
        async with setup.target() as target:
            with pytest.raises(MaybeDamaged) as found:
                await qmpmerge.pull(target, verify=True)
            assert (found.value.offset, found.value.exit_code) == (COPIED, 6) and "add-fd" in found.value.reason
            view = await target.chain()
            assert view.chain.files == [str(image) for image in images] and not await target.jobs()
            assert not any(node.info.get("dirty-bitmaps") for node in view.layout.nodes.values())
        setup.check()


async def test_what_an_earlier_run_has_begun_cannot_be_compared(setup: Setup, images: list[Path]) -> None:
    """And nothing of what it had begun is left, wherever it was killed."""
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            await qmpmerge.pull(target, speed=1, verify=True, patience=qmpmerge.Patience(detach=True))
        nodes = (await target.layout()).nodes.values()
        assert [entry["name"] for node in nodes for entry in node.info.get("dirty-bitmaps", ())] == [bitmaps.OURS]
    async with setup.target() as target:
        outcome = await qmpmerge.pull(target, speed=0, verify=True)
        assert (outcome.verdict, outcome.verified) == ("pulled", False)
        assert any(hint.startswith("not checked: ") and "earlier run" in hint for hint in outcome.hints)
        layout = await target.layout()
        assert not any(node.info.get("dirty-bitmaps") for node in layout.nodes.values())


async def test_what_a_kill_before_the_job_has_left_is_taken_away(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def die(self: Pull, run: Run) -> None:
        raise RuntimeError

    def found() -> list[str]:
        nodes = setup.machine.session.execute("query-named-block-nodes", flat=True)
        return [bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", ())]

    monkeypatch.setattr(Pull, "_ask", die)
    async with setup.target() as target:
        with pytest.raises(RuntimeError):
            await qmpmerge.pull(target, verify=True)
    assert found() == [bitmaps.OURS]
    assert invoke("recover", str(setup.machine.folder)).code == 0
    assert found() == []


# --- refused ----------------------------------------------------------------------------------------------------------


def short(folder: Path) -> list[Path]:
    """8 MiB with data at 6 MiB, under a layer of 4 MiB, under one of 8 MiB."""
    images = [folder / "low.qcow2", folder / "mid.qcow2", folder / "top.qcow2"]
    run("qemu-img", "create", "-qf", "qcow2", images[0], "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 170 6M 1M", images[0])
    for image, below, size in ((images[1], images[0], "4M"), (images[2], images[1], "8M")):
        run("qemu-img", "create", "-qf", "qcow2", "-b", below, "-F", "qcow2", image, size)
    return images


async def test_a_shorter_layer_is_refused_and_the_whole_chain_is_the_way_out(tmp_path: Path) -> None:
    images = short(tmp_path)
    with machine(tmp_path, *nodes(images), *device("top")) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(ShorterLayer) as refused:
                await qmpmerge.pull(target, base="[1]")
            assert "pull the whole chain" in refused.value.hint
            assert (await qmpmerge.pull(target)).verdict == "pulled"
        vm.io("top", f"read -P 0 {6 * MIB} 1M")


@harm("shorter-layer", "a pull down to a base shows the base's stale data behind the end of a short image")
def test_plain_block_stream_shows_stale_data_there(tmp_path: Path) -> None:
    images = short(tmp_path)
    with machine(tmp_path, *nodes(images), *device("top")) as vm:
        vm.io("top", f"read -P 0 {6 * MIB} 1M")
        stream(vm, device="top", base_node="low", backing_file="low.qcow2")
        vm.io("top", f"read -P 170 {6 * MIB} 1M")


@harm("backing-string", "an empty name cuts off what the image is built on")
def test_plain_block_stream_takes_an_empty_name(tmp_path: Path, images: list[Path], content: Content) -> None:
    with blockdev(tmp_path, images, content) as setup:
        stream(setup.machine, device="c", base_node="a", backing_file="")
        setup.off()
    with pytest.raises(AssertionError, match="differs"):
        content.check(images[3])


def snapshot(image: Path) -> bytes:
    """What an internal snapshot of the image shows."""
    view = image.with_name("view")
    run("qemu-img", "convert", "-l", "snapshot.name=s1", "-f", "qcow2", "-O", "raw", image, view)
    return view.read_bytes()


@harm("would-lose", "after a pull they show zeros for what lay below")
def test_plain_block_stream_ruins_internal_snapshots(tmp_path: Path, images: list[Path], content: Content) -> None:
    run("qemu-img", "snapshot", "-c", "s1", images[3])
    shown = snapshot(images[3])
    with blockdev(tmp_path, images, content) as setup:
        stream(setup.machine, device="c", auto_dismiss=False)
    ruined = snapshot(images[3])
    assert ruined != shown and set(ruined) < set(shown)


@pytest.fixture
def subclusters(tmp_path: Path) -> list[Path]:
    """An overlay with a cluster that is there in part."""
    images = make_chain(tmp_path, ["base.qcow2"])
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", images[0])
    top = tmp_path / "top.qcow2"
    options = ["-o", "extended_l2=on,cluster_size=128k", "-b", "base.qcow2", "-F", "qcow2"]
    run("qemu-img", "create", "-qf", "qcow2", *options, top)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 4k 4k", "-c", "write -P 2 1M 8k", top)
    return [*images, top]


@harm("known-bad", "QEMU 7.2 aborts with its guest as it pulls into an image with `extended_l2`")
def test_plain_block_stream_aborts_over_subclusters(tmp_path: Path, subclusters: list[Path]) -> None:
    with machine(tmp_path, *nodes(subclusters), *device("top")) as vm:
        if version_of(vm) >= (10, 0):
            pytest.skip("a QEMU that takes them")
        vm.session.ask("block-stream", job_id="j", device="top")
        assert vm.process.wait(20) == -signal.SIGABRT


async def test_subclusters(tmp_path: Path, subclusters: list[Path]) -> None:
    before = views(subclusters)
    with machine(tmp_path, *nodes(subclusters), *device("top")) as vm:
        async with qmpmerge.open(vm.target) as target:
            if version_of(vm) < (10, 0):
                with pytest.raises(KnownBad, match="extended_l2"):
                    await qmpmerge.pull(target)
            else:
                assert (await qmpmerge.pull(target)).verdict == "pulled"
    assert views(subclusters) == before


@pytest.mark.parametrize("asked", [{}, {"base": "[1]"}, {"top": "[3]"}], ids=["whole", "partial", "middle"])
async def test_internal_snapshots_of_what_is_pulled_into_are_not_lost(
    asked: dict[str, Any], tmp_path: Path, images: list[Path], content: Content
) -> None:
    """Nor by the advice of `plan`; those of images that are only read stay as they are."""
    into = images[2] if "top" in asked else images[3]
    for image in (images[1], into):
        run("qemu-img", "snapshot", "-c", "s1", image)
    with blockdev(tmp_path, images, content) as setup:
        async with setup.target() as target:
            with pytest.raises(WouldLose) as refused:
                await qmpmerge.pull(target, **asked)
            assert (await qmpmerge.pull(target, **asked, force=["would-lose"], dry_run=True)).verdict == "planned"
            if not asked:
                assert (await qmpmerge.plan(target)).choice is None
    assert refused.value.lost == [f"internal snapshot s1 of {into}"]


async def test_another_vm_on_the_image_that_is_pulled_into_is_a_no(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """That has it open for reading, and QEMU could not write to it; what lies below may be open anywhere."""
    run("qemu-img", "create", "-qf", "qcow2", "-b", "b.qcow2", "-F", "qcow2", tmp_path / "other.qcow2")
    (tmp_path / "second").mkdir()
    theirs = ["-drive", f"file={tmp_path}/other.qcow2,if=none,id=vda", *device("vda")]
    with machine(tmp_path / "second", *theirs), blockdev(tmp_path, images, content) as setup:
        async with setup.target() as target:
            with pytest.raises(InUse) as refused:
                await qmpmerge.pull(target, top="[3]")
            assert refused.value.file == str(images[2])
        await faults.untouched(setup.machine)


async def test_what_others_are_built_on_can_be_pulled(tmp_path: Path, images: list[Path], content: Content) -> None:
    run("qemu-img", "create", "-qf", "qcow2", "-b", "a.qcow2", "-F", "qcow2", tmp_path / "other.qcow2")
    before = views([tmp_path / "other.qcow2"])
    with blockdev(tmp_path, images, content) as setup:
        async with setup.target() as target:
            with pytest.raises(Dependents):
                await qmpmerge.commit(target, top="[3]")
            assert (await qmpmerge.pull(target, base="[1]")).verdict == "pulled"
        setup.off()
    assert views([tmp_path / "other.qcow2"]) == before
    told = invoke("active", str(images[1]))
    assert told.code == 3 and "other.qcow2" in told.err, "it is needed by more than one"


async def test_the_guests_filesystem_is_left_a_reserve(
    setup: Setup, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with setup.target() as target:
        planned = await qmpmerge.pull(target, dry_run=True)
        assert planned.estimate is not None and planned.estimate.growth is not None
        assert planned.estimate.reserve == 8 * MIB
        room = planned.estimate.growth + planned.estimate.reserve
        monkeypatch.setattr(space, "_free", lambda image, pid: room)
        assert (await qmpmerge.pull(target, dry_run=True)).verdict == "planned"
        monkeypatch.setattr(space, "_free", lambda image, pid: room - 1)
        with pytest.raises(NoSpace) as refused:
            await qmpmerge.pull(target)
        assert (refused.value.base, refused.value.reserve) == (str(images[3]), 8 * MIB)


@pytest.mark.parametrize("base", ["raw", "qcow2"])
async def test_the_growth_where_zeros_cannot_be_noted(tmp_path: Path, base: str) -> None:
    """An image of `compat=0.10` has no way to: what shows zeros is written out."""
    images = make_chain(tmp_path, [f"base.{base}"])
    top = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-o", "compat=0.10", "-b", images[0].name, "-F", base, top)
    run("qemu-io", "-f", base, "-c", "write -z 0 4M", "-c", "write -P 1 4M 64k", images[0])
    async with qmpmerge.open(str(top)) as target:
        planned = await qmpmerge.pull(target, dry_run=True)
        before = os.stat(top).st_size
        await qmpmerge.pull(target)
    assert planned.estimate is not None and planned.estimate.growth is not None
    grown = os.stat(top).st_size - before
    assert 4 * MIB < grown <= planned.estimate.growth <= grown + 128 * 1024


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@harm("no-space", "of a pull the guest gets no space any more either")
async def test_plain_block_stream_fills_the_guests_filesystem(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """And that it is refused: one mount for both."""
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=2560k", "none") as full:
        active = full / "c.qcow2"
        active.write_bytes(images[3].read_bytes())
        run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", images[2], active)
        with drive(tmp_path, [active], content) as setup:
            async with setup.target() as target:
                with pytest.raises(NoSpace) as refused:
                    await qmpmerge.pull(target)
            assert refused.value.growth > refused.value.free > 0
            setup.write(0x71, 5 * MIB, 64 * 1024)
            setup.machine.session.execute("block-stream", job_id="j", device="vda", on_error="enospc")
            while setup.machine.session.execute("query-block-jobs")[0]["io-status"] == "ok":
                pass
            with pytest.raises(AssertionError, match="No space left"):
                setup.machine.io("vda", f"write -P 1 {7 * MIB} {MIB}")
            assert os.statvfs(full).f_bavail == 0


@pytest.mark.parametrize("cluster", ["64k", "2M"])
@pytest.mark.parametrize("base", [None, "[1]", "[2]"])
async def test_the_growth_is_what_was_said(tmp_path: Path, base: str | None, cluster: str) -> None:
    """Of the clusters of data it is exact; of tables and refcounts a bound."""
    images = make_chain(tmp_path, ("l0.qcow2", "l1.qcow2", "l2.qcow2", "l3.qcow2"))
    run(
        "qemu-img",
        "create",
        "-qf",
        "qcow2",
        "-o",
        f"cluster_size={cluster}",
        "-b",
        "l2.qcow2",
        "-F",
        "qcow2",
        images[3],
    )
    fill(images, Content())
    grain = MIB * 2 if cluster == "2M" else 64 * 1024
    async with qmpmerge.open(str(images[3])) as target:
        planned = await qmpmerge.pull(target, base=base, dry_run=True)
        before = os.stat(images[3]).st_size
        await qmpmerge.pull(target, base=base)
    assert planned.estimate is not None and planned.estimate.growth is not None
    grown = os.stat(images[3]).st_size - before
    assert grown <= planned.estimate.growth <= grown + 2 * grain


async def test_the_holes_of_a_raw_image_take_their_time_at_a_limit(tmp_path: Path) -> None:
    """QEMU reads them as slowly as data, and writes nothing."""
    images = make_chain(tmp_path, ["base.raw", "top.qcow2"], 12 * MIB)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", images[0])
    async with qmpmerge.open(images[1]) as target:
        planned = await qmpmerge.pull(target, speed=4 * MIB, dry_run=True)
        outcome = await qmpmerge.pull(target, speed=4 * MIB)
    assert planned.estimate is not None
    assert (planned.estimate.copy, outcome.copied, planned.estimate.seconds) == (MIB, MIB, 3.0)
    assert outcome.seconds > 1.5  # at 4 MiB/s the data alone takes a quarter of a second


async def test_what_is_copied_is_counted(setup: Setup) -> None:
    """And the way to it is told in bytes of that, not of the disk with its holes."""
    seen: list[Progress] = []
    async with setup.target() as target:
        planned = await qmpmerge.pull(target, base="[1]", dry_run=True)
        outcome = await qmpmerge.pull(target, base="[1]", speed=2 * MIB, report=seen.append)
    assert planned.estimate is not None
    assert outcome.copied == planned.estimate.copy
    last = seen[-1]
    assert (last.counts, last.done, last.total) == ("copied", outcome.copied, outcome.copied)


# --- leaving, cancelling, coming back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", RANGES)
@pytest.mark.parametrize("kind", WAYS)
async def test_a_cancelled_task_puts_the_old_chain_back(
    kind: str, asked: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    options, _expected = RANGES[asked]
    before = views(images)
    with WAYS[kind](tmp_path, images, content) as setup:
        async with slow(setup, **options) as pull:
            pull.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pull
        async with setup.target() as target:
            assert not await target.jobs()
            view = await target.chain()
            assert (view.chain.files, view.oddities) == ([str(image) for image in images], ())
        setup.off()
    assert views(images) == before
    into = images[2 if "top" in options else 3]
    assert [file.name for file in tmp_path.iterdir() if "qmpmerge" in file.name] == [f".{into.name}.qmpmerge-lock"]


@pytest.mark.parametrize("kind", ["drive", "offline"])
async def test_what_was_copied_before_a_pull_was_taken_back_is_never_said_to_be_verified(
    kind: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """It cannot be told from the overlay's own data: the images that have what is right stay, until nothing lies below."""
    receiver = Image(str(images[3]), "qcow2", 0)
    with WAYS[kind](tmp_path, images, content) as setup:
        for _again in range(2):
            async with slow(setup, base="[1]", verify=True) as pull:
                pull.cancel()
                await asyncio.wait([pull])
        assert [one["name"] for one in advice.findings(tmp_path)].count("unfinished") == 1
        for base in ("[1]", None):
            async with setup.target() as target:
                planned = await qmpmerge.pull(target, base=base, verify=True, merged_files="delete", dry_run=True)
                outcome = await qmpmerge.pull(target, base=base, verify=True, merged_files="delete")
            see_that_nothing_is_deleted(planned, outcome, {"keep"})
            assert locks.is_partial(receiver) is (base is not None)


async def test_recover_leaves_what_a_pull_was_to_delete_and_nobody_has_compared(
    setup: Setup, images: list[Path], content: Content
) -> None:
    """As the pull itself would: it was finalized by somebody who knows nothing of it."""
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            patience = qmpmerge.Patience(detach=True)
            await qmpmerge.pull(target, base="[1]", speed=1, merged_files="delete", patience=patience)
        await jobs.control(target.monitor, JOB, "speed", 0)
        setup.machine.wait_for_job("pending")
        setup.machine.session.execute("job-finalize", id=JOB)
        while await target.jobs():
            pass
    setup.off()
    (found,) = await qmpmerge.recover(images[3])
    told = [(one.file, one.action, one.obstacle) for one in found.merged]
    assert told == [(str(image), "keep", NOT_COMPARED) for image in images[1:3]]
    assert [hint for hint in found.hints if NOT_COMPARED in hint] and all(image.exists() for image in images)
    assert not [hint for hint in found.hints if "clean" in hint or "delete" in hint]
    content.check(images[3])


def see_that_nothing_is_deleted(planned: qmpmerge.Outcome, outcome: qmpmerge.Outcome, actions: set[str]) -> None:
    """Neither is it by a dry run, which tells the very same."""
    foreseen, done = ([(one.file, one.action, one.obstacle) for one in told.merged] for told in (planned, outcome))
    assert foreseen == done and not outcome.verified
    assert {hint for hint in planned.hints if "not checked" in hint} <= {*outcome.hints}
    assert {one.action for one in outcome.merged} == actions and all(one.obstacle for one in outcome.merged)
    (hint,) = [hint for hint in outcome.hints if hint.startswith("not checked: ")]
    assert "taken back" in hint
    assert not [hint for hint in outcome.hints if "clean" in hint or "can be deleted" in hint]


def see_the_way_on(over: Path, outcome: qmpmerge.Outcome) -> None:
    """What stays since it alone may have what is right is built on what the next merge takes away."""
    refused = invoke("commit", str(over), "--json").document["error"]
    (command,) = refused["facts"]["away"]
    assert (refused["name"], refused["facts"]["dependents"]) == ("dependents", [outcome.merged[0].now])
    assert command in refused["hint"] and advice.typed(command.strip("`")).returncode == 0
    assert (over.parent / "stale" / Path(outcome.merged[0].file).name).exists()


@pytest.mark.parametrize("direction", ["pull", "commit"])
async def test_what_a_pull_that_was_taken_back_has_copied_stays_doubtful_wherever_it_goes(
    direction: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """Into an overlay that is pulled into later, or down into a base, which shows from then on what was right below it."""
    with WAYS["offline"](tmp_path, images, content) as setup:
        async with slow(setup, base="[2]", verify=True) as pull:
            pull.cancel()
            await asyncio.wait([pull])
    over = tmp_path / "over.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", images[3], "-F", "qcow2", over)
    before = views([over])
    into = {"pull": over, "commit": images[1]}[direction]
    for base in ("[2]", None):
        async with qmpmerge.offline(over) as target:
            deleting: dict[str, Any] = {"base": base, "verify": True, "merged_files": "delete"}
            if direction == "pull":
                planned = await qmpmerge.pull(target, **deleting, dry_run=True)
                outcome = await qmpmerge.pull(target, **deleting)
                see_that_nothing_is_deleted(planned, outcome, {"keep"})
            else:
                deleting["top"] = "[4]" if base else "[2]"
                planned = await qmpmerge.commit(target, **deleting, dry_run=True)
                outcome = await qmpmerge.commit(target, **deleting)
                see_that_nothing_is_deleted(planned, outcome, {"keep", "stash"} if base else {"stash"})
        if direction == "commit" and base:
            see_the_way_on(over, outcome)
        assert locks.is_partial(Image(str(into), "qcow2", 0)) is (base is not None)
        assert not locks.is_partial(Image(str(images[0]), "qcow2", 0))
    assert views([over]) == before


@pytest.mark.parametrize("top", [None, "[3]"])
async def test_a_pull_that_was_left_is_gone_on_with(
    top: str | None, setup: Setup, images: list[Path], content: Content
) -> None:
    async with setup.target() as target:
        with pytest.raises(StillRunning) as left:
            await qmpmerge.pull(target, top=top, speed=1, patience=qmpmerge.Patience(detach=True))
        assert left.value.job == JOB
    setup.write(0x66, 4 * MIB, 64 * 1024)
    async with setup.target() as target:
        (job,) = await target.jobs()
        assert (job.id, job.disk, job.ours, job.type) == (JOB, "vda", True, "stream")
        assert "follow" in job.verbs
        with pytest.raises(Busy):
            await qmpmerge.pull(target, top=top, base="[1]")
        with pytest.raises(Busy):
            await qmpmerge.commit(target)
        if top is None:
            outcome = await qmpmerge.pull(target, top=top, speed=0)
        else:
            await jobs.control(target.monitor, JOB, "speed", 0)
            outcome = await qmpmerge.follow(target, JOB)
    assert outcome.verdict == "pulled"
    assert {one.action for one in outcome.merged} == {"keep"}
    setup.check()
    setup.machine.stop()
    content.check(images[3])


async def test_a_killed_tool_is_followed_by_the_same_command(
    setup: Setup, images: list[Path], content: Content
) -> None:
    command = [sys.executable, "-m", "qmpmerge", "pull", setup.machine.target, "vda", "--speed", "1", "--json"]
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.stderr is not None
    assert b'"progress"' in tool.stderr.readline()
    tool.kill()
    tool.communicate()
    for image in images:  # the VM is started from the same one before, meanwhile and after
        assert invoke("active", str(image)).out.split() == [str(images[3])]
    done = invoke("pull", setup.machine.target, "vda", "--speed", "0", "--json")
    assert done.document["verdict"] == "pulled"
    setup.check()
    setup.machine.stop()
    content.check(images[3])


async def test_others_may_look_while_it_is_at_work(setup: Setup) -> None:
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            await qmpmerge.pull(target, speed=1, patience=qmpmerge.Patience(detach=True))
    for command in ("disks", "jobs", "doctor"):
        assert invoke(command, setup.machine.target, "--json").code == 0


async def test_others_may_ask_for_the_nodes_all_the_time(setup: Setup, content: Content) -> None:
    """QEMU 7.2 and 10.0 crash when they are asked while a stream job is concluded: this one never is for long."""
    asked = 0
    async with slow(setup) as pull:
        setup.machine.session.execute("block-job-set-speed", device=JOB, speed=0)
        while not pull.done():
            nodes = await asyncio.to_thread(setup.machine.session.execute, "query-named-block-nodes", flat=True)
            asked += bool(nodes)
        assert (await pull).verdict == "pulled"
    assert asked
    setup.check()


@harm("stream-concluded", "QEMU 7.2 and 10.0 crash when anybody asks for their nodes while a stream job is concluded")
def test_plain_block_stream_waits_there_to_be_dismissed(setup: Setup) -> None:
    stream(setup.machine, device="vda", auto_dismiss=False)
    crashes = (7, 2) <= version_of(setup.machine) < (11, 0)
    with pytest.raises((ValueError, ConnectionError)) if crashes else contextlib.nullcontext():
        setup.machine.session.execute("query-named-block-nodes", flat=True)


async def test_a_session_that_is_lost_in_the_middle_is_made_again(setup: Setup, content: Content) -> None:
    async with slow(setup) as pull:
        setup.machine.kill()
        with pytest.raises(qmpmerge.errors.SessionLost):
            await pull
    told = invoke("recover", str(setup.machine.folder / "c.qcow2"), "--json")
    assert told.document["merges"][0]["start_from"] == str(setup.machine.folder / "c.qcow2")
    content.check(setup.machine.folder / "c.qcow2")


# --- what is said, and what is left ---------------------------------------------------------------------------------------


async def test_a_dry_run_changes_nothing(setup: Setup, tmp_path: Path, images: list[Path]) -> None:
    before = faults.digests(tmp_path)
    done = invoke("pull", setup.machine.target, "vda", "--dry-run", "--json").document
    assert (done["verdict"], done["after"]) == ("planned", [str(images[3])])
    assert done["estimate"]["file"] == str(images[3])
    await faults.untouched(setup.machine)
    assert faults.digests(tmp_path) == before


async def test_what_leaves_the_chain_can_be_put_aside(setup: Setup, images: list[Path], content: Content) -> None:
    async with setup.target() as target:
        outcome = await qmpmerge.pull(target, base="[1]", merged_files="stash")
    assert [one.now for one in outcome.merged] == [f"{image}.merged" for image in images[1:3]]
    setup.machine.stop()
    content.check(images[3])
    assert invoke("clean", str(images[0].parent), "--json").document["verdict"] == "done"
    content.check(images[3])


async def test_what_was_pulled_from_is_no_image_to_start_from(setup: Setup, images: list[Path]) -> None:
    async with setup.target() as target:
        await qmpmerge.pull(target)
    setup.machine.stop()
    told = invoke("active", str(images[3]))
    assert told.out.strip() == str(images[3])


async def test_what_may_be_built_on_what_is_only_read_stops_no_pull(setup: Setup, images: list[Path]) -> None:
    """A header that nobody understands, of an image that may be anybody's."""
    name = 'json:{"driver": "qcow2", "file": {"driver": "whatever", "x": "y"}}'
    run(
        "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", images[0].parent / "odd.qcow2", "1M"
    )
    async with setup.target() as target:
        with pytest.raises(NotSeen):
            await qmpmerge.commit(target, top="[3]", dry_run=True)
        assert (await qmpmerge.pull(target, base=1)).verdict == "pulled"


@pytest.mark.parametrize("there", [False, True], ids=["gone", "another"])
async def test_a_base_that_has_lost_its_name_is_missed_before_anything_is_copied(
    there: bool, setup: Setup, images: list[Path]
) -> None:
    """A pull of all does not need it any more."""
    images[0].rename(images[0].with_name("moved"))
    if there:
        run("qemu-img", "create", "-qf", "raw", images[0], "8M")
    async with setup.target() as target:
        with pytest.raises(Replaced) as refused:
            await qmpmerge.pull(target, base="[1]", dry_run=True)
        assert ("without `--base`" in refused.value.hint) != there
        if not there:
            assert (await qmpmerge.pull(target)).verdict == "pulled"


async def test_nothing_in_between_is_unchanged(setup: Setup) -> None:
    async with setup.target() as target:
        told = await qmpmerge.pull(target, base="[3]")
        assert (told.verdict, "nothing lies above b.qcow2" in told.hints[0]) == ("unchanged", True)
        assert (await qmpmerge.pull(target, top="[1]")).verdict == "unchanged"


def test_a_plan_says_what_is_written_and_what_leaves(images: list[Path]) -> None:
    chain = Chain(tuple(Image(str(image), "qcow2", MIB, node=image.stem) for image in images))
    planned = plan.pull(chain, base="[1]")
    assert (planned.receiver, planned.overlay, planned.written) == (chain[4], chain[4], (chain[4],))
    assert (planned.merged, planned.top) == (chain.images[1:3], chain[3])
    assert planned.views == (chain.images, (chain[1], chain[4]))
    assert planned.result == plan.between("pull", chain, 1, 3).result


# --- what becomes of the files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drive", "blockdev", "offline"])
async def test_what_was_compared_can_be_deleted(
    kind: str, tmp_path: Path, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WAYS[kind](tmp_path, images, content) as setup:
        if kind != "offline":
            at_pending(monkeypatch, lambda: setup.write(0x79, COPIED, 4096))
        async with setup.target() as target:
            outcome = await qmpmerge.pull(target, setup.disk, base="[1]", merged_files="delete")
        assert outcome.verified and [(one.action, one.now) for one in outcome.merged] == [("delete", None)] * 2
        setup.check()
        setup.off()
    content.check(images[3])
    assert not [image for image in images[1:3] if image.exists()]


def needed(case: str, folder: Path, images: list[Path], stack: contextlib.ExitStack) -> list[str]:
    """Have somebody need an image, and return how that is told."""
    if case == "built on":
        run("qemu-img", "create", "-qf", "qcow2", "-b", images[1], "-F", "qcow2", folder / "other.qcow2")
        return ["other.qcow2 is built on it", "a.qcow2 stays"]
    if case == "elsewhere":
        (folder / "second").mkdir()
        run("qemu-img", "create", "-qf", "qcow2", "-b", images[1], "-F", "qcow2", folder / "second" / "other.qcow2")
        theirs = [f"file={folder}/second/other.qcow2,if=none,id=vda"]
        stack.enter_context(machine(folder / "second", "-drive", *theirs, *device("vda")))
        return ["second/other.qcow2 is built on it", "in use by qemu-system"]
    if case == "in use":
        with images[1].open("rb") as file:
            reader = subprocess.Popen(["sleep", "600"], stdin=file)
        stack.callback(reader.wait)
        stack.callback(reader.kill)
        return ["in use by sleep", "a.qcow2 stays"]
    run("qemu-img", "create", "-qf", "qcow2", "-u", "-b", "newer:what", "-F", "qcow2", folder / "odd.qcow2", "1M")
    return ["cannot be seen", "cannot be seen"]


@pytest.mark.parametrize("case", ["built on", "elsewhere", "in use", "not seen"])
async def test_what_others_need_is_neither_renamed_nor_deleted(
    case: str, setup: Setup, images: list[Path], content: Content
) -> None:
    """Nor what that is built on, nor what nobody can see that of."""
    with contextlib.ExitStack() as stack:
        told = needed(case, setup.machine.folder, images, stack)
        async with setup.target() as target:
            outcome = await qmpmerge.pull(target, merged_files="delete", force=["not-seen"])
        done = {Path(one.file).name: (one.action, one.obstacle or "") for one in outcome.merged}
        for name, reason in zip(["a.qcow2", "base.raw"], told, strict=True):
            assert done[name][0] == "keep" and reason in done[name][1]
            assert any(name in hint and reason in hint for hint in outcome.hints)
        assert done["b.qcow2"][0] == ("keep" if case == "not seen" else "delete")
    setup.check()


async def test_a_golden_image_elsewhere_keeps_its_name_unless_it_was_looked_who_needs_it(
    tmp_path: Path, content: Content
) -> None:
    for searched in (False, True):
        place = tmp_path / f"{searched}"
        for name in ("golden", "vm"):
            (place / name).mkdir(parents=True)
        images = make_chain(place / "vm", ("../golden/base.raw", "a.qcow2", "b.qcow2"))
        search = [place / "golden"] if searched else []
        async with qmpmerge.open(images[-1], allow=[place / "golden"]) as target:
            outcome = await qmpmerge.pull(target, merged_files="stash", search=search)
        assert [one.action for one in outcome.merged] == ["stash" if searched else "keep", "stash"]
        assert searched or any("--search" in hint for hint in outcome.hints)


@pytest.mark.parametrize("kind", ["drive", "offline"])
async def test_a_dry_run_tells_what_stays_and_why(
    kind: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """As it is then done; what nothing else holds stays, too."""
    run("qemu-img", "snapshot", "-c", "sn", images[1])
    run("qemu-img", "bitmap", "--add", images[2], "b0")
    run("qemu-img", "create", "-qf", "qcow2", "-b", images[0], "-F", "raw", tmp_path / "other.qcow2")
    expected = {"a.qcow2": "internal snapshots", "b.qcow2": "dirty bitmaps", "base.raw": "other.qcow2 is built on it"}
    with WAYS[kind](tmp_path, images, content) as setup:
        async with setup.target() as target:
            for policy, dry_run in (("keep", True), ("stash", True), ("delete", False)):
                outcome = await qmpmerge.pull(target, setup.disk, merged_files=policy, dry_run=dry_run)  # type: ignore[arg-type]
                done = {Path(one.file).name: (one.action, one.obstacle or "") for one in outcome.merged}
                assert {name: action for name, (action, _why) in done.items()} == dict.fromkeys(expected, "keep")
                assert all(why in done[name][1] for name, why in expected.items()), done
                assert any("dirty bitmap b0 of" in hint for hint in outcome.hints), outcome.hints
        setup.off()


async def test_a_dry_run_tells_that_nobody_was_seen(setup: Setup, images: list[Path]) -> None:
    async with setup.target() as target:
        (told,) = (await qmpmerge.pull(target, base="[1]", merged_files="stash", dry_run=True)).hints
        assert told.startswith(f"nobody else is seen to need {images[1]}, {images[2]} (looked at ")


@pytest.mark.parametrize("searched", [False, True])
async def test_a_golden_image_in_the_folder_above_is_not_taken_from_under_another_vm(
    tmp_path: Path, searched: bool, content: Content
) -> None:
    """Not while both run, and not in the night when both are off."""
    golden, *disks = (tmp_path / name for name in ("golden.qcow2", "v1/a.qcow2", "v2/a.qcow2"))
    run("qemu-img", "create", "-qf", "qcow2", golden, "64M")
    with contextlib.ExitStack() as stack:
        for disk in disks:
            disk.parent.mkdir()
            run("qemu-img", "create", "-qf", "qcow2", "-b", golden, "-F", "qcow2", disk)
            options = ["-drive", f"file={disk},if=none,id=vda", *device("vda")]
            vm = stack.enter_context(machine(disk.parent, *options))
            stack.callback(vm.stop)
        asked = ["--merged-files", "stash", *(["--search", str(tmp_path)] if searched else [])]
        target = f"{disks[0].parent / 'monitor'}"
        for more in (["--dry-run"], []):
            told = invoke("pull", target, *asked, *more)
            assert told.code == 0 and f"{disks[1]} is built on it" in told.out + told.err, told.err
    assert golden.exists()


async def test_clean_sees_who_needs_what_a_pull_has_stashed(tmp_path: Path) -> None:
    """In the folders below, with all VMs off."""
    images = make_chain(tmp_path, ("base.qcow2", "a.qcow2"))
    (tmp_path / "v2").mkdir()
    other = tmp_path / "v2" / "other.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", images[0], "-F", "qcow2", other)
    async with qmpmerge.offline(images[1]) as target:
        outcome = await qmpmerge.pull(target, merged_files="stash")
    (kept,) = await qmpmerge.clean([tmp_path])
    assert [one.action for one in outcome.merged] == ["stash"] and kept.obstacle == f"{other} is built on it"
    other.unlink()
    assert [one.obstacle for one in await qmpmerge.clean([tmp_path])] == [None]


@pytest.mark.parametrize("policy", ["delete", "stash"])
async def test_what_a_commit_has_stashed_can_go_after_a_pull_has_taken_its_base(policy: Any, tmp_path: Path) -> None:
    images = make_chain(tmp_path, ("base.qcow2", "a.qcow2", "b.qcow2"))
    async with qmpmerge.offline(images[2]) as target:
        await qmpmerge.commit(target, top="[2]")
    async with qmpmerge.offline(images[2]) as target:
        outcome = await qmpmerge.pull(target, merged_files=policy)
    assert [one.action for one in outcome.merged] == [policy]
    if policy == "stash":
        await qmpmerge.clean([f"{images[0]}.merged"])
    assert [one.obstacle for one in await qmpmerge.clean([tmp_path])] == [None]
    assert [file.name for file in tmp_path.iterdir()] == ["b.qcow2"]


async def test_what_was_not_compared_is_not_put_aside_to_be_deleted_later(setup: Setup) -> None:
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            await qmpmerge.pull(target, speed=1, merged_files="delete", patience=qmpmerge.Patience(detach=True))
        outcome = await qmpmerge.pull(target, speed=0, merged_files="delete")
    assert {one.action for one in outcome.merged} == {"keep"}
    assert {one.obstacle for one in outcome.merged} == {"what was copied was not compared"}
    assert not [hint for hint in outcome.hints if "clean" in hint or "can be deleted" in hint]
