"""
Merging: what to send, in which order.

    intermediate    plan -> checks -> block-commit -> PENDING -> flush base -> job-finalize -> flush overlay -> proof
    active          plan -> checks -> block-commit -> READY -> pause, job-complete, run -> proof

A plain `block-commit` is not safe; each step here avoids a harm that tests/test_merge.py pins. An intermediate merge
waits at PENDING until base is durable, since QEMU rewrites the overlay's header first and flushes afterwards. An active
merge is never held there: it would freeze the guest.

Success is read back: a fresh discovery of the graph and the header on disk must equal `plan.result`, or the outcome is
*unknown*. What an earlier qmpmerge has begun is gone on with from where it stands (`adopting`).
"""

import asyncio
import contextlib
from collections.abc import Collection
from dataclasses import dataclass

from qmpmerge import adopting, checks, course, jobs, locks, plan, recovery, steps, switch, witness
from qmpmerge import bitmaps as dirty
from qmpmerge.bitmaps import Bitmap, Handling
from qmpmerge.converge import Converge
from qmpmerge.course import Begun
from qmpmerge.errors import JobFailed, JobVerb, LiveOnly, NoSuchJob, NoSuchLayer, NotProven, OptionsConflict
from qmpmerge.hosts import ChainView, Host
from qmpmerge.jobs import Job, Progress, Report
from qmpmerge.outcome import Ending, Outcome
from qmpmerge.patience import Patience
from qmpmerge.plan import CommitPlan
from qmpmerge.witness import Policy

LOOKS = 5
"""How often a job to be followed is looked for again when it has moved on between two questions."""

LOOK_AGAIN_SECONDS = 0.2
"""How long a drain may put a job that is ready into standby (milliseconds) before we take it for a user's pause."""


async def commit(
    host: Host,
    disk: str | None = None,
    *,
    base: str | None = None,
    top: str | None = None,
    shallow: bool = False,
    ending: Ending = "pivot",
    speed: int = 0,
    verify: bool | None = None,
    bitmaps: Handling = "refuse",
    merged_files: Policy = "stash",
    pause: bool = True,
    force: Collection[str] = (),
    search: Collection[str] = (),
    dry_run: bool = False,
    converge: Converge | None = None,
    report: Report = lambda progress: None,
    timeout: float | None = None,
    patience: Patience | None = None,
    polite: float | None = None,
) -> Outcome:
    """
    Merge the images above `base` up to `top` into `base`; by default the whole chain, the guest moving onto its base.

    `verify` compares what base shows with what top shows, in another process, before anything is switched; None does so
    where it is cheap, True does so for an active merge while the guest is paused. `merged_files` says what becomes of
    them; to delete them they must be compared. `pause` lets the guest stand still for the milliseconds of the pivot:
    without it nobody can tell which image is right if QEMU and we die during it. `bitmaps` says what becomes of the
    dirty bitmaps of merged images. `force` and `search` are those of `checks.check`. `speed` is bytes a second, 0 for
    unlimited; `timeout` seconds, after which StillRunning is raised and the job goes on; `patience` says more than that,
    in its place. `converge` allows to slow down or pause a guest that writes as fast as is copied. With `polite`, the
    monitor is left to others for so many seconds between two looks at the job; the two do not go together.

    A job of an earlier qmpmerge that does this very thing is taken over, and what it has done already is only proved.

    Cancelling the task cancels the job and waits until the old chain is back; from the switch to the proof it waits.

    What an earlier merge of the chain left unfinished is put right first, where that is beyond doubt. If that was this
    very merge, its outcome is returned.

    Raises subclasses of Refused before anything is sent, of Failed when the job failed, of Unknown when the outcome
    could not be proved, StillRunning, TimeUp.
    """
    _refuse_both(converge, polite)
    patience = patience or Patience(timeout)
    wanted = _Wanted(
        base,
        top,
        shallow,
        ending,
        speed,
        verify,
        bitmaps,
        merged_files,
        pause,
        force,
        search,
        dry_run,
        report,
        patience,
    )
    with contextlib.ExitStack() as stack:
        async with course.in_time(patience):
            view = await host.chain(disk)
            view = view if dry_run else await adopting.tidied(host, view, report)
            begun = _ended_unseen(host, view, wanted, stack) or await _settled(host, view, disk, wanted, stack)
        return begun if isinstance(begun, Outcome) else await course.run(begun, polite=polite, converge=converge)


def _refuse_both(converge: Converge | None, polite: float | None) -> None:
    """Whoever helps a guest must have the monitor at hand."""
    if converge is not None and polite is not None:
        raise OptionsConflict(options=["--converge", "--polite"])


@dataclass(frozen=True)
class _Wanted:
    """What `commit` was asked for."""

    base: str | None
    top: str | None
    shallow: bool
    ending: Ending
    speed: int
    verify: bool | None
    bitmaps: Handling
    merged_files: Policy
    pause: bool
    force: Collection[str]
    search: Collection[str]
    dry_run: bool
    report: Report
    patience: Patience


def _ended_unseen(host: Host, view: ChainView, wanted: _Wanted, stack: contextlib.ExitStack) -> Begun | None:
    """The merge that is asked for, where an earlier qmpmerge has made it and nobody has proved it yet."""
    earlier = adopting.find(view.chain)
    if wanted.dry_run or earlier is None or not earlier.is_done(view.chain):
        return None
    if not earlier.is_what(base=wanted.base, top=wanted.top, shallow=wanted.shallow):
        return None
    lock = stack.enter_context(locks.held(adopting.place(earlier.plan)))
    revived = adopting.revived(
        host, view, earlier, ending=wanted.ending, report=wanted.report, patience=wanted.patience
    )
    revived.policy = wanted.merged_files
    return Begun(revived, lock)


async def _settled(
    host: Host, view: ChainView, disk: str | None, wanted: _Wanted, stack: contextlib.ExitStack
) -> Begun | Outcome:
    """The merge that is asked for, once what an earlier one left is put right: that may be all there was to do."""
    if wanted.dry_run or not witness.about(view.chain):
        return await _begun(host, view, wanted, stack)
    settled = await recovery.settle(host, view.chain)
    view = await host.chain(disk)
    try:
        begun = await _begun(host, view, wanted, stack)
    except NoSuchLayer:
        if settled is None:
            raise
        return settled  # the layer was merged away by what was just finished
    return settled or begun if isinstance(begun, Outcome) and begun.verdict == "unchanged" else begun


async def _begun(host: Host, view: ChainView, wanted: _Wanted, stack: contextlib.ExitStack) -> Begun | Outcome:
    """The merge that is asked for: taken over where its job is at work, else checked; an outcome where that is all."""
    planned = plan.commit(view.chain, disk=view.disk.name, base=wanted.base, top=wanted.top, shallow=wanted.shallow)
    if planned.is_empty:
        return Outcome("unchanged", view.disk.name, view.chain, view.chain)
    _refuse_to_leave(host, wanted)
    if wanted.verify is True and not wanted.pause and planned.pivots and host.is_live:
        raise OptionsConflict(options=["--verify", "--no-pause"])
    lock = stack.enter_context(locks.held(adopting.place(planned)))
    suspect = adopting.suspicion(planned)
    job = None if wanted.dry_run else adopting.under_way(view, planned)
    found = None if job is not None else await _checked(host, view, planned, wanted)
    if job is None:
        await adopting.refuse_suspect(host, planned, suspect)
    else:
        wanted.report(adopting.found(view, job))
        await jobs.set_speed(host.monitor, job, wanted.speed)
    if wanted.dry_run and found is not None:
        return switch.planned(view.disk.name, planned, wanted.merged_files, found.checks, found.estimate)
    merge = steps.begin(
        host,
        view,
        planned,
        wanted.ending,
        wanted.report,
        wanted.patience,
        wanted.verify if suspect is None else True,
        policy=wanted.merged_files,
        pauses=wanted.pause,
    )
    merge.suspect = suspect
    merge.bitmaps = found.bitmaps if found is not None else _portable(view, planned, wanted)
    return Begun(merge, lock, None if job else wanted.speed)


def _portable(view: ChainView, planned: CommitPlan, wanted: _Wanted) -> tuple[Bitmap, ...]:
    """Whoever has started the job was not refused for its bitmaps, so what can come along does."""
    return () if wanted.bitmaps == "drop" else dirty.portable(view.layout, planned)


async def _checked(host: Host, view: ChainView, planned: CommitPlan, wanted: _Wanted) -> checks.Answer:
    return await checks.check(
        host,
        view,
        planned,
        ending=wanted.ending,
        handling=wanted.bitmaps,
        force=wanted.force,
        search=wanted.search,
        speed=wanted.speed,
        closely=wanted.dry_run,
    )


def _refuse_to_leave(host: Host, wanted: _Wanted) -> None:
    """Offline nothing goes on without us."""
    if not host.is_live and (wanted.ending == "ready" or wanted.patience.detach):
        raise LiveOnly(option="--detach" if wanted.patience.detach else "--wait-ready")


async def follow(
    host: Host,
    job_id: str,
    *,
    ending: Ending = "pivot",
    needs_ready: bool = False,
    merged_files: Policy = "stash",
    pause: bool = True,
    converge: Converge | None = None,
    report: Report = lambda progress: None,
    timeout: float | None = None,
    patience: Patience | None = None,
    polite: float | None = None,
) -> Outcome:
    """
    Go on with a commit job that is there already, as if `commit` had started it: the plan is read from the block graph.
    Dirty bitmaps come along where they can: nobody knows any more what was wanted, and none is lost like that.

    `needs_ready` refuses a job that is not ready yet instead of waiting for it. Raises NoSuchJob, JobVerb, and all that
    `commit` raises once its job runs.
    """
    _refuse_both(converge, polite)
    patience = patience or Patience(timeout)
    with contextlib.ExitStack() as stack:
        async with course.in_time(patience):
            begun = await _found(host, job_id, ending if needs_ready else None, stack, patience)
        begun.merge.ending = ending
        begun.merge.report = report
        begun.merge.policy = merged_files
        begun.merge.pauses = pause
        if merged_files == "delete":
            begun.merge.verify = True
        return await course.run(begun, polite=polite, converge=converge)


async def _found(
    host: Host, job_id: str, ready_for: Ending | None, stack: contextlib.ExitStack, patience: Patience
) -> Begun:
    """The merge that the job carries out, or has carried out."""
    for _ in range(LOOKS):
        job = await _job_to_follow(host, job_id, ready_for, patience)
        if job.status == "concluded":
            return await _read_concluded(host, job, stack, patience)
        view = await host.chain(job.disk)
        planned = adopting.plan_of(view, job)
        if planned is not None:
            break
        await asyncio.sleep(LOOK_AGAIN_SECONDS / LOOKS)  # it is on its way to another state
    else:
        raise JobVerb(job=job_id, verb="follow", status="at work on nodes that are not of one chain", verbs=["cancel"])
    lock = stack.enter_context(locks.held(adopting.place(planned)))
    suspect = adopting.suspicion(planned)
    merge = steps.begin(host, view, planned, "pivot", _silently, patience, None if suspect is None else True)
    merge.suspect = suspect
    merge.bitmaps = dirty.portable(view.layout, planned)
    return Begun(merge, lock)


def _silently(progress: Progress) -> None:
    """Nobody has said yet to whom it is reported."""


async def _job_to_follow(host: Host, job_id: str, ready_for: Ending | None, patience: Patience) -> Job:
    job = await _look(host, job_id)
    if job.status == "aborting":  # it holds no nodes any more, so whose it was cannot be told before it has ended
        await jobs.ended(host.monitor, job_id, patience.deadline)
        job = await _look(host, job_id)
    for _ in range(LOOKS):
        in_standby = job.status == "standby" and ready_for is not None
        has_just_ended = job.disk is None and job.status != "concluded"  # QEMU told of it, and then of no nodes of it
        if not (in_standby or has_just_ended):
            break
        await asyncio.sleep(LOOK_AGAIN_SECONDS / LOOKS)
        job = await _look(host, job_id)
    if job.type != "commit" or (ready_for is not None and job.status != "ready"):
        raise JobVerb(job=job.id, verb=ready_for or "follow", status=f"{job.status} ({job.type})", verbs=job.verbs)
    if job.disk is None and job.status != "concluded":
        raise JobVerb(job=job.id, verb="follow", status="on a disk that QEMU does not tell", verbs=["cancel"])
    return job


async def _look(host: Host, job_id: str) -> Job:
    layout = await host.layout()
    job = next((job for job in layout.jobs if job.id == job_id), None)
    if job is None:
        raise NoSuchJob(job=job_id, target=host.target, known=[job.id for job in layout.jobs])
    return job


async def _read_concluded(host: Host, job: Job, stack: contextlib.ExitStack, patience: Patience) -> Begun:
    """
    A job that ended while nobody looked: an error is told; what its note says that it was to do, is proved.

    Without an error and without a note it may have switched or been let go, durably or not: what it was to do is not
    known any more, so the chain is shown as it is now and nothing is claimed.
    """
    layout = await host.layout()
    disk = next((disk for disk in layout.disks if disk.name == job.disk or jobs.job_id(disk.name) == job.id), None)
    view = await host.chain(disk.name) if disk is not None else None
    earlier = adopting.find(view.chain) if view is not None else None
    if view is not None and earlier is not None and earlier.job == job.id and earlier.is_done(view.chain):
        lock = stack.enter_context(locks.held(adopting.place(earlier.plan)))
        revived = adopting.revived(host, view, earlier, ending="pivot", report=_silently, patience=patience)
        return Begun(revived, lock)
    if view is not None:
        await adopting.dismiss(host, view.chain, job)
    else:
        await jobs.dismiss(host.monitor, job.id)
    if job.error is not None:
        raise JobFailed(job=job.id, reason=job.error)
    found = f"that it had ended before we looked; the chain now is {view.chain if view else 'unknown'}"
    raise NotProven(target=host.target, expected=f"job {job.id} at work", found=found)
