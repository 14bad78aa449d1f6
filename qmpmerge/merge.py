"""
Merging: what to send, in which order.

    intermediate    plan -> checks -> block-commit -> PENDING -> flush base -> job-finalize -> flush overlay -> proof
    active          plan -> checks -> block-commit -> READY -> job-complete -> proof

A plain `block-commit` is not safe; each step here avoids a harm that tests/test_merge.py pins. An intermediate merge
waits at PENDING until base is durable, since QEMU rewrites the overlay's header first and flushes afterwards. An active
merge is never held there: it would freeze the guest.

Success is read back: a fresh discovery of the graph and the header on disk must equal `plan.result`, or the outcome is
*unknown*.
"""

import asyncio
import time
from collections.abc import Collection, Coroutine
from typing import NoReturn

from qmpmerge import account, checks, jobs, locks, pausing, pivot, plan, recovery, shield, steps, switch, witness
from qmpmerge.errors import (
    Failed,
    JobFailed,
    JobVerb,
    LiveOnly,
    NoSuchJob,
    NoSuchLayer,
    NotProven,
    OptionsConflict,
    StillRunning,
    TimedOut,
    Untouched,
)
from qmpmerge.hosts import ChainView, Host
from qmpmerge.jobs import Job, Report
from qmpmerge.monitor import Doorbell
from qmpmerge.outcome import Ending, Outcome
from qmpmerge.plan import CommitPlan
from qmpmerge.steps import Merge
from qmpmerge.witness import Policy

LOOKS = 5
"""How often a job to be followed is looked for again when it has moved on between two questions."""


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
    force: Collection[str] = (),
    search: Collection[str] = (),
    dry_run: bool = False,
    merged_files: Policy = "stash",
    pause: bool = True,
    report: Report = lambda progress: None,
    timeout: float | None = None,
) -> Outcome:
    """
    Merge the images above `base` up to `top` into `base`; by default the whole chain, the guest moving onto its base.

    `verify` compares what base shows with what top shows, in another process, before anything is switched; None does so
    where it is cheap, True does so for an active merge while the guest is paused. `merged_files` says what becomes of
    them; to delete them they must be compared. `pause` lets the guest stand still for the milliseconds of the pivot: without
    it nobody can tell which image is right if QEMU and we die during it. `force` and `search` are those of
    `checks.check`. `speed` is bytes a second, 0 for unlimited; `timeout` seconds, after which StillRunning is raised and
    the job goes on.

    Cancelling the task cancels the job and waits until the old chain is back; from the switch to the proof it waits.

    What an earlier merge of the chain left unfinished is put right first, where that is beyond doubt. If that was this very
    merge, its outcome is returned.

    Raises subclasses of Refused before anything is sent, of Failed when the job failed, of Unknown when the outcome
    could not be proved.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    view = await host.chain(disk)
    settled = None
    if not dry_run and witness.about(view.chain):
        settled = await recovery.settle(host, view.chain)
        view = await host.chain(disk)
    try:
        planned = plan.commit(view.chain, disk=view.disk.name, base=base, top=top, shallow=shallow)
    except NoSuchLayer:
        if settled is None:
            raise
        return settled  # the layer was merged away by what was just finished
    if planned.is_empty:
        return settled or Outcome("unchanged", view.disk.name, view.chain, view.chain)
    if verify is True and not pause and planned.pivots and host.is_live:
        raise OptionsConflict(options=["--verify", "--no-pause"])
    if ending == "ready" and not host.is_live:
        raise LiveOnly(option="--wait-ready")
    with locks.held(planned.base):
        await checks.check(host, view, planned, force=force, search=search)
        if dry_run:
            return Outcome(
                "planned",
                view.disk.name,
                planned.chain,
                planned.result,
                merged=switch.merged_files(planned, merged_files),
            )
        merge = steps.begin(host, view, planned, ending, report, deadline, verify, policy=merged_files, pauses=pause)
        async with host.monitor.listening() as doorbell:
            return await _run(merge, doorbell, starting=steps.start(merge, speed))


async def follow(
    host: Host,
    job_id: str,
    *,
    ending: Ending = "pivot",
    needs_ready: bool = False,
    merged_files: Policy = "stash",
    pause: bool = True,
    report: Report = lambda progress: None,
    timeout: float | None = None,
) -> Outcome:
    """
    Go on with a commit job that is there already, as if `commit` had started it: the plan is read from the block graph.

    `needs_ready` refuses a job that is not ready yet instead of waiting for it. Raises NoSuchJob, JobVerb, and all that
    `commit` raises once its job runs.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    ready_for = ending if needs_ready else None
    job = await _job_to_follow(host, job_id, ready_for)
    for _ in range(LOOKS):
        if job.status == "concluded":
            await _read_concluded(host, job)
        view = await host.chain(job.disk)
        planned = _plan_of(view, job)
        if planned is not None:
            break
        job = await _job_to_follow(host, job_id, ready_for)
    else:
        raise JobVerb(job=job.id, verb="follow", status="at work on nodes that are not of one chain", verbs=["cancel"])
    merge = steps.begin(host, view, planned, ending, report, deadline, policy=merged_files, pauses=pause)
    with locks.held(planned.base):
        async with host.monitor.listening() as doorbell:
            return await _run(merge, doorbell)


async def _job_to_follow(host: Host, job_id: str, ready_for: Ending | None) -> Job:
    layout = await host.layout()
    job = next((job for job in layout.jobs if job.id == job_id), None)
    if job is None:
        raise NoSuchJob(job=job_id, target=host.target, known=[job.id for job in layout.jobs])
    if job.type != "commit" or (ready_for is not None and job.status != "ready"):
        raise JobVerb(job=job.id, verb=ready_for or "follow", status=f"{job.status} ({job.type})", verbs=job.verbs)
    if job.disk is None and job.status != "concluded":
        raise JobVerb(job=job.id, verb="follow", status="on a disk that QEMU does not tell", verbs=["cancel"])
    return job


def _plan_of(view: ChainView, job: Job) -> CommitPlan | None:
    """The plan that a running commit job carries out, read from the nodes it holds; None when it has just ended."""
    edges = view.layout.job_edges.get(job.id, {})
    if "target" in edges:
        base, top = edges["target"][0], edges["source"][0]
    elif "base" in edges:
        base, top = edges["base"][0], edges["intermediate node"][0]
    else:
        return None
    inside = [image.node for image in view.chain]
    if base not in inside or top not in inside:
        return None
    if "base" in edges:
        top = next(node for node in reversed(inside) if node in edges["intermediate node"]) or top
    return plan.commit(view.chain, disk=view.disk.name, base=base, top=top)


async def _read_concluded(host: Host, job: Job) -> NoReturn:
    """
    A job that ended while nobody looked: its error is told, the chain is shown as it is now, nothing is claimed.

    Without an error it may have switched or been let go, durably or not: what it was to do is not known any more.
    """
    layout = await host.layout()
    disk = next((disk for disk in layout.disks if disk.name == job.disk or jobs.job_id(disk.name) == job.id), None)
    await jobs.dismiss(host.monitor, job.id)
    if job.error is not None:
        raise JobFailed(job=job.id, reason=job.error)
    found = f"that it had ended before we looked; the chain now is {disk.chain if disk else 'unknown'}"
    raise NotProven(target=host.target, expected=f"job {job.id} at work", found=found)


async def _run(merge: Merge, doorbell: Doorbell, *, starting: Coroutine[None, None, None] | None = None) -> Outcome:
    """
    Carry it out, with a witness: that goes when the outcome is known, and stays when it is not, or the job goes on.
    """
    account.begin(merge)
    if merge.plan.pivots and merge.host.is_live and merge.pauses and merge.ending == "pivot":
        merge.guard = pausing.Guard.start(merge.host.monitor)
    try:
        return await _carried_out(merge, doorbell, starting=starting)
    except (Untouched, Failed, asyncio.CancelledError):  # the old chain was proved to be in use
        account.take_back(merge)
        raise
    finally:
        account.leave(merge)


async def _carried_out(
    merge: Merge, doorbell: Doorbell, *, starting: Coroutine[None, None, None] | None = None
) -> Outcome:
    """
    From a job that is being started, or runs, to a proved outcome.

    Cancelled before the switch it takes the job back, even one whose start was not confirmed yet; after it, it waits.
    """
    mine = starting is not None or merge.job.startswith(jobs.PREFIX)
    try:
        if starting is not None:
            await starting
        return await _to_the_end(merge, doorbell)
    except asyncio.CancelledError:
        if not mine:  # leaving somebody else's job is not ending it
            raise StillRunning(target=merge.host.target, job=merge.job) from None
        await shield.finished(steps.take_back(merge, doorbell))
        raise
    except StillRunning:
        if merge.host.is_live:
            option = {"pivot": "", "keep": " --keep-overlay", "ready": " --wait-ready"}[merge.ending]
            raise StillRunning(target=merge.host.target, job=merge.job, option=option) from None
        await shield.finished(steps.take_back(merge, doorbell))
        raise TimedOut(job=merge.job) from None


async def _to_the_end(merge: Merge, doorbell: Doorbell) -> Outcome:
    """What cannot be looked at once the job was started is not refused, as if nothing had been done: it is unknown."""
    try:
        job = await steps.copy(merge, doorbell)
        if job is not None and job.status == "ready" and merge.ending == "ready":
            return switch.ready(merge)
        if job is not None and job.status == "pending":
            await steps.make_base_durable(merge, doorbell)
            await steps.verify(merge, doorbell)
        elif job is not None and steps.is_at_rest(merge, job):
            await steps.verify(merge, doorbell)  # an active job has flushed base before it says that it is ready
        if job is not None and job.status == "ready" and merge.ending == "pivot" and merge.plan.pivots:
            job = await pivot.pivot(merge, doorbell, job.status)
        return await shield.finished(switch.switch(merge, doorbell, job))
    except Untouched as error:
        found = f"no way to look: {error}"
        raise NotProven(target=merge.host.target, expected=str(merge.plan.result), found=found) from None
