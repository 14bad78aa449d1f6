"""
The steps of a merge up to the switch: until then everything can be taken back.
"""

import contextlib
import errno
import os
import time
from dataclasses import dataclass, field
from typing import Any

from qmpmerge import bitmaps, comparison, durable, jobs, shield, shortage
from qmpmerge.bitmaps import Bitmap
from qmpmerge.blockgraph import Disk
from qmpmerge.chain import Chain, Image
from qmpmerge.converge import Converge
from qmpmerge.errors import (
    BitmapsNotCarried,
    CommandError,
    FlushUnavailable,
    ImageUnreadable,
    JobFailed,
    NoSuchDisk,
    NotDurable,
    NotProven,
    NotVerified,
    NotWritable,
    OutOfQuota,
    QemuRefused,
    StillRunning,
)
from qmpmerge.hosts import ChainView, Host
from qmpmerge.jobs import Job, Meter, Report
from qmpmerge.monitor import Doorbell
from qmpmerge.outcome import Ending
from qmpmerge.patience import Patience
from qmpmerge.pausing import Guard
from qmpmerge.plan import CommitPlan
from qmpmerge.rates import Watch
from qmpmerge.shortage import Shortage
from qmpmerge.witness import Policy, Witness

CANCEL_SECONDS = 60.0
DIFFERENT = "they show different data"
"""What is wrong with a base that was compared; all else is a comparison that could not be made."""
DECISIONS = ("ready", "pending", "concluded")
"""The states of a job in which it is for us to say what comes next."""
CHEAP_BYTES = 256 * 1024 * 1024
"""Up to this much in the merged images, base and top are compared unless the user says no."""
CHEAP_LAYERS = 50
"""And up to so many images: what qemu-img takes to open a chain grows with the cube, 0.03 s for 30 and 2 s for 200."""


@dataclass
class Merge:
    """
    One merge under way: the values that every step needs.

    `suspect` is the error of an earlier merge into the same base: what the base shows must be compared. `is_started`
    says that QEMU has confirmed the start, `let_go` that the overlay is kept, `switching` that the switch has begun.
    """

    host: Host
    disk: Disk
    plan: CommitPlan
    ending: Ending
    report: Report
    patience: Patience
    old_nodes: list[str]
    base_driver: str
    job: str
    verify: bool | None = None
    suspect: str | None = None
    is_started: bool = True
    let_go: bool = False
    switching: bool = False
    verified: bool = False
    base_is_durable: bool = False
    policy: Policy = "stash"
    pauses: bool = True
    witness: Witness | None = None
    guard: Guard | None = None
    paused_ms: float | None = None
    notes: list[str] = field(default_factory=list)
    converge: Converge | None = None
    watch: Watch = field(default_factory=Watch)
    copied: int | None = None
    bitmaps: tuple[Bitmap, ...] = ()
    started: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float | None:
        """Until when we wait, in `time.monotonic` seconds."""
        return self.patience.deadline

    def name_after(self, expected: Chain) -> str:
        """What the disk is called once its active image may have changed."""
        return self.disk.drive or self.disk.qdev or expected.active.node or expected.active.file

    async def flush(self, image: Image) -> bool:
        """As `durable.flush` does."""
        return await durable.flush(self.host.monitor, image, opened=self.host.opened.get(image.node or ""))


def begin(
    host: Host,
    view: ChainView,
    planned: CommitPlan,
    ending: Ending,
    report: Report,
    patience: Patience,
    verify: bool | None = None,
    *,
    policy: Policy = "stash",
    pauses: bool = True,
) -> Merge:
    """The values of a merge whose job is to be started, or runs already."""
    return Merge(
        host=host,
        disk=view.disk,
        plan=planned,
        ending=ending,
        report=report,
        patience=patience,
        old_nodes=view.layout.between(planned.top.node or "", planned.base.node or ""),
        base_driver=view.layout.nodes[planned.base.node or ""].driver,
        verify=True if policy == "delete" else verify,
        policy=policy,
        pauses=pauses,
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
    return shortage.of(merge.plan.base, left if None in sizes else min(left, sum(size or 0 for size in sizes)))


async def make_base_durable(merge: Merge, doorbell: Doorbell) -> None:
    """At PENDING, before the overlay's header is rewritten; where it fails the job is taken back."""
    try:
        every_error_seen = await merge.flush(merge.plan.base)
        merge.verify = merge.verify if every_error_seen else True
        merge.base_is_durable = True
    except (NotDurable, FlushUnavailable) as error:
        await shield.finished(take_back(merge, doorbell))
        reason = error.reason
        raise NotDurable(node=merge.plan.base.file, reason=reason) from None


async def carry_bitmaps(merge: Merge, doorbell: Doorbell) -> None:
    """The last step before the switch; where it fails the job is taken back. An overlay that is kept keeps its own."""
    if not merge.bitmaps or (merge.plan.pivots and merge.ending != "pivot"):
        return
    base = merge.plan.base
    try:
        await bitmaps.carry(merge.host.monitor, await merge.host.layout(), base, merge.bitmaps)
    except CommandError as error:
        await shield.finished(take_back(merge, doorbell))
        raise BitmapsNotCarried(base=base.file, reason=error.description) from None


async def is_at_rest(merge: Merge, job: Job) -> bool:
    """
    Whether nobody can write to the disk of a job that is ready: only then base and top can be compared.

    A guest that was paused by its user stays paused; where the comparison is not compulsory that is not relied on.
    """
    if job.status != "ready":
        return False
    return not merge.host.is_live or (merge.suspect is not None and not await merge.host.guest_runs())


async def verify(merge: Merge, doorbell: Doorbell) -> None:
    """
    Compare what top shows with what base shows, while both still exist; a difference takes the job back.

    Unless the user says no, a base on the network is compared whatever it costs: where its server was started again and
    QEMU found it again (`reconnect-delay`), what was not flushed is lost without an error.
    """
    is_remote = not merge.plan.base.has_path
    if merge.verify is False or (merge.verify is None and not is_remote and not _is_cheap(merge.plan)):
        return
    try:
        same = await comparison.same(merge.plan)
    except ImageUnreadable as error:
        if merge.verify is None:
            merge.notes += [not_compared(merge.plan, error.reason)] if is_remote else []
            return
        same, reason = False, error.reason
    else:
        reason = DIFFERENT
    if not same:
        await shield.finished(take_back(merge, doorbell))
        raise NotVerified(base=merge.plan.base.file, top=merge.plan.top.file, reason=reason)
    merge.verified = True


def not_compared(planned: CommitPlan, reason: str) -> str:
    """The hint about a base on the network that was taken as it is."""
    return f"{planned.base.file} was not compared ({reason}): what its server lost if it was started again is not seen"


def _is_cheap(planned: CommitPlan) -> bool:
    """Whether what the comparison has to open and to read is little."""
    sizes = [image.allocated for image in planned.merged]
    few = len(planned.chain) <= CHEAP_LAYERS
    return few and None not in sizes and sum(size or 0 for size in sizes) <= CHEAP_BYTES


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
    after = await view_after(merge, merge.plan.chain)
    if not after.chain.same_files(merge.plan.chain):
        raise NotProven(target=merge.host.target, expected=str(merge.plan.chain), found=str(after.chain))


def failure(merge: Merge, reason: str) -> JobFailed:
    """The error that a job ended with, where the old chain has been seen to be in use."""
    if reason == os.strerror(errno.EDQUOT):
        filesystem = shortage.of(merge.plan.base, 0).filesystem
        return OutOfQuota(job=merge.job, reason=reason, filesystem=filesystem)
    return JobFailed(job=merge.job, reason=reason)


async def view_after(merge: Merge, expected: Chain) -> ChainView:
    """The disk as it is now. Where its device was unplugged meanwhile, only the node of its active image has a name."""
    try:
        return await merge.host.chain(merge.name_after(expected))
    except NoSuchDisk:
        if expected.active.node is None:
            raise
        return await merge.host.chain(expected.active.node)
