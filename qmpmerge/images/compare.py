"""
Base and top compared while both still exist, for what was copied and not for the whole disk.
"""

import itertools
from collections.abc import Sequence

from qmpmerge.chain.plan import Plan, PullPlan
from qmpmerge.errors import ImageUnreadable
from qmpmerge.images import nbd, qemuimg
from qmpmerge.images.qemuimg import Extent

PARTS = 16
"""Into at most so many parts what is compared is cut: each is a `qemu-img` of its own, some 10 ms."""

SMALL_GAP = 16 * 1024 * 1024
"""A gap that is read along with its neighbours, since a process of its own would take longer."""


DIFFERENT = "they show different data"
"""What is wrong with a base that was compared; all else is a comparison that could not be made."""


async def copied(planned: Plan) -> list[Extent]:
    """
    What is copied, in order: what the merged images hold between them, or what the overlay that is pulled into shows of them,
    zeros left out, as it is now. Raises ImageUnreadable, ToolMissing.
    """
    await nbd.see_that_they_answer(planned.touched if isinstance(planned, PullPlan) else planned.merged)
    if isinstance(planned, PullPlan):
        shown = await qemuimg.shown_of_below((*planned.merged, planned.overlay))
        return [extent for extent in shown if not extent.zero]
    return await qemuimg.held(planned.merged)


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


async def is_complete(planned: PullPlan) -> bool:
    """
    Whether the overlay shows nothing any more of the images that leave: by its tables alone, since somebody may write to it
    meanwhile. They must be flushed. Raises ImageUnreadable, ToolMissing.
    """
    await nbd.see_that_they_answer(planned.touched)
    return not await qemuimg.shown_of_below((*planned.merged, planned.overlay))


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
