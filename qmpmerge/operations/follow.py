"""Follow a job that is there already."""

import asyncio
import contextlib
from typing import TYPE_CHECKING, NoReturn

from qmpmerge.chain.outcome import Ending, Outcome, Policy
from qmpmerge.chain.plan import Plan
from qmpmerge.checks import known_bad
from qmpmerge.engine import directions, earlier, go, time_limit
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.engine.pace.progress import Report, unreported
from qmpmerge.engine.request import Request
from qmpmerge.engine.run import Run
from qmpmerge.errors import JobFailed, JobVerb, NotProven, refuse
from qmpmerge.journal import locks, store
from qmpmerge.journal.record import Record
from qmpmerge.qemu import bitmaps, jobs, vmstate
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.target import ChainView, Target

if TYPE_CHECKING:
    from qmpmerge.engine.pace.converge import Converge

LOOKS = 5
"""How often a job to be followed is looked for again when it has moved on between two questions."""

LOOK_AGAIN_SECONDS = 0.2
"""How long a drain may put a job that is ready into standby (milliseconds) before we take it for a user's pause."""


async def follow(
    target: Target,
    job_id: str,
    *,
    ending: Ending = "pivot",
    needs_ready: bool = False,
    merged_files: Policy | None = None,
    pause: bool = True,
    converge: "Converge | None" = None,
    report: Report | None = None,
    timeout: float | None = None,
    patience: Patience | None = None,
    polite: float | None = None,
) -> Outcome:
    """
    Go on with a job that is there already, as if `commit` or `pull` had started it: the plan is read from the block graph.
    `job_id` may also be the disk that it is on.
    Dirty bitmaps come along where they can: nobody knows any more what was wanted, and none is lost like that.

    `needs_ready` refuses a job that is not ready yet instead of waiting for it. Raises NoSuchJob, JobVerb, VmState, KnownBad
    for a pivot that may crash QEMU, and all that `commit` raises once its job runs.
    """
    request = Request(
        ending=ending,
        merged_files=merged_files,
        pause=pause,
        converge=converge,
        polite=polite,
        patience=patience or Patience(timeout),
    )
    with contextlib.ExitStack() as stack:
        async with time_limit.in_time(request.patience):
            run = await _begun(target, job_id, request, report or unreported, needs_ready=needs_ready, stack=stack)
        return await go.go(run)


async def _begun(
    target: Target, job_id: str, request: Request, report: Report, *, needs_ready: bool, stack: contextlib.ExitStack
) -> Run:
    """The merge that the job carries out, or has carried out."""
    for _ in range(LOOKS):
        layout, job = await _job_to_follow(target, job_id, request.ending if needs_ready else None, request.patience)
        view = await _view_of(target, layout, job)
        record = earlier.of_job(store.believed(store.about(view.chain)), job) if view is not None else None
        planned = await _planned(target, view, job, record)
        if view is not None and planned is not None:
            break
        await asyncio.sleep(LOOK_AGAIN_SECONDS / LOOKS)  # it is on its way to another state
    else:
        raise JobVerb(job=job_id, verb="follow", status="at work on nodes that are not of one chain", verbs=["cancel"])
    if earlier.leaves_header(view, planned, job):
        status = "at work below a filter, whose end would leave the overlay's header as it is,"
        raise JobVerb(job=job.id, verb="follow", status=status, verbs=["cancel"])
    await vmstate.check(target.monitor, view.layout.nodes_of(view.disk))
    if job.status != "concluded":
        request.refuse_ending_of(planned)
        earlier.refuse_displaced(target, view, record, planned)
    if planned.pivots and request.ending == "pivot" and job.status != "concluded":
        refuse([bad async for bad in known_bad.of_pivot(target.monitor, view)])
    lock = stack.enter_context(locks.taken_for(planned))
    record = earlier.as_left(record)
    run = Run.resume(target, directions.operation(planned), request, lock, view=view, record=record, report=report)
    run.bitmaps = () if job.status == "concluded" else bitmaps.portable(view.layout, planned)
    return run


async def _planned(target: Target, view: ChainView | None, job: Job, record: Record | None) -> Plan | None:
    """What the job does, or has done; None where it is on its way to another state."""
    if job.status == "concluded":
        if view is None or record is None or not record.is_done(view.chain):
            await _raise_unseen_end(target, view, job, record)
        return record.as_called_now(view.chain)
    return earlier.plan_of(view, job) if view is not None else None


async def _job_to_follow(
    target: Target, job_id: str, ready_for: Ending | None, patience: Patience
) -> tuple[Layout, Job]:
    """The job, and all that was seen together with it."""
    layout, job = await _look(target, job_id)
    if job.status == "aborting":  # it holds no nodes any more, so whose it was is not known before it has ended
        await jobs.ended(target.monitor, job.id, patience.deadline)
        layout, job = await _look(target, job_id)
    for _ in range(LOOKS):
        in_standby = job.status == "standby" and ready_for is not None
        has_just_ended = job.disk is None and job.status != "concluded"  # QEMU told of it, and then of no nodes of it
        if not (in_standby or has_just_ended):
            break
        await asyncio.sleep(LOOK_AGAIN_SECONDS / LOOKS)
        layout, job = await _look(target, job_id)
    if not job.can_be_followed or (ready_for is not None and job.status != "ready"):
        raise JobVerb(job=job.id, verb=ready_for or "follow", status=f"{job.status} ({job.type})", verbs=job.verbs)
    if job.disk is None and job.status != "concluded":
        raise JobVerb(job=job.id, verb="follow", status="on a disk that QEMU does not tell", verbs=["cancel"])
    return layout, job


async def _look(target: Target, name: str) -> tuple[Layout, Job]:
    layout = await target.layout()
    return layout, layout.find_job(name, target.name)


async def _view_of(target: Target, layout: Layout, job: Job) -> ChainView | None:
    """The chain that the job is, or was, at work on; None where nobody can tell."""
    disk = next((disk for disk in layout.disks if disk.name == job.disk or jobs.job_id(disk.name) == job.id), None)
    return None if disk is None or disk.chain is None else await target.view(layout, disk.name)


async def _raise_unseen_end(target: Target, view: ChainView | None, job: Job, record: Record | None) -> NoReturn:
    """
    A job that ended while nobody looked, and not as its record says that it was to: an error is told.

    Without an error and without a record it may have switched or been let go, durably or not: what it was to do is not
    known any more, so the chain is shown as it is now and nothing is claimed.
    """
    await earlier.dismiss(target, record, job)
    if job.reason is not None:
        raise JobFailed(job=job.id, reason=job.reason)
    found = f"that it had ended before we looked; the chain now is {view.chain if view else 'unknown'}"
    raise NotProven(target=target.name, expected=f"job {job.id} at work", found=found)
