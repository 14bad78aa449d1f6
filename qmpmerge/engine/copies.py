"""
What a pull copies: seen to be there, and to be what it was copied from, before anything is switched.

That nothing is missing the overlay's tables tell, which is cheap. What was copied is read, and compared with the images below
that leave, where the user wants that, or where it is little and nobody can write meanwhile; of what a guest writes meanwhile
nothing is compared, in parts of 64 KiB (`qemu.writes`). What cannot be compared is said not to be checked.

What the overlay held before is its own. Where that may be the copy of an earlier pull that was taken back, nobody can tell it
from the rest any more, and not all is verified (`spared.doubts`).
"""

import contextlib

from qmpmerge import shield
from qmpmerge.chain.plan import PullPlan
from qmpmerge.engine import blockjob, safeguards
from qmpmerge.engine.run import Run
from qmpmerge.errors import Damaged, ImageUnreadable, MaybeDamaged, NotVerified, QemuRefused
from qmpmerge.images import compare
from qmpmerge.images.compare import Shown
from qmpmerge.images.qemuimg import Extent
from qmpmerge.qemu import flush, writes
from qmpmerge.qemu.monitor import Doorbell


async def foresee(run: Run, plan: PullPlan) -> Shown | str:
    """
    Before the job: what it will copy, and from now on what a guest writes is noted; or why that cannot be compared. Raises
    NotDurable, FlushUnavailable, ToolMissing, and what a lost session raises.
    """
    if not _is_read(run, plan):
        return "it was not asked for"
    remote = [image.file for image in plan.chain.images[: plan.chain.index(plan.overlay)] if not image.has_path]
    if remote:
        return f"{remote[0]} is no file of this host"
    try:
        safeguards.see_what_is_compared(run)
        if is_written(run, plan):
            await writes.begin(run.target.monitor, await run.target.layout(), plan.overlay.node or "")
            await flush.flush(run.target.monitor, plan.overlay)  # what was written before is in its tables then
        return await compare.shown(plan)
    except (ImageUnreadable, QemuRefused) as error:
        return error.reason


async def forget(run: Run, plan: PullPlan) -> None:
    """What `foresee` has begun ends."""
    if is_written(run, plan):
        with contextlib.suppress(QemuRefused):  # it is in nobody's way
            await writes.end(run.target.monitor, await run.target.layout(), plan.overlay.node or "")


async def verify(run: Run, doorbell: Doorbell, plan: PullPlan) -> None:
    """
    Once all is copied and durable. Raises NotVerified with the job taken back where something is missing, or cannot be looked
    at though it is to be; Damaged where the copy is not what it was copied from, MaybeDamaged where that cannot be told.
    """
    if not (len(plan.chain) <= safeguards.CHEAP_LAYERS if run.verify is None else run.verify):
        return
    reason, damage = compare.DIFFERENT, None
    try:
        safeguards.see_what_is_compared(run)
        missing = bool((await compare.shown(plan)).below)
        if not missing:
            damage = await _damage(run, plan)
        safeguards.see_what_is_compared(run)  # it may have been given to another file meanwhile
    except ImageUnreadable as error:
        run.verified = False
        if run.verify is None:
            run.notes += [] if plan.overlay.has_path else [safeguards.not_compared(plan, error.reason)]
            return
        missing, reason = True, error.reason
    if missing:
        await shield.finished(blockjob.take_back(run, doorbell))
        raise NotVerified(base=plan.overlay.file, top=plan.top.file, reason=reason)
    if damage is not None:
        with contextlib.suppress(OSError):  # its room was taken before the job was started
            run.lock.damaged(plan.overlay, compare.DIFFERENT)
        await shield.finished(blockjob.take_back(run, doorbell))
        run.undone(damage)
        raise damage


async def _damage(run: Run, plan: PullPlan) -> Damaged | MaybeDamaged | None:
    """Whether the copy differs from what it was copied from where no guest has written; what cannot be compared is said."""
    if not _is_read(run, plan):
        return None
    if not isinstance(run.copies, Shown):
        if run.verify:
            run.notes.append(f"not checked: what was copied into {plan.overlay.file} was not compared: {run.copies}")
        return None
    overlay, below = plan.overlay, [image.file for image in plan.merged]

    async def written(offset: int) -> list[Extent]:
        if not is_written(run, plan):
            return []
        try:
            return await writes.read(run.target.monitor, overlay.node or "", overlay.virtual_size)
        except (QemuRefused, ImageUnreadable) as error:
            raise MaybeDamaged(overlay=overlay.file, below=below, offset=offset, reason=error.reason) from None

    try:
        place = await compare.copy_differs_at(plan, run.copies, written)
    except MaybeDamaged as damage:
        return damage
    run.verified = place is None and run.suspect is None
    return None if place is None else Damaged(overlay=overlay.file, below=below, offset=place)


def is_written(run: Run, plan: PullPlan) -> bool:
    """Whether a guest may write to what is pulled into, at any time."""
    return run.target.is_live and not plan.is_in_the_middle


def _is_read(run: Run, plan: PullPlan) -> bool:
    """Whether what was copied is to be compared."""
    if run.verify is not None:
        return run.verify
    return safeguards.is_cheap(plan) and not is_written(run, plan)
