"""
The steps of a merge up to the switch: until then everything can be taken back.
"""

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

from qmpmerge import durable, jobs, qemuimg, shield
from qmpmerge.blockgraph import Disk
from qmpmerge.chain import Chain
from qmpmerge.converge import Converge
from qmpmerge.errors import (
    CommandError,
    FlushUnavailable,
    ImageUnreadable,
    NotDurable,
    NotProven,
    NotVerified,
    QemuRefused,
    StillRunning,
)
from qmpmerge.hosts import ChainView, Host
from qmpmerge.jobs import Job, Meter, Report
from qmpmerge.monitor import Doorbell
from qmpmerge.outcome import Ending
from qmpmerge.plan import CommitPlan
from qmpmerge.rates import Watch

CANCEL_SECONDS = 60.0
CHEAP_BYTES = 256 * 1024 * 1024
"""Up to this much allocated data in the whole chain, base and top are compared unless the user says no."""


@dataclass
class Merge:
    """One merge under way: the values that every step needs."""

    host: Host
    disk: Disk
    plan: CommitPlan
    ending: Ending
    report: Report
    deadline: float | None
    old_nodes: list[str]
    base_driver: str
    job: str
    verify: bool | None
    verified: bool = False
    base_is_durable: bool = False
    converge: Converge | None = None
    watch: Watch = field(default_factory=Watch)
    copied: int | None = None
    started: float = field(default_factory=time.monotonic)

    def name_after(self, expected: Chain) -> str:
        """What the disk is called once its active image may have changed."""
        return self.disk.drive or self.disk.qdev or expected.active.node or expected.active.file


def begin(
    host: Host,
    view: ChainView,
    planned: CommitPlan,
    ending: Ending,
    report: Report,
    deadline: float | None,
    verify: bool | None = None,
) -> Merge:
    """The values of a merge whose job is to be started, or runs already."""
    below = set(view.layout.subtree(planned.base.node or ""))
    return Merge(
        host=host,
        disk=view.disk,
        plan=planned,
        ending=ending,
        report=report,
        deadline=deadline,
        old_nodes=[node for node in view.layout.subtree(planned.top.node or "") if node not in below],
        base_driver=view.layout.nodes[planned.base.node or ""].driver,
        verify=verify,
        job=view.disk.job.id if view.disk.job else jobs.job_id(view.disk.name),
    )


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
        raise QemuRefused(command="block-commit", reason=error.description) from None


async def copy(merge: Merge, doorbell: Doorbell) -> Job | None:
    """Follow the job until it wants a decision, or is over."""
    meter = Meter(merge.disk.name, "copied" if merge.plan.pivots else "scanned")

    def tell(job: Job) -> None:
        merge.copied = job.done
        told = meter.read(job)
        merge.report(merge.watch.read(job, told) if merge.plan.pivots else told)

    return await jobs.follow(
        merge.host.monitor,
        doorbell,
        merge.job,
        ("ready", "pending", "concluded"),
        tell=tell,
        deadline=merge.deadline,
    )


async def make_base_durable(merge: Merge, doorbell: Doorbell) -> None:
    """At PENDING, before the overlay's header is rewritten; where it fails the job is taken back."""
    try:
        every_error_seen = await durable.flush(merge.host.monitor, merge.plan.base)
        merge.verify = merge.verify if every_error_seen else True
        merge.base_is_durable = True
    except (NotDurable, FlushUnavailable) as error:
        await shield.finished(take_back(merge, doorbell))
        reason = error.reason
        raise NotDurable(node=merge.plan.base.file, reason=reason) from None


def is_at_rest(merge: Merge, job: Job) -> bool:
    """Whether nobody can write to the disk of a job that is ready: only then base and top can be compared."""
    return job.status == "ready" and not merge.host.is_live


async def verify(merge: Merge, doorbell: Doorbell) -> None:
    """Compare what top shows with what base shows, while both still exist; a difference takes the job back."""
    if merge.verify is False or (merge.verify is None and not _is_cheap(merge.plan)):
        return
    upto = merge.plan.chain.images[: merge.plan.chain.index(merge.plan.top)]
    below = merge.plan.chain.images[: merge.plan.chain.index(merge.plan.base)]
    try:
        same = await qemuimg.same(upto, below)
    except ImageUnreadable as error:
        if merge.verify is None:
            return
        same, reason = False, error.reason
    else:
        reason = "they show different data"
    if not same:
        await shield.finished(take_back(merge, doorbell))
        raise NotVerified(base=merge.plan.base.file, top=merge.plan.top.file, reason=reason)
    merge.verified = True


def _is_cheap(planned: CommitPlan) -> bool:
    """Whether all that the comparison can have to read is little."""
    sizes = [image.allocated for image in planned.chain]
    return None not in sizes and sum(size or 0 for size in sizes) <= CHEAP_BYTES


async def take_back(merge: Merge, doorbell: Doorbell) -> None:
    """Cancel the job and see that the old chain is in use. Raises NotProven where it is not."""
    monitor = merge.host.monitor
    with contextlib.suppress(CommandError):  # it may have ended by itself
        await monitor.execute("job-cancel", id=merge.job)
    try:
        job = await jobs.follow(
            monitor,
            doorbell,
            merge.job,
            ("concluded",),
            tell=lambda job: None,
            deadline=time.monotonic() + CANCEL_SECONDS,
        )
        if job is not None:
            await jobs.dismiss(monitor, merge.job)
    except StillRunning:
        raise NotProven(target=merge.host.target, expected="the job cancelled", found="it still running") from None
    await prove_old_chain(merge)


async def prove_old_chain(merge: Merge) -> None:
    """See that the chain is what it was before. Raises NotProven."""
    after = await merge.host.chain(merge.name_after(merge.plan.chain))
    if not after.chain.same_files(merge.plan.chain):
        raise NotProven(target=merge.host.target, expected=str(merge.plan.chain), found=str(after.chain))
