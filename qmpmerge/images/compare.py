"""
Base and top compared while both still exist, for what was copied and not for the whole disk.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence

from qmpmerge.chain.chain import Image
from qmpmerge.chain.plan import CommitPlan, Plan, PullPlan
from qmpmerge.errors import ImageUnreadable
from qmpmerge.folder import File
from qmpmerge.images import growth, masks, nbd, qcow2, qemuimg, ranges
from qmpmerge.images.qemuimg import Extent
from qmpmerge.images.ranges import Range
from qmpmerge.value import Value

DIFFERENT = "they show different data"
"""What is wrong with a base that was compared; all else is a comparison that could not be made."""


async def copied(planned: Plan, version: tuple[int, int, int]) -> list[Extent]:
    """
    What this version of QEMU copies, in order: what the merged images hold between them, or what the overlay that is pulled
    into shows of them, zeros left out, as it is now. Raises ImageUnreadable, ToolMissing.
    """
    if isinstance(planned, PullPlan):
        return [extent for extent in (await shown(planned)).below if not extent.zero]
    await nbd.see_that_they_answer(planned.merged)
    held = await qemuimg.held(planned.merged)
    rooms = growth.room(planned, version)
    if not rooms:
        return held
    whole = ranges.joined((extent.start, extent.end) for extent in (*held, *rooms))
    return [Extent(start, end - start) for start, end in whole]


def mask(planned: Plan, held: Sequence[Extent]) -> File:
    """What `same` reads where the merged images hold this, for `masks`: it takes some milliseconds, and can be made before."""
    size = planned.views[0][-1].virtual_size
    # What lies next to it is the same too: in a mask of larger grains there is less to look up.
    return masks.around(ranges.aligned(_within(held, size), masks.LARGEST), size)


def fills(planned: Plan) -> bool:
    """
    Whether a commit writes to base what no merged image holds: it writes whole clusters, and what is around the data is copied
    up from what base is built on. Both views of the plan show that.
    """
    if not isinstance(planned, CommitPlan) or planned.base_index < 2:
        return False
    step = _step(planned.base)
    return any((_cluster(image) or 1) % step for image in planned.merged)


async def own(image: Image) -> "Shown":
    """What it holds by itself. Raises ImageUnreadable, ToolMissing."""
    await nbd.see_that_they_answer([image])
    return Shown(await qemuimg.held([image]), [])


async def same(
    planned: Plan,
    held: Sequence[Extent] | None = None,
    seen_through: File | None = None,
    *,
    before: "Shown | None" = None,
) -> bool:
    """
    Whether the plan's two views show the same wherever a merged image holds anything; elsewhere both show base's own data.
    What base got there from below it (see `fills`) is compared with that, where it is known what it has held `before`.

    `held` is what `copied` says of a merge, where that was asked already, and `seen_through` the `mask` of it. Nobody may write
    to the images meanwhile, and what was written must be in their files: a raw one has it at once, others once they were
    flushed. Raises ImageUnreadable, ToolMissing.
    """
    upto, below = planned.views
    await nbd.see_that_they_answer(upto)
    held = await qemuimg.held(planned.merged) if held is None else held
    if not held:
        return True
    try:
        with seen_through or mask(planned, held) as opened:
            is_same = await qemuimg.differs_at(upto, below, opened) is None
    except ImageUnreadable:  # a qemu-img that cannot read a mask, or knows more
        is_same = await qemuimg.same(upto, below)
    if not is_same or before is None:
        return is_same
    size = min(planned.receiver.virtual_size, upto[-1].virtual_size)
    filled = _around(planned.receiver, held, [*before.own, *held], size)
    return await _differs_at(below, below[:-1], filled) is None


class Shown(Value):
    """What the image that is written to holds of its `own`, and of a pull what it shows of those `below` that leave."""

    own: list[Extent]
    below: list[Extent]


async def shown(planned: PullPlan) -> Shown:
    """By the tables alone, since somebody may write meanwhile. They must be flushed. Raises ImageUnreadable, ToolMissing."""
    await nbd.see_that_they_answer(planned.touched)
    return Shown(*await qemuimg.shown((*planned.merged, planned.overlay)))


async def copy_differs_at(
    planned: PullPlan, before: Shown, written: Callable[[int], Awaitable[list[Extent]]]
) -> int | None:
    """
    The first byte at which the overlay of a pull differs from what it has shown `before` of the images below, where the job
    has written, which it does in whole clusters; None where there is none.

    Guests may write meanwhile: where there is a difference it is asked what they have `written`, and that is left out; it is
    told at which byte.
    Raises ImageUnreadable, ToolMissing, and what that raises.
    """
    old, new = planned.chain.images[: planned.chain.index(planned.top)], planned.views[1]
    left = _around(planned.overlay, before.below, before.own, planned.overlay.virtual_size)
    while (offset := await _differs_at(old, new, left)) is not None:
        theirs = ranges.joined((extent.start, extent.end) for extent in await written(offset))
        if not any(start <= offset < end for start, end in theirs):
            return offset
        left = ranges.without([(max(start, offset), end) for start, end in left if end > offset], theirs)
    return None


def _around(receiver: Image, written: Iterable[Extent], kept: Iterable[Extent], size: int) -> list[Range]:
    """Where a job may write to an image that is to be `written` there: whole clusters but for what it has `kept`."""
    wide = ranges.aligned(((extent.start, extent.end) for extent in written), _step(receiver))
    return ranges.without(ranges.common(wide, [(0, size)]), _within(kept, size))


def _step(receiver: Image) -> int:
    return max(_cluster(receiver) or qcow2.LARGEST_CLUSTER, masks.LARGEST)  # a job copies by so much at the least


def _cluster(image: Image) -> int | None:
    """The size of what a qcow2 image allocates at a time; None where it is not told, or parts of it are allocated too."""
    try:
        header = qcow2.read_of(image) if image.has_path else None
    except OSError:
        return None
    return None if header is None or header.entry_size > 8 else header.cluster_size


def _within(extents: Iterable[Extent], size: int) -> list[Range]:
    """Where they are on a disk of `size` bytes, in order and apart."""
    return ranges.joined((extent.start, min(extent.end, size)) for extent in extents)


async def _differs_at(chain: Sequence[Image], other: Sequence[Image], within: Sequence[Range]) -> int | None:
    """The first byte of these ranges at which the two views differ; little else is read. As `qemuimg.differs_at`."""
    if not within:
        return None
    with masks.around(within, chain[-1].virtual_size) as mask:
        return await qemuimg.differs_at(chain, other, mask)
