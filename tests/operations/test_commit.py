"""
The safe sequence: each test is a way in which a plain `block-commit` hurts, and shows that ours does not.

Where a test is named `plain_...` it pins the harm itself: the fact that the step exists for.
"""

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from rig import faults, folder
from rig.command import invoke
from rig.disks import KINDS, Setup, blockdev, device, drive, filters, nodes, offline, remove
from rig.harms import harm
from rig.machines import MIB, Content, Machine, fill, machine, make_chain, run
from rig.wire import heard
from speed.images import empty_chain
from speed.peers import node_of

import qmpmerge
from qmpmerge.chain.chain import Image
from qmpmerge.chain.outcome import Ending
from qmpmerge.engine import safeguards
from qmpmerge.engine.pace.progress import Progress, mount_point
from qmpmerge.errors import (
    BaseIsTop,
    Busy,
    DiskNeeded,
    JobFailed,
    JobVerb,
    NoSuchDisk,
    NoSuchJob,
    NoSuchLayer,
    NotDurable,
    NotProven,
    NotVerified,
    NotWritable,
    OptionsConflict,
    SessionLost,
    SeveralImages,
    ShorterLayer,
    StillRunning,
    Temporary,
)
from qmpmerge.images import compare
from qmpmerge.images.qemuimg import Extent
from qmpmerge.journal import locks
from qmpmerge.operations.control import Verb
from qmpmerge.processes import proc
from qmpmerge.qemu import flush, jobs

JOB = "qmpmerge-commit-vda"

Kind = Callable[[Path, Sequence[Path], Content], AbstractContextManager[Setup]]


# --- what was copied ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [drive, offline], ids=["live", "offline"])
@pytest.mark.parametrize("verify", [None, False], ids=["compared", "not compared"])
async def test_an_intermediate_merge_tells_what_it_has_copied(
    way: Kind, verify: bool | None, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """QEMU's own figure is what it has walked."""
    with way(tmp_path, images, content) as setup:
        async with setup.target() as target:
            outcome = await qmpmerge.commit(target, setup.disk, top="[3]", verify=verify)
    assert (outcome.verdict, outcome.verified) == ("merged", verify is None)
    # See `fill`: two ranges of 1.125 MiB that overlap, and two of 192 KiB.
    assert outcome.copied == (2 * MIB + 128 * 1024) + (192 + 64) * 1024


async def test_what_was_copied_is_what_an_empty_base_holds_afterwards(tmp_path: Path) -> None:
    images = make_chain(tmp_path, ("d.qcow2", "e.qcow2", "f.qcow2"))
    fill(images[1:], Content())
    async with qmpmerge.offline(images[2]) as target:
        outcome = await qmpmerge.commit(target, top="[2]")
    extents = json.loads(run("qemu-img", "map", "--output=json", images[0]))
    assert outcome.copied == sum(extent["length"] for extent in extents if extent["data"]) == MIB + 320 * 1024


async def test_nobody_is_kept_waiting_for_a_figure(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(plan: object) -> list[Extent]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(compare, "copied", never)
    monkeypatch.setattr(safeguards, "COUNT_SECONDS", 0.0)
    async with qmpmerge.live(setup.machine.target) as target:
        outcome = await qmpmerge.commit(target, top="[3]", verify=False)
    assert (outcome.verdict, outcome.copied) == ("merged", None)


NEW_NODE = ("blockdev-add", {"driver": "null-co", "node_name": "new"})
NEW_FILE = ("chardev-add", {"id": "new", "backend": {"type": "file", "data": {"out": "new"}}})


@pytest.mark.parametrize("more", [None, NEW_NODE, NEW_FILE], ids=["known", "with a new node", "with a new file"])
async def test_of_a_long_chain_all_is_asked_for_once(more: tuple[str, dict[str, Any]] | None, tmp_path: Path) -> None:
    """The questions at the end take QEMU seconds at 200 layers with relative names; what is not known yet is asked for."""
    images = empty_chain(tmp_path, 40)
    asked: list[str] = []
    with machine(tmp_path, "-drive", f"file={images[-1]},format=qcow2,if=none,id=vda", *device("vda")) as vm:

        def trace(direction: str, text: str) -> None:
            if direction != "->":
                return
            asked.append(json.loads(text)["execute"])
            if more is not None and asked[-1] == "job-finalize":
                vm.session.execute(more[0], **more[1])

        async with heard(trace), qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, "vda", base="[10]", top="[12]")
    assert (outcome.verdict, outcome.after.files) == ("merged", [str(image) for image in images if image.exists()])
    counts = asked.count("query-named-block-nodes"), asked.count("x-debug-query-block-graph")
    assert counts == (1 if more is None else 2, 2)


async def test_of_a_long_chain_a_node_that_was_given_another_file_meanwhile_is_seen(tmp_path: Path) -> None:
    """All names are known, and all files are open before and after; but the active image is stored in another one."""
    images = empty_chain(tmp_path, 40)
    copy = Path(shutil.copy(images[-1], tmp_path / "copy.qcow2"))
    opened = ["-blockdev", f"file,node-name=copy,filename={copy}"]
    opened += ["-blockdev", f"file,node-name=kept,filename={images[-1]},read-only=on,force-share=on"]
    drives = ["-drive", f"file={images[-1]},format=qcow2,if=none,id=vda,node-name=active", *device("vda")]
    with machine(tmp_path, *opened, *drives) as vm:
        below = node_of(vm.session, images[-2])
        options = {"driver": "qcow2", "node-name": "active", "file": "copy", "backing": below}

        def trace(direction: str, text: str) -> None:
            if direction == "->" and json.loads(text)["execute"] == "job-finalize":
                vm.session.execute("blockdev-reopen", options=[options])

        async with heard(trace), qmpmerge.live(vm.target) as target:
            with pytest.raises(NotProven) as unproven:
                await qmpmerge.commit(target, "vda", base="[10]", top="[12]")
    assert str(copy) in unproven.value.found


# --- the newest overlays stay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [drive, offline], ids=["live", "offline"])
async def test_the_newest_overlays_are_kept(way: Kind, tmp_path: Path, images: list[Path], content: Content) -> None:
    with way(tmp_path, images, content) as setup:
        async with setup.target() as target:
            assert (await qmpmerge.commit(target, keep=3)).verdict == "unchanged"
            outcome = await qmpmerge.commit(target, keep=1)
            assert (outcome.verdict, str(outcome.after)) == ("merged", "base.raw <-- c.qcow2")
            assert (await qmpmerge.commit(target, keep=1)).verdict == "unchanged"
        setup.check()


async def test_the_same_words_go_on_with_a_merge_that_was_left(setup: Setup) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(StillRunning):
            await qmpmerge.commit(target, keep=1, speed=1, patience=qmpmerge.Patience(detach=True))
        outcome = await qmpmerge.commit(target, keep=1, speed=0)
        assert (outcome.verdict, str(outcome.after)) == ("merged", "base.raw <-- c.qcow2")
    setup.check()


async def test_what_is_kept_is_no_negative_number_and_no_top(setup: Setup) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(ValueError, match="-1"):
            await qmpmerge.commit(target, keep=-1)
        with pytest.raises(OptionsConflict):
            await qmpmerge.commit(target, keep=1, top=2)


# --- the header of the overlay -----------------------------------------------------------------------------------------


async def test_an_overlay_whose_header_cannot_be_written_is_refused(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    failing = faults.injecting(
        images, "c", "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28"
    )
    with machine(tmp_path, *failing) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(NotWritable, match="No space left") as refused:
                await qmpmerge.commit(target, top="[3]")
        assert refused.value.file == str(images[3])
        await faults.untouched(vm)
        vm.stop()
    content.check(images[3])


@harm("not-writable", "QEMU crashes with the guest where the overlay's header cannot be rewritten at the end")
def test_plain_block_commit_crashes_qemu_there(tmp_path: Path, images: list[Path], content: Content) -> None:
    failing = faults.injecting(
        images, "c", "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28"
    )
    with machine(tmp_path, *failing) as vm:
        with pytest.raises((ValueError, ConnectionError)):  # the session ends in the middle
            vm.session.execute("block-commit", job_id="j", device="c", top_node="b", base_node="base")
            while True:
                vm.session.execute("query-jobs")
        assert vm.process.wait(20) == -11
    content.check(images[3])


async def test_relative_names_stay_relative_in_long_chains(tmp_path: Path) -> None:
    """With 14 relative layers of -blockdev and no `backing-file` QEMU writes a json: name that does not fit, and crashes."""
    images = make_chain(tmp_path, ["base.raw", *(f"layer{number}.qcow2" for number in range(13))])
    content = Content()
    fill(images[:6], content)
    with blockdev(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.commit(target, top="[13]", base="[1]")
            assert outcome.after.active.backing == "base.raw"
            setup.check()
        setup.machine.stop()
    content.check(images[-1])


async def test_absolute_names_stay_absolute(tmp_path: Path, images: list[Path], content: Content) -> None:
    run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", images[2], images[3])
    with drive(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.commit(target, top="[3]")
        assert outcome.after.active.backing == str(images[0])
        assert outcome.after.active.backing_format == "raw"


async def test_a_bare_file_node_as_raw_base(tmp_path: Path, images: list[Path], content: Content) -> None:
    """QEMU would record the format "file" for it."""
    explicit = nodes(images)
    del explicit[2:4]
    explicit = [part.replace("backing=base,", "backing=base-file,") for part in explicit]
    with machine(tmp_path, *explicit, *device("c")) as vm:
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, top="[3]")
        assert (outcome.verdict, str(outcome.after)) == ("merged", "base.raw <-- c.qcow2")
        vm.stop()
    content.check(images[3])


# --- durable before the switch ----------------------------------------------------------------------------------------

FLUSH_FAILS = "inject-error.0.event=none,inject-error.0.iotype=flush,inject-error.0.errno=5"


@pytest.mark.parametrize("differs", [False, True], ids=["", "differs"])
@pytest.mark.parametrize(
    ("storage", "error"), [(FLUSH_FAILS, "Input/output error"), ("align=512", "different data")], ids=["fails", "works"]
)
async def test_a_base_that_cannot_be_flushed_stops_the_merge(
    tmp_path: Path, images: list[Path], content: Content, storage: str, error: str, differs: bool
) -> None:
    """Whatever the comparison finds that is made meanwhile, which stops it where the flush does not."""

    def damage(direction: str, text: str) -> None:
        if differs and direction == "<-" and '"status": "pending"' in text:
            with images[0].open("r+b") as base:
                base.seek(2 * MIB)
                base.write(b"lost")

    with machine(tmp_path, *faults.injecting(images, "base", storage)) as vm:
        async with heard(damage), qmpmerge.live(vm.target) as target:
            if storage != FLUSH_FAILS and not differs:
                assert (await qmpmerge.commit(target, top="[3]")).verified
                return
            with pytest.raises((NotDurable, NotVerified), match=error):
                await qmpmerge.commit(target, top="[3]")
        await faults.untouched(vm)
        vm.stop()
    content.check(images[3])


@harm("flush-unavailable", "a base that its storage did not make durable is reported as merged")
def test_plain_block_commit_reports_success_there(tmp_path: Path, images: list[Path], content: Content) -> None:
    with machine(tmp_path, *faults.injecting(images, "base", FLUSH_FAILS)) as vm:
        vm.session.execute(
            "block-commit", job_id="j", device="c", top_node="b", base_node="base", backing_file="base.raw", auto_dismiss=False
        )  # fmt: skip
        job = {"status": "running"}
        while job["status"] != "concluded":
            (job,) = vm.session.execute("query-jobs")
        assert "error" not in job


async def test_a_running_nbd_server_is_left_alone(setup: Setup, tmp_path: Path) -> None:
    address = str(tmp_path / "nbd")
    setup.machine.session.execute("nbd-server-start", addr={"type": "unix", "data": {"path": address}})
    (root,) = [disk.root for disk in await disks(setup)]
    setup.machine.session.execute("block-export-add", type="nbd", id="theirs", node_name=root, name="theirs")
    async with qmpmerge.live(setup.machine.target) as target:
        assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
    (export,) = setup.machine.session.execute("query-block-exports")
    assert export["id"] == "theirs"
    assert os.path.exists(address)


async def disks(setup: Setup) -> list[qmpmerge.Disk]:
    async with qmpmerge.live(setup.machine.target) as target:
        return await target.disks()


@pytest.mark.parametrize("image", ["base", "c"])
async def test_a_node_that_a_killed_qmpmerge_left_is_taken_away(
    image: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    with blockdev(tmp_path, images, content) as setup:
        session = setup.machine.session
        session.execute("blockdev-add", driver="blkdebug", node_name=flush.NODE, image=image, read_only=True)
        async with qmpmerge.live(setup.machine.target) as target:
            assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
        assert flush.NODE not in [node["node-name"] for node in session.execute("query-named-block-nodes", flat=True)]
        setup.check()
        setup.off()
    content.check(images[3])


# --- errors of the job ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_write_error_fails_the_job_and_leaves_the_chain(
    top: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    failing = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=5"
    with machine(tmp_path, *faults.injecting(images, "base", failing)) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(JobFailed, match="Input/output error"):
                await qmpmerge.commit(target, top=top)
        await faults.untouched(vm)
        vm.stop()
    content.check(images[3])


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_job_that_ran_out_of_space_goes_on_once_there_is_some(
    top: str, tmp_path: Path, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RESUME_SECONDS", 0.1)
    once = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.once=on"
    seen: list[Progress] = []
    with machine(tmp_path, *faults.injecting(images, "base", once)) as vm:
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, top=top, report=seen.append)
        vm.stop()
    short = [told.shortage for told in seen if told.shortage]
    assert {shortage.filesystem for shortage in short} == {mount_point(str(images[0]))}
    assert all(0 < shortage.needed <= len(content.data) for shortage in short)
    content.check(outcome.after.active.file)


async def test_a_killed_qemu_is_an_unknown_outcome(setup: Setup, content: Content, images: list[Path]) -> None:
    async with slow(setup, top="[3]") as merge:
        setup.machine.kill()
        with pytest.raises(SessionLost) as lost:
            await merge
        assert lost.value.verdict == "unknown"
    (command,) = lost.value.hint.split("`")[1::2]
    assert invoke(*command.split()[1:], "--json").document["verdict"] == "done"
    content.check(images[3])


# --- leaving, cancelling, coming back ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def slow(setup: Setup, top: str) -> AsyncIterator["asyncio.Task[qmpmerge.Outcome]"]:
    """A merge that has begun and will not end by itself: QEMU copies a first piece and then waits."""
    begun = asyncio.Event()
    async with qmpmerge.live(setup.machine.target) as target:
        work = qmpmerge.commit(target, setup.disk, top=top, speed=1, report=lambda told: begun.set())
        merge = asyncio.ensure_future(work)
        await begun.wait()
        yield merge


@pytest.mark.parametrize("top", ["[3]", "[4]"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancelled_task_puts_the_old_chain_back(
    kind: str, top: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    with KINDS[kind](tmp_path, images, content) as setup:
        async with slow(setup, top=top) as merge:
            merge.cancel()
            with pytest.raises(asyncio.CancelledError):
                await merge
            assert not setup.machine.session.execute("query-jobs")
        async with qmpmerge.live(setup.machine.target) as target:
            assert (await target.chain()).chain.files == [str(image) for image in images]
        setup.check()


@pytest.mark.parametrize("top", ["[3]", "[4]"])
@pytest.mark.parametrize("options", [{}, {"polite": 0.1}, {"converge": qmpmerge.Converge()}], ids=" ".join)
@pytest.mark.parametrize(
    "error", [ZeroDivisionError("mine"), TimeoutError("mine"), NotProven(target="t", expected="a", found="b")], ids=repr
)
async def test_what_report_raises_puts_the_old_chain_back_and_is_raised(
    error: Exception, options: dict[str, Any], top: str, setup: Setup, images: list[Path]
) -> None:
    def report(progress: qmpmerge.Progress) -> None:
        raise error

    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(type(error)) as raised:
            await qmpmerge.commit(target, "vda", top=top, speed=1, report=report, **options)
        assert raised.value is error
        assert not setup.machine.session.execute("query-jobs")
        assert (await target.chain()).chain.files == [str(image) for image in images]
    assert folder.litter(images[0].parent) == []
    setup.check()


async def test_what_report_raises_leaves_somebody_elses_job(setup: Setup) -> None:
    top = str(setup.machine.folder / "b.qcow2")
    setup.machine.session.execute("block-commit", job_id="theirs", device="vda", top=top, speed=1, auto_dismiss=False)

    def report(progress: qmpmerge.Progress) -> None:
        raise ZeroDivisionError

    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(ZeroDivisionError):
            await qmpmerge.follow(target, "theirs", report=report)
    assert [job["id"] for job in setup.machine.session.execute("query-jobs")] == ["theirs"]


@pytest.mark.parametrize(("top", "verdict"), [("[3]", "merged"), ("[4]", "pivoted")])
async def test_a_job_that_was_left_is_followed_to_its_end(
    top: str, verdict: str, setup: Setup, images: list[Path], content: Content
) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(StillRunning) as left:
            await qmpmerge.commit(target, "vda", top=top, speed=1, patience=qmpmerge.Patience(detach=True))
        assert left.value.facts == {"target": setup.machine.target, "job": JOB, "option": ""}
    setup.write(0x66, 4 * MIB, 64 * 1024)
    async with qmpmerge.live(setup.machine.target) as target:
        (job,) = await target.jobs()
        assert (job.id, job.disk, job.ours, job.type) == (JOB, "vda", True, "commit")
        assert "follow" in job.verbs
        with pytest.raises(Busy):
            await qmpmerge.commit(target, "vda", base="[2]", top=top)
        with pytest.raises(Busy):
            await qmpmerge.snapshot(target, {"vda": f"{images[0].parent}/new.qcow2"})
        await jobs.control(target.monitor, JOB, "speed", 0)
        outcome = await qmpmerge.follow(target, JOB)
    assert outcome.verdict == verdict
    assert outcome.before.files == [str(image) for image in images]
    setup.check()
    setup.machine.stop()
    content.check(outcome.after.active.file)


async def test_what_a_commit_that_was_taken_back_has_copied_up_is_never_said_to_be_verified(tmp_path: Path) -> None:
    """Around its data, into larger clusters, from below base: it cannot be told from what base has itself."""
    images = make_chain(tmp_path, ("g.qcow2", "l0.qcow2", "l1.qcow2", "l2.qcow2"))
    run("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=2M", "-b", images[0], "-F", "qcow2", images[1])
    fill(images, Content())
    base = Image(str(images[1]), "qcow2", 0)

    def stop(told: Progress) -> None:
        raise InterruptedError

    async with qmpmerge.open(images[3]) as target:
        with pytest.raises(InterruptedError):
            await qmpmerge.commit(target, base="[2]", top="[3]", speed=1, report=stop)
    for lowest in ("[2]", None):
        assert locks.is_partial(base)
        async with qmpmerge.open(images[3]) as target:
            outcome = await qmpmerge.commit(target, base=lowest, top="[3]" if lowest else "[2]", merged_files="delete")
        assert not outcome.verified and [one.action for one in outcome.merged] == ["stash"]
        assert any(hint.startswith("not checked: ") and "taken back" in hint for hint in outcome.hints)
        assert not [hint for hint in outcome.hints if "clean" in hint]
    assert not locks.is_partial(base) and not locks.is_partial(Image(str(images[0]), "qcow2", 0))


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_cancellation_while_the_job_is_being_started_takes_it_back(top: str, setup: Setup) -> None:
    """QEMU has the command, we have no reply yet."""
    tasks: list[asyncio.Task[qmpmerge.Outcome]] = []

    def cancel_at_the_start(direction: str, text: str) -> None:
        if direction == "->" and "block-commit" in text:
            asyncio.get_running_loop().call_soon(tasks[0].cancel)

    async with heard(cancel_at_the_start), qmpmerge.live(setup.machine.target) as target:
        tasks.append(asyncio.ensure_future(qmpmerge.commit(target, "vda", top=top, speed=1)))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
    await faults.untouched(setup.machine)


@pytest.mark.parametrize("top", ["b", "c"])
@pytest.mark.parametrize("finalize", [True, False])
async def test_a_strangers_job_is_followed_when_the_user_says_so(
    top: str, finalize: bool, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """An active one that waits to be finalized freezes the guest meanwhile: it is finalized at once."""
    with blockdev(tmp_path, images, content) as setup:
        options = {"backing_file": "base.raw"} if top == "b" else {}
        setup.machine.session.execute(
            "block-commit", job_id="theirs", device="c", top_node=top, base_node="base", speed=1, auto_finalize=finalize,
            auto_dismiss=False, **options
        )  # fmt: skip
        async with qmpmerge.live(setup.machine.target) as target:
            with pytest.raises(Busy):
                await qmpmerge.commit(target)
            (job,) = await target.jobs()
            assert (job.ours, job.disk) == (False, "disk0")
            await jobs.control(target.monitor, "theirs", "speed", 0)
            try:
                outcome = await qmpmerge.follow(target, "theirs")
            except NotProven:  # it ended before we looked, and what it was to do is not known any more
                setup.check()
                return
        assert outcome.verdict in ("merged", "pivoted")
        setup.check()
        setup.machine.stop()
    content.check(outcome.after.active.file)


async def test_follow_needs_a_job(setup: Setup) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(NoSuchJob):
            await qmpmerge.follow(target, "nothing")


async def test_a_job_that_ended_unseen_is_read_and_dismissed(setup: Setup) -> None:
    with contextlib.suppress(StillRunning):
        async with qmpmerge.live(setup.machine.target) as target:
            await qmpmerge.commit(target, "vda", speed=1, patience=qmpmerge.Patience(detach=True))
    setup.machine.session.execute("job-cancel", id=JOB)
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(JobFailed, match="canceled"):
            await qmpmerge.follow(target, JOB)
        assert not await target.jobs()


@pytest.mark.parametrize("kind", KINDS)
async def test_ready_then_pivot(kind: str, tmp_path: Path, images: list[Path], content: Content) -> None:
    with KINDS[kind](tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.commit(target, setup.disk, ending="hold")
            assert (outcome.verdict, outcome.after.files) == ("ready", [str(image) for image in images])
            setup.write(0x77, 5 * MIB, 64 * 1024)
            assert outcome.job is not None
            outcome = await qmpmerge.follow(target, outcome.job.id, needs_ready=True)
            assert (outcome.verdict, str(outcome.after)) == ("pivoted", "base.raw")
        setup.check()
        setup.machine.stop()
    content.check(images[0])


@pytest.mark.parametrize("kind", KINDS)
async def test_the_overlay_can_be_kept(kind: str, tmp_path: Path, images: list[Path], content: Content) -> None:
    with KINDS[kind](tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.commit(target, setup.disk, ending="keep")
            assert (outcome.verdict, outcome.merged) == ("kept", ())
            assert outcome.after.files == [str(image) for image in images]
        before = content.copy()
        setup.write(0x78, 5 * MIB, 64 * 1024)
        setup.check()
        setup.machine.stop()
    before.check(images[0])
    content.check(images[3])


async def test_pivot_needs_a_ready_job(setup: Setup) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        with contextlib.suppress(StillRunning):
            await qmpmerge.commit(target, "vda", speed=1, patience=qmpmerge.Patience(detach=True))
        with pytest.raises(JobVerb) as refused:
            await qmpmerge.follow(target, JOB, needs_ready=True)
        assert "pivot" not in refused.value.verbs


# --- refused means untouched -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["keep", "hold"])
async def test_a_merge_that_would_not_switch_is_planned_as_the_chain_that_stays(ending: Ending, setup: Setup) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        outcome = await qmpmerge.commit(target, "vda", ending=ending, dry_run=True)
    assert (outcome.verdict, outcome.merged) == ("planned", ())
    assert str(outcome.after) == "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2"


async def test_a_dry_run_changes_nothing(setup: Setup, tmp_path: Path, images: list[Path]) -> None:
    before, told = faults.digests(tmp_path), _files(setup.machine)
    async with qmpmerge.live(setup.machine.target) as target:
        outcome = await qmpmerge.commit(target, "vda", top="[3]", dry_run=True)
    assert (outcome.verdict, str(outcome.after)) == ("planned", "base.raw <-- c.qcow2")
    assert [merged.file for merged in outcome.merged] == [str(image) for image in images[1:3]]
    await faults.untouched(setup.machine)
    assert (faults.digests(tmp_path), _files(setup.machine)) == (before, told)
    assert sorted(file.name for file in tmp_path.iterdir() if "qmpmerge" in file.name) == []


async def test_plain_change_backing_file_with_a_relative_name(tmp_path: Path, images: list[Path]) -> None:
    """
    QEMU calls the overlay and all above by nested json: names then, which cost it seconds at 200 layers, until an absolute name
    is set. So a dry run sends none; a merge that leaves the header relative cannot help it, nor can it be helped afterwards.
    """
    with machine(tmp_path, "-drive", f"file={images[3]},if=none,id=vda", *device("vda")) as vm:
        before, (root, overlay) = _files(vm), (node_of(vm.session, image) for image in (images[3], images[2]))
        for name in (images[1].name, str(images[1]), images[1].name):
            vm.session.execute("change-backing-file", device=root, image_node_name=overlay, backing_file=name)
            nested = [file for file in _files(vm) if file.startswith("json:")]
            assert len(nested) == (0 if name.startswith("/") else 2)
        assert not any(file.startswith("json:") for file in before)
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, base="[1]", top="[2]")
        assert [image.backing for image in outcome.after] == [None, images[0].name, images[2].name]
        assert len([file for file in _files(vm) if file.startswith("json:")]) == 2


def _files(vm: Machine) -> list[str]:
    """What QEMU calls the files of all its nodes."""
    return sorted(node["file"] for node in vm.session.execute("query-named-block-nodes", flat=True))


async def test_a_shorter_layer_is_refused(tmp_path: Path) -> None:
    """QEMU would show the base's stale data beyond the short layer's end."""
    short(tmp_path)
    with machine(tmp_path, "-drive", f"file={tmp_path}/top.qcow2,if=none,id=vda", *device("vda")) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(ShorterLayer) as refused:
                await qmpmerge.commit(target, top="[2]")
        assert refused.value.facts["base_size"] == 8 * MIB
        vm.io("vda", f"read -P 0 {6 * MIB} 1M")


@harm("shorter-layer", "the guest reads the base's stale data behind the end of the short image")
def test_plain_block_commit_shows_stale_data_there(tmp_path: Path) -> None:
    short(tmp_path)
    with machine(tmp_path, "-drive", f"file={tmp_path}/top.qcow2,if=none,id=vda", *device("vda")) as vm:
        vm.io("vda", f"read -P 0 {6 * MIB} 1M")
        vm.session.execute(
            "block-commit", device="vda", top=f"{tmp_path}/mid.qcow2", base=f"{tmp_path}/low.raw", job_id="j"
        )
        while vm.session.execute("query-jobs"):
            pass
        vm.io("vda", f"read -P 170 {6 * MIB} 1M")


def short(folder: Path) -> None:
    """8 MiB with data at 6 MiB, under a layer of 4 MiB, under one of 8 MiB."""
    run("qemu-img", "create", "-q", "-f", "raw", folder / "low.raw", "8M")
    run("qemu-io", "-f", "raw", "-c", "write -P 170 6M 1M", folder / "low.raw")
    for name, below, form, size in (("mid", "low.raw", "raw", "4M"), ("top", "mid.qcow2", "qcow2", "8M")):
        run("qemu-img", "create", "-qf", "qcow2", "-b", folder / below, "-F", form, folder / f"{name}.qcow2", size)


async def test_a_snapshot_on_drive_is_refused(tmp_path: Path, images: list[Path]) -> None:
    before = faults.digests(tmp_path)
    with machine(tmp_path, "-drive", f"file={images[3]},if=none,id=vda,snapshot=on", *device("vda")) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(Temporary):
                await qmpmerge.commit(target, "vda")
            with pytest.raises(Temporary):
                await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/new.qcow2"})
    assert faults.digests(tmp_path) == before


async def test_read_only_base_nodes_are_refused_by_qemu(tmp_path: Path, images: list[Path]) -> None:
    explicit = [
        part.replace("auto-read-only=on", "read-only=on") if "base-file" in part else part for part in nodes(images)
    ]
    with machine(tmp_path, *explicit, *device("c")) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(NotWritable, match="read-only") as refused:
                await qmpmerge.commit(target)
            assert "`auto-read-only=on`" in refused.value.hint and "chattr" not in refused.value.hint
        await faults.untouched(vm)


async def test_addresses_that_lead_nowhere(setup: Setup) -> None:
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(NoSuchDisk, match="no disk nope"):
            await qmpmerge.commit(target, "nope")
        with pytest.raises(NoSuchLayer) as refused:
            await qmpmerge.commit(target, "vda", base="[9]")
        assert len(refused.value.known) == 4
        with pytest.raises(BaseIsTop):
            await qmpmerge.commit(target, "vda", base="vda[4]")
    await faults.untouched(setup.machine)


async def test_a_disk_without_a_chain_is_unchanged(tmp_path: Path, images: list[Path], content: Content) -> None:
    with drive(tmp_path, images[:1], content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            assert (await qmpmerge.commit(target)).verdict == "unchanged"


async def test_two_disks(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first, second = make_chain(tmp_path / "one"), make_chain(tmp_path / "two")
    drives: list[str] = []
    for name, images in (("vda", first), ("vdb", second)):
        drives += ["-drive", f"file={images[-1]},if=none,id={name}", "-device", f"virtio-blk-pci,drive={name}"]
    with machine(tmp_path, *drives) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(DiskNeeded) as needed:
                await qmpmerge.commit(target)
            assert needed.value.known == ["vda", "vdb"]
            outcome = await qmpmerge.commit(target, "vdb")
            assert outcome.after.files == [str(second[0])]
            # With one chain left there is one disk that can be meant.
            assert (await qmpmerge.commit(target)).after.files == [str(first[0])]


# --- what is left behind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_merged_files_are_let_go(
    kind: str, top: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """Explicit nodes stay open after a commit, the old active one even locked: we close them, and nothing else."""
    inodes = {image.name: ("file", image.stat().st_dev, image.stat().st_ino) for image in images}
    with KINDS[kind](tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.commit(target, setup.disk, top=top)
            held = proc.open_files(setup.machine.process.pid)
        assert held is not None
        open_now = [name for name, inode in inodes.items() if inode in held]
        assert open_now == [image.name for image in outcome.after]
        assert not [hint for hint in outcome.hints if "still open" in hint]


async def test_filters_above_the_disk_stay(tmp_path: Path, images: list[Path], content: Content) -> None:
    """With the default top-node QEMU drops them: the guest's throttling would be gone."""
    with filters(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            await qmpmerge.commit(target)
            assert (await target.disk()).nodes == ("cor", "throttled", "base")


async def test_progress_tells_what_it_counts(setup: Setup, content: Content) -> None:
    seen: list[Progress] = []
    async with qmpmerge.live(setup.machine.target) as target:
        outcome = await qmpmerge.commit(target, top="[3]", report=seen.append)
        assert {told.counts for told in seen} <= {"scanned", "copied"}
        assert outcome.copied is not None and 0 < outcome.copied < len(content.data)
        assert seen[-1].done == seen[-1].total in (outcome.copied, len(content.data))
        remove(outcome)
        seen.clear()
        outcome = await qmpmerge.commit(target, report=seen.append)
        assert {told.counts for told in seen} == {"copied"}
        assert outcome.copied == seen[-1].done > 0
        assert outcome.copied < len(content.data)


async def test_a_stopped_follower_does_not_stop_the_next(setup: Setup, content: Content, images: list[Path]) -> None:
    """SIGKILL of the tool in the middle: the job is QEMU's, the next call finds it and ends it."""
    command = [sys.executable, "-m", "qmpmerge", "commit", setup.machine.target, "vda", "--top", "[3]", "--speed", "1"]
    tool = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.stderr is not None and tool.stdout is not None
    assert b'"progress"' in tool.stderr.readline()
    tool.kill()
    tool.communicate()
    async with qmpmerge.live(setup.machine.target) as target:
        await jobs.control(target.monitor, JOB, "speed", 0)
        assert (await qmpmerge.follow(target, JOB)).verdict == "merged"
    setup.check()
    setup.machine.stop()
    content.check(images[3])


async def test_a_quorum_is_not_said_to_have_nothing_below(tmp_path: Path, images: list[Path]) -> None:
    """Each of its images may have a chain of its own."""
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "x.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", other, "8M")
    quorum = "quorum,node-name=q,vote-threshold=1,children.0=c,children.1=x"
    arguments = [*nodes(images), *nodes([other]), "-blockdev", quorum, *device("q")]
    with machine(tmp_path, *arguments) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(SeveralImages) as refused:
                await qmpmerge.commit(target)
    assert (refused.value.driver, refused.value.images) == ("quorum", [str(images[3]), str(other)])


# --- a filter between the overlay and the layers below ------------------------------------------------------------------

BELOW = {
    "throttle": [
        *("-object", "throttle-group,id=g,x-iops-total=100000"),
        *("-blockdev", "throttle,node-name=f,throttle-group=g,file=b"),
    ],
    "blkdebug": ["-blockdev", "blkdebug,node-name=f,image=b"],
    "two": ["-blockdev", "blkdebug,node-name=f0,image=b", "-blockdev", "preallocate,node-name=f,file=f0,read-only=on"],
    "copy-on-read": ["-blockdev", "copy-on-read,node-name=f,file=b"],
}


def filtered(images: list[Path], kind: str) -> list[str]:
    """The nodes of the chain, with a filter called ``f`` below the active image."""
    arguments = nodes(images)
    if kind == "copy-on-read":  # it writes to what it reads
        arguments = [part.removesuffix(",read-only=on") if "node-name=b," in part else part for part in arguments]
    arguments[-1] = arguments[-1].replace("backing=b", "backing=f")
    return [*arguments[:-4], *BELOW[kind], *arguments[-4:], *device("c")]


@pytest.mark.parametrize("kind", BELOW)
async def test_a_filter_below_the_overlay_goes_with_what_is_merged(
    tmp_path: Path, images: list[Path], content: Content, kind: str
) -> None:
    with machine(tmp_path, *filtered(images, kind)) as vm:
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, top="[3]")
        assert (outcome.verdict, str(outcome.after)) == ("merged", "base.raw <-- c.qcow2")
        assert (outcome.after.active.backing, outcome.after.active.backing_format) == ("base.raw", "raw")
        assert any("node f, a filter" in hint for hint in outcome.hints)
        left = {node["node-name"] for node in vm.session.execute("query-named-block-nodes", flat=True)}
        assert left == {"base", "base-file", "c", "c-file"}
        vm.stop()
    content.check(images[3])


async def test_plain_block_commit_leaves_the_header_there(tmp_path: Path, images: list[Path]) -> None:
    """So a job that somebody has started like that is not brought to its end."""
    with machine(tmp_path, *filtered(images, "throttle")) as vm:
        begin = {"device": "c", "top_node": "b", "base_node": "base", "auto_finalize": False, "auto_dismiss": False}
        vm.session.execute("block-commit", job_id="theirs", **begin)
        vm.wait_for_job("pending")
        async with qmpmerge.live(vm.target) as target:
            for verb in ("follow", "finalize"):
                with pytest.raises(JobVerb, match="leave the overlay's header"):
                    await qmpmerge.control(target, "theirs", verb)
        vm.session.execute("job-finalize", id="theirs")
        vm.wait_for_job("concluded")
        assert '"backing-filename": "b.qcow2"' in faults.header(images[3])


@pytest.mark.parametrize("kind", ["throttle", "two"])
async def test_a_job_above_a_filter_is_taken_over(
    tmp_path: Path, images: list[Path], content: Content, kind: str
) -> None:
    with machine(tmp_path, *filtered(images, kind)) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(StillRunning):
                await qmpmerge.commit(target, top="[3]", speed=1, patience=qmpmerge.Patience(detach=True))
            outcome = await qmpmerge.commit(target, top="[3]", speed=0)
        assert (outcome.verdict, outcome.after.active.backing) == ("merged", "base.raw")
        left = {node["node-name"] for node in vm.session.execute("query-named-block-nodes", flat=True)}
        assert left == {"base", "base-file", "c", "c-file"}
        vm.stop()
    content.check(images[3])


# --- a disk that nobody uses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["[3]", None])
@pytest.mark.parametrize("named", ["all", "active"])
@pytest.mark.parametrize("also", [False, True])
async def test_a_daemon_that_is_started_only_to_merge(
    tmp_path: Path, images: list[Path], content: Content, top: str | None, named: str, also: bool
) -> None:
    """Nodes without a name go with the one above them; another disk may be exported meanwhile."""
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "x.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", other, "8M")
    server = ["-nbd-server", f"addr.type=unix,addr.path={tmp_path}/export", *nodes([other])]
    export = ["-export", "nbd,id=export0,node-name=x,writable=on"]
    only = [*("-blockdev", f"file,node-name=f,filename={images[3]}"), *("-blockdev", "qcow2,node-name=c,file=f")]
    arguments = [*(nodes(images) if named == "all" else only), *([*server, *export] if also else [])]
    options = [f"-{part}" if part.startswith("-") else part for part in arguments]
    with machine(tmp_path, *options, program="qemu-storage-daemon") as vm:
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, "c", top=top)
        assert outcome.verdict == ("merged" if top else "pivoted")
        assert str(outcome.after) == ("base.raw <-- c.qcow2" if top else "base.raw")
        left = {node["node-name"] for node in vm.session.execute("query-named-block-nodes", flat=True)}
        assert top is not None or named == "all" or left == ({"x", "x-file"} if also else set())
        vm.stop()
    content.check(outcome.after.active.file)
    assert not folder.litter(tmp_path)


@pytest.mark.parametrize("top", ["[3]", None])
async def test_a_disk_that_no_device_has(tmp_path: Path, images: list[Path], content: Content, top: str | None) -> None:
    only = [*("-blockdev", f"file,node-name=f,filename={images[3]}"), *("-blockdev", "qcow2,node-name=c,file=f")]
    with machine(tmp_path, *only) as vm:
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, top=top)
            assert outcome.verdict == ("merged" if top else "pivoted")
            assert {found.name for found in await qmpmerge.examine(target)} <= {"launch-path"} or top is not None
        vm.stop()
    content.check(outcome.after.active.file)


# --- another spelling of the same base ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["follow", "finalize"])
@pytest.mark.parametrize("base", ["base.raw", "base.qcow2"])
async def test_a_job_of_somebody_who_did_not_say_how_to_name_the_base(tmp_path: Path, base: str, verb: Verb) -> None:
    """QEMU has written an absolute path over a relative one; it is mended where QEMU records the right format with it."""
    images, content = make_chain(tmp_path, (base, "a.qcow2", "b.qcow2", "c.qcow2")), Content()
    fill(images, content)
    with blockdev(tmp_path, images, content) as setup:
        session = setup.machine.session
        nodes = {"device": "c", "top_node": "b", "base_node": "base"}
        session.execute("block-commit", job_id="theirs", **nodes, auto_finalize=False, auto_dismiss=False)
        setup.machine.wait_for_job("pending")
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.control(target, "theirs", verb)
            assert isinstance(outcome, qmpmerge.Outcome) and outcome.verdict == "merged"
            assert (await target.chain()).oddities == ()
        is_mended = base == "base.qcow2"
        assert outcome.after.active.backing == (base if is_mended else str(images[0]))
        commands = [command for hint in outcome.hints for command in re.findall("`(qemu-img [^`]+)`", hint)]
        assert len(commands) == (0 if is_mended else 1)
        setup.off()
    for command in commands:
        run(*shlex.split(command))
    assert f'"backing-filename": "{base}"' in faults.header(images[3])
    assert f'"backing-filename-format": "{images[0].suffix[1:]}"' in faults.header(images[3])
    content.check(images[3])
