"""
What must be so before anything is switched: base durable, compared, bitmaps carried. Where it is not, the job is taken back.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable

from qmpmerge import shield
from qmpmerge.chain.plan import Plan
from qmpmerge.engine import blockjob, rest
from qmpmerge.engine.pace.course import Course
from qmpmerge.engine.run import Run
from qmpmerge.errors import (
    BitmapsNotCarried,
    CannotCompare,
    FlushUnavailable,
    ImageUnreadable,
    MigrationBegan,
    NotAtRest,
    NotDurable,
    NotPaused,
    NotProven,
    NotVerified,
    QemuRefused,
    ToolMissing,
    VmState,
)
from qmpmerge.images import compare
from qmpmerge.images.compare import Shown
from qmpmerge.qemu import bitmaps, details, flush, mutex, vmstate
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.targets import identity

CHEAP_BYTES = 256 * 1024 * 1024
"""Up to this much in the merged images, base and top are compared unless the user says no."""
CHEAP_LAYERS = 50
"""And up to so many images: what qemu-img takes to open a chain grows with the square at the least (`images.links`)."""
COUNT_SECONDS = 1.0
"""So long is waited, once all is copied, for the figure of how much that was."""


async def see_files(run: Run, doorbell: Doorbell) -> None:
    """
    What the job has written must be the images that were meant, under their names, and QEMU must have them open, not others
    that were there when it opened the names again. Raises Displaced or CutShort with the job taken back, NotProven.
    """
    await blockjob.see_names(run, doorbell)
    for image in run.plan.written:
        if identity.is_open(image, run.target.pid) is False:
            await shield.finished(blockjob.take_back(run, doorbell))
            found = f"another file than {image.file} open"
            raise NotProven(target=run.target.name, expected=str(run.plan.chain), found=found)


async def see_that_it_is_compared(run: Run, doorbell: Doorbell) -> None:
    """Where an earlier failure makes the comparison compulsory, nothing is switched without it."""
    if run.suspect is None or run.verified:
        return
    await shield.finished(blockjob.take_back(run, doorbell))
    reason = f"the guest writes, so what an earlier failure left cannot be seen ({run.suspect})"
    raise NotVerified(base=run.plan.receiver.file, top=run.plan.top.file, reason=reason)


async def not_paused(run: Run, doorbell: Doorbell, error: mutex.NoTurn) -> NotPaused:
    """The error to raise where the guest is not ours to pause, or to look at; the job is taken back."""
    await shield.finished(blockjob.take_back(run, doorbell))
    return NotPaused(target=run.target.name, reason=str(error))


async def see_that_it_stays(run: Run, doorbell: Doorbell) -> None:
    """Right before the switch: a VM that is being migrated since the job was started gets its chain back as it was."""
    try:
        await vmstate.check_migration(run.target.monitor)
    except VmState as refusal:
        await shield.finished(blockjob.take_back(run, doorbell))
        raise MigrationBegan(target=run.target.name, state=refusal.state) from None


async def make_receiver_durable(run: Run, doorbell: Doorbell) -> None:
    """At PENDING, before the overlay's header is rewritten; where it fails the job is taken back."""
    try:
        await flush.flush(run.target.monitor, run.plan.receiver)
        run.receiver_is_durable = True
        run.log("durable", "{file} is durable", file=run.plan.receiver.label)
    except (NotDurable, FlushUnavailable) as error:
        await shield.finished(blockjob.take_back(run, doorbell))
        reason = error.reason
        raise NotDurable(node=run.plan.receiver.file, reason=reason) from None


async def make_durable_and_verify(run: Run, doorbell: Doorbell) -> None:
    """
    `make_receiver_durable`, then `verify`. A raw file shows to everybody what was written to it, durable or not, so it is read
    while it is flushed; a flush that fails is told all the same, whatever the comparison has found. Not one that is suspect,
    which is to be compared as the flush leaves it.
    """
    base = run.plan.receiver
    is_read_early = _is_compared(run) and base.has_path and base.format == "raw" and run.suspect is None
    comparing = asyncio.ensure_future(_is_same(run)) if is_read_early else None
    try:
        await make_receiver_durable(run, doorbell)
        await verify(run, doorbell, comparing=comparing)
    finally:
        if comparing is not None:
            comparing.cancel()
            await asyncio.gather(comparing, return_exceptions=True)


async def carry_bitmaps(run: Run, doorbell: Doorbell) -> None:
    """The last step before the switch; where it fails the job is taken back, unless they may be lost."""
    if not run.bitmaps:
        return
    base = run.plan.receiver
    try:
        await bitmaps.carry(run.target.monitor, await run.target.layout(), base, run.bitmaps)
    except QemuRefused as error:
        if "would-lose" in run.request.force:
            run.notes.append(f"dirty bitmaps were not carried over: {error.reason}; the next backup must be a full one")
            return
        await shield.finished(blockjob.take_back(run, doorbell))
        raise BitmapsNotCarried(base=base.file, reason=error.reason) from None


async def verify_at_rest(run: Run, doorbell: Doorbell, job: Job) -> None:
    """
    Compare base and top of a job that is ready, where nobody can write to the disk.

    A guest that was paused by its user stays paused; where the comparison is not compulsory that is not relied on.
    """
    if job.status == "ready" and not run.target.is_live:
        await verify(run, doorbell)
    elif job.status == "ready" and run.suspect is not None and not await _guest_runs(run, doorbell):
        since = await rest.begin(run)
        if since is not None:
            await verify(run, doorbell, since)


async def _guest_runs(run: Run, doorbell: Doorbell) -> bool:
    try:
        return await run.target.guest_runs()
    except mutex.NoTurn as error:
        raise await not_paused(run, doorbell, error) from None


def refuse_encrypted(planned: Plan, layout: Layout) -> None:
    """Before anything is copied, where it must be compared. Raises CannotCompare."""
    encrypted = [image.file for image in planned.views[0] if details.encryption(layout, image) is not None]
    if encrypted:
        raise CannotCompare(images=encrypted)


async def see_what_base_holds(run: Run) -> None:
    """Before the job, where a comparison can only tell from that what it has written. Raises ToolMissing."""
    if run.verify is False or not compare.fills(run.plan):
        return
    try:
        run.copies = await compare.own(run.plan.receiver)
    except ImageUnreadable as error:
        run.copies = error.reason


async def verify(
    run: Run, doorbell: Doorbell, since: int | None = None, *, comparing: Awaitable[bool] | None = None
) -> None:
    """
    Compare what top shows with what base shows, while both still exist; a difference takes the job back. `comparing` is where
    that has been begun.

    Where a guest could write nobody may have done so since `rest.begin` said `since`, or what was read says nothing.

    Unless the user says no, a base on the network is compared whatever it costs: where its server was started again and
    QEMU found it again (`reconnect-delay`), what was not flushed is lost without an error.
    """
    if not _is_compared(run):
        return
    is_remote = not run.plan.receiver.has_path
    try:
        same = await (comparing or _is_same(run))
    except ImageUnreadable as error:
        if run.verify is None:
            run.notes += [not_compared(run.plan, error.reason)] if is_remote else []
            return
        same, reason = False, error.reason
    else:
        reason = compare.DIFFERENT
    if since is not None and await rest.lasts(run, since) is None:
        await shield.finished(blockjob.take_back(run, doorbell))
        raise NotAtRest(base=run.plan.receiver.file, top=run.plan.top.file)
    if not same:
        await shield.finished(blockjob.take_back(run, doorbell))
        raise NotVerified(base=run.plan.receiver.file, top=run.plan.top.file, reason=reason)
    run.log("compared", "{file} shows what {top} shows", file=run.plan.receiver.label, top=run.plan.top.label)
    run.verified = isinstance(run.copies, Shown) or not compare.fills(run.plan)
    if not run.verified:
        around = f"what {run.plan.receiver.file} has got around that from below it was not compared: {run.copies}"
        run.notes.append(f"not checked: {around}")


async def _is_same(run: Run) -> bool:
    """As `compare.same`, which opens names. Raises ImageUnreadable also where one leads to another file."""
    see_what_is_compared(run)
    if run.operation.pivots and run.target.is_live:
        await write_out_top(run)
    before = run.copies if isinstance(run.copies, Shown) else None
    if run.operation.pivots:
        same = await compare.same(run.plan, before=before)
    else:
        mask, run.mask = run.mask, None  # it is closed with the comparison, which is made anew after a lost session
        same = await compare.same(run.plan, run.course.extents if run.course is not None else None, mask, before=before)
    if not same:
        see_what_is_compared(run)  # it may have been given to another file meanwhile
    return same


async def write_out_top(run: Run) -> None:
    """
    Other programs do not see what QEMU still has in its caches of the active image's tables: `stop` writes it out, but of a
    guest that was paused already nobody has asked that. Nor will the image then be changed when QEMU closes it. Raises
    ImageUnreadable where the storage fails.
    """
    try:
        await flush.flush(run.target.monitor, run.plan.top)
    except NotDurable as error:
        raise ImageUnreadable(file=run.plan.top.file, reason=error.reason) from None
    except FlushUnavailable:
        pass


def see_what_is_compared(run: Run) -> None:
    """Comparisons open names, which must lead to the images that are meant. Raises ImageUnreadable."""
    for image in run.plan.views[0]:
        astray = identity.astray(image, run.target.pid)
        if astray is not None:
            raise ImageUnreadable(file=image.file, reason=f"{image.file} is another file now: {astray.found}")


def not_compared(planned: Plan, reason: str) -> str:
    """The hint about a base on the network that was taken as it is."""
    return (
        f"{planned.receiver.file} was not compared ({reason}): what its server lost if it was started again is not seen"
    )


@contextlib.asynccontextmanager
async def counting(run: Run) -> AsyncIterator[None]:
    """
    While QEMU copies find out what there is to copy, of which it tells only how far it has walked; not where many images have
    to be opened for that, nor of what an earlier run has pulled a part of.
    """
    is_continued = run.speed is None and run.plan.direction == "pull"
    if run.operation.pivots or is_continued or len(run.plan.merged) > CHEAP_LAYERS:
        yield
        return
    counted = asyncio.ensure_future(_count(run))
    try:
        yield
        await asyncio.wait([counted], timeout=COUNT_SECONDS)
    finally:
        counted.cancel()
        await asyncio.wait([counted])


async def _count(run: Run) -> None:
    with contextlib.suppress(ImageUnreadable, ToolMissing, OSError):  # a figure is no reason to fail
        see_what_is_compared(run)
        run.course = Course(await compare.copied(run.plan, run.target.monitor.version))
        run.copied = run.course.total
        if run.plan.direction == "commit" and _is_compared(run):
            run.mask = compare.mask(run.plan, run.course.extents)


def _is_compared(run: Run) -> bool:
    """Whether it is to be, as far as the merge itself decides that."""
    if run.verify is not None:
        return run.verify
    return not run.plan.receiver.has_path or is_cheap(run.plan)


def is_cheap(planned: Plan) -> bool:
    """Whether what the comparison has to open and to read is little."""
    sizes = [image.allocated for image in planned.merged]
    few = len(planned.chain) <= CHEAP_LAYERS
    return few and None not in sizes and sum(size or 0 for size in sizes) <= CHEAP_BYTES
