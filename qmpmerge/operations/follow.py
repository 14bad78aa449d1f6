"""Follow a commit job that is there already."""

import asyncio
import contextlib

from qmpmerge.chain.outcome import Ending, Outcome, Policy
from qmpmerge.engine import operation, run, takeover
from qmpmerge.engine.converge import Converge
from qmpmerge.engine.operation import Begun
from qmpmerge.engine.patience import Patience
from qmpmerge.engine.progress import Progress, Report
from qmpmerge.errors import JobFailed, JobVerb, NoSuchJob, NotProven
from qmpmerge.journal import locks, note
from qmpmerge.operations import commit
from qmpmerge.qemu import bitmaps, jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.target import Host

LOOKS = 5
"""How often a job to be followed is looked for again when it has moved on between two questions."""

LOOK_AGAIN_SECONDS = 0.2
"""How long a drain may put a job that is ready into standby (milliseconds) before we take it for a user's pause."""


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
    commit.refuse_both(converge, polite)
    patience = patience or Patience(timeout)
    with contextlib.ExitStack() as stack:
        async with run.in_time(patience):
            begun = await _found(host, job_id, ending if needs_ready else None, stack, patience)
        begun.merge.ending = ending
        begun.merge.report = report
        begun.merge.policy = merged_files
        begun.merge.pauses = pause
        if merged_files == "delete":
            begun.merge.verify = True
        return await run.run(begun, polite=polite, converge=converge)


async def _found(
    host: Host, job_id: str, ready_for: Ending | None, stack: contextlib.ExitStack, patience: Patience
) -> Begun:
    """The merge that the job carries out, or has carried out."""
    for _ in range(LOOKS):
        job = await _job_to_follow(host, job_id, ready_for, patience)
        if job.status == "concluded":
            return await _read_concluded(host, job, stack, patience)
        view = await host.chain(job.disk)
        planned = takeover.plan_of(view, job)
        if planned is not None:
            break
        await asyncio.sleep(LOOK_AGAIN_SECONDS / LOOKS)  # it is on its way to another state
    else:
        raise JobVerb(job=job_id, verb="follow", status="at work on nodes that are not of one chain", verbs=["cancel"])
    lock = stack.enter_context(locks.held(note.place(planned)))
    suspect = note.suspicion(planned)
    merge = operation.begin(host, view, planned, "pivot", _silently, patience, None if suspect is None else True)
    merge.suspect = suspect
    merge.bitmaps = bitmaps.portable(view.layout, planned)
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
    earlier = note.find(view.chain) if view is not None else None
    if view is not None and earlier is not None and earlier.job == job.id and earlier.is_done(view.chain):
        lock = stack.enter_context(locks.held(note.place(earlier.plan)))
        revived = takeover.revived(host, view, earlier, ending="pivot", report=_silently, patience=patience)
        return Begun(revived, lock)
    if view is not None:
        await takeover.dismiss(host, view.chain, job)
    else:
        await jobs.dismiss(host.monitor, job.id)
    if job.error is not None:
        raise JobFailed(job=job.id, reason=job.error)
    found = f"that it had ended before we looked; the chain now is {view.chain if view else 'unknown'}"
    raise NotProven(target=host.target, expected=f"job {job.id} at work", found=found)
