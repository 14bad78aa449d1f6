"""The block job of a merge: started, followed, ended."""

from typing import Any

from qmpmerge.engine import progress
from qmpmerge.engine.operation import Merge
from qmpmerge.engine.progress import Meter, Shortage
from qmpmerge.errors import CommandError, NotWritable, QemuRefused
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell

DECISIONS = ("ready", "pending", "concluded")
"""The states of a job in which it is for us to say what comes next."""


async def end(merge: Merge, doorbell: Doorbell, status: str, *, keeps: bool = False) -> Job | None:
    """Tell the job to end, and wait until it has."""
    monitor = merge.host.monitor
    while True:
        try:
            if status == "pending":
                await monitor.execute("job-finalize", id=merge.job)
            elif keeps:
                await monitor.execute("block-job-cancel", device=merge.job, force=False)
            else:
                await monitor.execute("job-complete", id=merge.job)
            # Somebody else's active job may want to be finalized too, and the guest stands still until it is.
            wanted: tuple[str, ...] = ("concluded", "pending") if status == "ready" else ("concluded",)
        except CommandError:
            # A drain by somebody else can put a ready job into standby for a moment: wait for it and say it again.
            # A pending job of ours is on its way already.
            wanted = ("concluded", status) if status == "ready" else ("concluded",)
            await doorbell.wait(jobs.LOOK_AGAIN_SECONDS / 5)
        deadline = merge.deadline if merge.host.is_live else None
        job = await jobs.follow(monitor, doorbell, merge.job, wanted, tell=lambda job: None, deadline=deadline)
        if job is None or job.status == "concluded":
            return job
        status = job.status


async def start(merge: Merge, speed: int) -> None:
    """Send block-commit: nodes always by name, the backing string always given, nothing ended behind our back."""
    planned, monitor = merge.plan, merge.host.monitor
    arguments: dict[str, Any] = {
        "job_id": merge.job,
        "device": merge.disk.root,
        "top_node": planned.top.node,
        "base_node": planned.base.node,
        "speed": speed,
        "on_error": "enospc",
        "auto_dismiss": False,
    }
    if not planned.pivots:
        arguments |= {"backing_file": planned.backing_name, "auto_finalize": False}
        if merge.base_driver != planned.base.format and await monitor.accepts("block-commit", "backing-mask-protocol"):
            arguments["backing_mask_protocol"] = True
    try:
        await monitor.execute("block-commit", **arguments)
    except CommandError as error:
        if "read-only" in error.description:  # a node with an explicit `read-only=on`, which only trying tells
            reason = f"{error.description}: with `auto-read-only=on` it would be opened for writing when needed"
            raise NotWritable(file=planned.base.file, reason=reason) from None
        raise QemuRefused(command="block-commit", reason=error.description) from None


async def copy(merge: Merge, doorbell: Doorbell) -> Job | None:
    """Follow the job until it wants a decision, or is over."""
    meter = Meter(merge.disk.name, counts(merge))
    return await jobs.follow(
        merge.host.monitor,
        doorbell,
        merge.job,
        DECISIONS,
        tell=lambda job: tell(merge, meter, job),
        deadline=merge.deadline,
    )


def counts(merge: Merge) -> str:
    """What QEMU counts of this merge, see `Progress`."""
    return "copied" if merge.plan.pivots else "scanned"


def tell(merge: Merge, meter: Meter, job: Job) -> None:
    """Report a sighting of the job."""
    merge.copied = job.done
    told = meter.read(job, _shortage(merge, job))
    merge.report(merge.watch.read(job, told) if merge.plan.pivots else told)


def _shortage(merge: Merge, job: Job) -> Shortage | None:
    """What is left is at most what the job has not reached yet, and at most what the merged images take."""
    if not job.has_no_space:
        return None
    sizes = [image.allocated for image in merge.plan.merged]
    left = max(0, job.total - job.done)
    return progress.of(merge.plan.base, left if None in sizes else min(left, sum(size or 0 for size in sizes)))
