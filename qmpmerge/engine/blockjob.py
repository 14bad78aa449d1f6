"""The block job of an operation: followed to where it waits for us, told to end, or taken back."""

import contextlib
import errno
import os
import time
from dataclasses import replace

from qmpmerge import shield
from qmpmerge.chain.state import State
from qmpmerge.engine import proof
from qmpmerge.engine.pace import progress
from qmpmerge.engine.pace.progress import Meter, Shortage
from qmpmerge.engine.run import Run
from qmpmerge.errors import CutShort, JobFailed, NotProven, OutOfQuota, QemuRefused, RecordFailed, StillRunning
from qmpmerge.images import lengths
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.targets import identity

CANCEL_SECONDS = 60.0


async def end(run: Run, doorbell: Doorbell, status: str, *, keeps: bool = False) -> Job | None:
    """Tell the job to end, and wait until it has. Raises what `see_names` does."""
    return await ended(run, doorbell, await tell_to_end(run, doorbell, status, keeps=keeps), keeps=keeps)


async def tell_to_end(run: Run, doorbell: Doorbell, status: str, *, keeps: bool = False) -> tuple[str, ...]:
    """
    Tell the job, which has this status, to end; returns those in which it is to be looked at then. Raises what `see_names`
    does.
    """
    monitor = run.target.monitor
    await see_names(run, doorbell)
    run.log(
        "told-to-end",
        "{status}, told to end{keeping}",
        status=status,
        keeping=" and to keep the overlay" if keeps else "",
    )
    try:
        if status == "pending":
            await monitor.execute("job-finalize", id=run.job)
        elif keeps:
            await monitor.execute("block-job-cancel", device=run.job, force=False)
        else:
            await monitor.execute("job-complete", id=run.job)
    except QemuRefused:
        # A drain by somebody else can put a ready job into standby for a moment: wait for it and say it again.
        # A pending job of ours is on its way already.
        await doorbell.wait(jobs.LOOK_AGAIN_SECONDS / 5)
        return ("concluded", status) if status == "ready" else ("concluded",)
    # Somebody else's active job may want to be finalized too, and the guest stands still until it is.
    return ("concluded", "pending") if status == "ready" else ("concluded",)


async def ended(
    run: Run, doorbell: Doorbell, wanted: tuple[str, ...] = ("concluded",), *, keeps: bool = False
) -> Job | None:
    """
    Wait until the job has ended, which was told to; in another of the `wanted` states it is told again. Raises what
    `see_names` does.
    """
    deadline = run.deadline if run.target.is_live else None
    while True:
        job = await jobs.follow(run.target.monitor, doorbell, run.job, wanted, tell=lambda job: None, deadline=deadline)
        if job is None or job.status == "concluded":
            return job
        wanted = await tell_to_end(run, doorbell, job.status, keeps=keeps)


async def see_recorded(run: Run, doorbell: Doorbell) -> None:
    """What was written down before the job must be durable. Raises RecordFailed with the job taken back."""
    try:
        await run.recorded()
    except OSError as error:
        await shield.finished(take_back(run, doorbell))
        raise record_failed(run, error) from None


def record_failed(run: Run, error: OSError) -> RecordFailed:
    """The error to raise once the job is taken back."""
    path = run.record.path if run.record is not None else error.filename or run.lock.path
    return RecordFailed(path=path, reason=error.strerror or str(error))


async def finalize(run: Run, doorbell: Doorbell, job: Job) -> Job | None:
    """
    Past the point of return: written down, then the job rewrites the overlay's header. Returns it as it ended. Raises
    RecordFailed with the job taken back, and what `see_names` does.
    """
    run.past_return = True
    try:
        run.enter(State.SWITCHING)
        run.sync()
    except OSError as error:
        await take_back(run, doorbell)
        raise record_failed(run, error) from None
    return await end(run, doorbell, job.status)


async def see_names(run: Run, doorbell: Doorbell) -> None:
    """
    The names of the images by which the new chain is linked must lead to them, and what is raw must have its length: the last
    look before QEMU opens some by name again, and a stat of each where all is well. Raises Displaced or CutShort with the job
    taken back, LeftDisplaced.
    """
    for image in run.plan.named:
        astray = identity.astray(image, run.target.pid)
        if astray is not None:
            await shield.finished(take_back(run, doorbell))
            raise identity.displaced(astray, run.target)
    short = lengths.cut(run.plan.result)
    if short is not None:
        await shield.finished(take_back(run, doorbell))
        raise CutShort(file=short.file, size=short.size, needed=short.needed)


async def take_back(run: Run, doorbell: Doorbell) -> None:
    """
    Cancel the job and see that the old chain is in use. Raises NotProven where it is not, LeftDisplaced or Displaced with the
    job still there.
    """
    monitor = run.target.monitor
    await _see_that_it_may_end(run)
    run.log("taken-back", "taken back")
    with contextlib.suppress(QemuRefused):  # it may have ended by itself
        await monitor.execute("job-cancel", id=run.job)
    try:
        job = await jobs.follow(
            monitor,
            doorbell,
            run.job,
            ("concluded",),
            tell=lambda job: None,
            deadline=time.monotonic() + CANCEL_SECONDS,
        )
        if job is not None:
            await jobs.dismiss(monitor, run.job)
    except StillRunning:
        raise NotProven(target=run.target.name, expected="the job cancelled", found="it still running") from None
    await proof.prove_old_chain(run)
    await run.operation.let_go(run)


async def _see_that_it_may_end(run: Run) -> None:
    """
    However a job ends, QEMU opens what it has written to below the active image by its name again, to read it only: it takes
    another file that is there, and where nothing is there, and the image has `auto-read-only`, it aborts with its guest (7.2
    to 11.1). Raises LeftDisplaced; Displaced
    where QEMU is our own, and ends with us.
    """
    receiver = run.plan.receiver
    astray = identity.astray(receiver, run.target.pid) if receiver is not run.plan.chain.active else None
    if astray is None or not await _is_at_work(run):
        return
    await proof.see_old_chain(run)
    if not run.target.is_live:
        raise identity.displaced(astray, run.target)
    active, option = run.plan.chain.active.file, run.request.option
    raise identity.left(astray, run.target, run.job, option=option, active=active)


async def _is_at_work(run: Run) -> bool:
    job = await jobs.look(run.target.monitor, run.job)
    return job is not None and job.status != "concluded"


def failure(run: Run, reason: str) -> JobFailed:
    """The error that a job ended with, where the old chain has been seen to be in use."""
    if reason == os.strerror(errno.EDQUOT):
        filesystem = progress.of(run.plan.receiver, 0).filesystem
        return OutOfQuota(job=run.job, reason=reason, filesystem=filesystem)
    return JobFailed(job=run.job, reason=reason)


async def copy(run: Run, doorbell: Doorbell) -> Job | None:
    """Follow the job until it wants a decision, or is over."""
    meter = Meter(run.disk.name)
    return await jobs.follow(
        run.target.monitor,
        doorbell,
        run.job,
        run.operation.decisions,
        tell=lambda job: tell(run, meter, job),
        deadline=run.deadline,
    )


def tell(run: Run, meter: Meter, job: Job) -> None:
    """Report a sighting of the job."""
    job = see(run, job)
    counts = run.operation.counts
    if run.course is not None:
        job, counts = replace(job, done=run.course.done(job.done), total=run.course.total), "copied"
    sighting = meter.read(job, counts, _shortage(run, job))
    run.tell(run.watch.read(job, sighting) if run.operation.pivots else sighting)


def see(run: Run, job: Job) -> Job:
    """Note a sighting of the job, and return it with its disk. Of an intermediate merge QEMU counts what it walks."""
    run.seen = replace(job, disk=run.disk.name)
    if run.operation.pivots:
        run.copied = job.done
    return run.seen


def _shortage(run: Run, job: Job) -> Shortage | None:
    """What is left is at most what the job has not reached yet, and at most what the merged images take."""
    if not job.has_no_space:
        return None
    sizes = [image.allocated for image in run.plan.merged]
    left = max(0, job.total - job.done)
    return progress.of(run.plan.receiver, left if None in sizes else min(left, sum(size or 0 for size in sizes)))
