"""
Base and top compared while both still exist, for what was copied and not for the whole disk.
"""

import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from qmpmerge.chain.plan import Plan, PullPlan
from qmpmerge.errors import ImageUnreadable
from qmpmerge.images import growth, masks, nbd, qemuimg, ranges
from qmpmerge.images.qemuimg import Extent

PARTS = 16
"""Into at most so many parts what is compared is cut: each is a `qemu-img` of its own, some 10 ms."""

SMALL_GAP = 16 * 1024 * 1024
"""A gap that is read along with its neighbours, since a process of its own would take longer."""


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


async def same(planned: Plan, held: Sequence[Extent] | None = None) -> bool:
    """
    Whether the plan's two views show the same wherever a merged image holds anything; elsewhere both show base's own data.

    `held` is what `copied` says of a merge, where that was asked already. Nobody may write to the images meanwhile, and what
    was written must be flushed. Raises ImageUnreadable, ToolMissing.
    """
    upto, below = planned.views
    await nbd.see_that_they_answer(upto)
    held = await qemuimg.held(planned.merged) if held is None else held
    try:
        for part in parts(held, upto[-1].virtual_size):
            if not await qemuimg.same(upto, below, part):
                return False
    except ImageUnreadable:  # a qemu-img that was built without what a part of a disk takes
        return await qemuimg.same(upto, below)
    return True


@dataclass(frozen=True)
class Shown:
    """What the overlay of a pull holds of its `own`, and what it shows of those `below` that leave."""

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
    The first byte at which the overlay of a pull differs from what it has shown `before` of the images below; None where there
    is none.

    Guests may write meanwhile: where there is a difference it is asked what they have `written`, and that is left out; it is
    told at which byte.
    Raises ImageUnreadable, ToolMissing, and what that raises.
    """
    old, new = planned.chain.images[: planned.chain.index(planned.top)], planned.views[1]
    size = planned.overlay.virtual_size
    mask = masks.mask(before.own, size)
    for part in parts(before.below, size):
        start = part.start
        while start < part.end:
            offset = await qemuimg.differs_at(old, new, Extent(start, part.end - start), mask)
            if offset is None:
                break
            theirs = await written(offset)
            there = next((one for one in theirs if one.start <= offset < one.end), None)
            if there is None:
                return offset
            mask, start = masks.mask([*before.own, *theirs], size), there.end
    return None


def parts(held: Sequence[Extent], size: int) -> list[Extent]:
    """
    At most `PARTS` parts of a disk of `size` bytes, in order, that cover all of `held`, which is in order too.

    The widest gaps are left out, as long as they are worth a process.
    """
    covered = [extent for extent in held if extent.start < size]
    gaps = sorted(itertools.pairwise(covered), key=lambda pair: pair[1].start - pair[0].end, reverse=True)
    kept = {right.start for left, right in gaps[: PARTS - 1] if right.start - left.end > SMALL_GAP}
    found: list[Extent] = []
    for extent in covered:
        if found and extent.start not in kept:
            found[-1] = Extent(found[-1].start, extent.end - found[-1].start)
        else:
            found.append(extent)
    return [Extent(part.start, min(part.end, size) - part.start) for part in found]
