"""What must be so before anything is switched: base durable, compared, bitmaps carried."""

from qmpmerge import shield
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.engine import take_back
from qmpmerge.engine.operation import Merge
from qmpmerge.errors import BitmapsNotCarried, CommandError, FlushUnavailable, ImageUnreadable, NotDurable, NotVerified
from qmpmerge.images import compare
from qmpmerge.qemu import bitmaps
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell

DIFFERENT = "they show different data"
"""What is wrong with a base that was compared; all else is a comparison that could not be made."""

CHEAP_BYTES = 256 * 1024 * 1024
"""Up to this much in the merged images, base and top are compared unless the user says no."""
CHEAP_LAYERS = 50
"""And up to so many images: what qemu-img takes to open a chain grows with the cube, 0.03 s for 30 and 2 s for 200."""


async def make_sure(merge: Merge, doorbell: Doorbell, job: Job) -> None:
    """All that must be so before anything is switched; where it is not, the job is taken back."""
    if job.status == "pending":
        await make_base_durable(merge, doorbell)
        await verify(merge, doorbell)
    elif await is_at_rest(merge, job):
        await verify(merge, doorbell)  # an active job has flushed base before it says that it is ready
    if job.status != "concluded":
        await _see_that_it_is_compared(merge, doorbell)
    if job.status in ("pending", "ready"):
        await carry_bitmaps(merge, doorbell)


async def _see_that_it_is_compared(merge: Merge, doorbell: Doorbell) -> None:
    """Where an earlier failure makes the comparison compulsory, nothing is switched without it."""
    if merge.suspect is None or merge.verified:
        return
    await shield.finished(take_back.take_back(merge, doorbell))
    reason = f"the guest writes, so what an earlier failure left cannot be seen ({merge.suspect})"
    raise NotVerified(base=merge.plan.base.file, top=merge.plan.top.file, reason=reason)


async def make_base_durable(merge: Merge, doorbell: Doorbell) -> None:
    """At PENDING, before the overlay's header is rewritten; where it fails the job is taken back."""
    try:
        every_error_seen = await merge.flush(merge.plan.base)
        merge.verify = merge.verify if every_error_seen else True
        merge.base_is_durable = True
    except (NotDurable, FlushUnavailable) as error:
        await shield.finished(take_back.take_back(merge, doorbell))
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
        await shield.finished(take_back.take_back(merge, doorbell))
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
        same = await compare.same(merge.plan)
    except ImageUnreadable as error:
        if merge.verify is None:
            merge.notes += [not_compared(merge.plan, error.reason)] if is_remote else []
            return
        same, reason = False, error.reason
    else:
        reason = DIFFERENT
    if not same:
        await shield.finished(take_back.take_back(merge, doorbell))
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
