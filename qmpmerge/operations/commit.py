"""
Merging: what to send, in which order.

    intermediate    plan -> checks -> block-commit -> PENDING -> flush base -> job-finalize -> flush overlay -> proof
    active          plan -> checks -> block-commit -> READY -> pause, job-complete, run -> proof

A plain `block-commit` is not safe; each step here avoids a harm that tests/test_merge.py pins. An intermediate merge
waits at PENDING until base is durable, since QEMU rewrites the overlay's header first and flushes afterwards. An active
merge is never held there: it would freeze the guest.

Success is read back: a fresh discovery of the graph and the header on disk must equal `plan.result`, or the outcome is
*unknown*. What an earlier qmpmerge has begun is gone on with from where it stands (`adopting`).
"""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass

from qmpmerge.chain import plan
from qmpmerge.chain.outcome import Ending, Outcome, Policy
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.checks import check
from qmpmerge.engine import operation, proof, run, takeover
from qmpmerge.engine.converge import Converge
from qmpmerge.engine.operation import Begun
from qmpmerge.engine.patience import Patience
from qmpmerge.engine.progress import Report
from qmpmerge.errors import LiveOnly, NoSuchLayer, OptionsConflict
from qmpmerge.journal import locks, note, store
from qmpmerge.qemu import bitmaps, jobs
from qmpmerge.qemu.bitmaps import Bitmap, Handling
from qmpmerge.recovery import settle
from qmpmerge.targets.target import ChainView, Host


async def commit(
    host: Host,
    disk: str | None = None,
    *,
    base: str | None = None,
    top: str | None = None,
    shallow: bool = False,
    ending: Ending = "pivot",
    speed: int = 0,
    verify: bool | None = None,
    bitmaps: Handling = "refuse",
    merged_files: Policy = "stash",
    pause: bool = True,
    force: Collection[str] = (),
    search: Collection[str] = (),
    dry_run: bool = False,
    converge: Converge | None = None,
    report: Report = lambda progress: None,
    timeout: float | None = None,
    patience: Patience | None = None,
    polite: float | None = None,
) -> Outcome:
    """
    Merge the images above `base` up to `top` into `base`; by default the whole chain, the guest moving onto its base.

    `verify` compares what base shows with what top shows, in another process, before anything is switched; None does so
    where it is cheap, True does so for an active merge while the guest is paused. `merged_files` says what becomes of
    them; to delete them they must be compared. `pause` lets the guest stand still for the milliseconds of the pivot:
    without it nobody can tell which image is right if QEMU and we die during it. `bitmaps` says what becomes of the
    dirty bitmaps of merged images. `force` and `search` are those of `checks.check`. `speed` is bytes a second, 0 for
    unlimited; `timeout` seconds, after which StillRunning is raised and the job goes on; `patience` says more than that,
    in its place. `converge` allows to slow down or pause a guest that writes as fast as is copied. With `polite`, the
    monitor is left to others for so many seconds between two looks at the job; the two do not go together.

    A job of an earlier qmpmerge that does this very thing is taken over, and what it has done already is only proved.

    Cancelling the task cancels the job and waits until the old chain is back; from the switch to the proof it waits.

    What an earlier merge of the chain left unfinished is put right first, where that is beyond doubt. If that was this
    very merge, its outcome is returned.

    Raises subclasses of Refused before anything is sent, of Failed when the job failed, of Unknown when the outcome
    could not be proved, StillRunning, TimeUp.
    """
    refuse_both(converge, polite)
    patience = patience or Patience(timeout)
    wanted = _Wanted(
        base,
        top,
        shallow,
        ending,
        speed,
        verify,
        bitmaps,
        merged_files,
        pause,
        force,
        search,
        dry_run,
        report,
        patience,
    )
    with contextlib.ExitStack() as stack:
        async with run.in_time(patience):
            view = await host.chain(disk)
            view = view if dry_run else await takeover.tidied(host, view, report)
            begun = _ended_unseen(host, view, wanted, stack) or await _settled(host, view, disk, wanted, stack)
        return begun if isinstance(begun, Outcome) else await run.run(begun, polite=polite, converge=converge)


def refuse_both(converge: Converge | None, polite: float | None) -> None:
    """Whoever helps a guest must have the monitor at hand."""
    if converge is not None and polite is not None:
        raise OptionsConflict(options=["--converge", "--polite"])


@dataclass(frozen=True)
class _Wanted:
    """What `commit` was asked for."""

    base: str | None
    top: str | None
    shallow: bool
    ending: Ending
    speed: int
    verify: bool | None
    bitmaps: Handling
    merged_files: Policy
    pause: bool
    force: Collection[str]
    search: Collection[str]
    dry_run: bool
    report: Report
    patience: Patience


def _ended_unseen(host: Host, view: ChainView, wanted: _Wanted, stack: contextlib.ExitStack) -> Begun | None:
    """The merge that is asked for, where an earlier qmpmerge has made it and nobody has proved it yet."""
    earlier = note.find(view.chain)
    if wanted.dry_run or earlier is None or not earlier.is_done(view.chain):
        return None
    if not earlier.is_what(base=wanted.base, top=wanted.top, shallow=wanted.shallow):
        return None
    lock = stack.enter_context(locks.held(note.place(earlier.plan)))
    revived = takeover.revived(
        host, view, earlier, ending=wanted.ending, report=wanted.report, patience=wanted.patience
    )
    revived.policy = wanted.merged_files
    return Begun(revived, lock)


async def _settled(
    host: Host, view: ChainView, disk: str | None, wanted: _Wanted, stack: contextlib.ExitStack
) -> Begun | Outcome:
    """The merge that is asked for, once what an earlier one left is put right: that may be all there was to do."""
    if wanted.dry_run or not store.about(view.chain):
        return await _begun(host, view, wanted, stack)
    settled = await settle.settle(host, view.chain)
    view = await host.chain(disk)
    try:
        begun = await _begun(host, view, wanted, stack)
    except NoSuchLayer:
        if settled is None:
            raise
        return settled  # the layer was merged away by what was just finished
    return settled or begun if isinstance(begun, Outcome) and begun.verdict == "unchanged" else begun


async def _begun(host: Host, view: ChainView, wanted: _Wanted, stack: contextlib.ExitStack) -> Begun | Outcome:
    """The merge that is asked for: taken over where its job is at work, else checked; an outcome where that is all."""
    planned = plan.commit(view.chain, disk=view.disk.name, base=wanted.base, top=wanted.top, shallow=wanted.shallow)
    if planned.is_empty:
        return Outcome("unchanged", view.disk.name, view.chain, view.chain)
    _refuse_to_leave(host, wanted)
    if wanted.verify is True and not wanted.pause and planned.pivots and host.is_live:
        raise OptionsConflict(options=["--verify", "--no-pause"])
    lock = stack.enter_context(locks.held(note.place(planned)))
    suspect = note.suspicion(planned)
    job = None if wanted.dry_run else takeover.under_way(view, planned)
    found = None if job is not None else await _checked(host, view, planned, wanted)
    if job is None:
        await takeover.refuse_suspect(host, planned, suspect)
    else:
        wanted.report(takeover.found(view, job))
        await jobs.set_speed(host.monitor, job, wanted.speed)
    if wanted.dry_run and found is not None:
        return proof.planned(view.disk.name, planned, wanted.merged_files, found.checks, found.estimate)
    merge = operation.begin(
        host,
        view,
        planned,
        wanted.ending,
        wanted.report,
        wanted.patience,
        wanted.verify if suspect is None else True,
        policy=wanted.merged_files,
        pauses=wanted.pause,
    )
    merge.suspect = suspect
    merge.bitmaps = found.bitmaps if found is not None else _portable(view, planned, wanted)
    return Begun(merge, lock, None if job else wanted.speed)


def _portable(view: ChainView, planned: CommitPlan, wanted: _Wanted) -> tuple[Bitmap, ...]:
    """Whoever has started the job was not refused for its bitmaps, so what can come along does."""
    return () if wanted.bitmaps == "drop" else bitmaps.portable(view.layout, planned)


async def _checked(host: Host, view: ChainView, planned: CommitPlan, wanted: _Wanted) -> check.Answer:
    return await check.check(
        host,
        view,
        planned,
        ending=wanted.ending,
        handling=wanted.bitmaps,
        force=wanted.force,
        search=wanted.search,
        speed=wanted.speed,
        closely=wanted.dry_run,
    )


def _refuse_to_leave(host: Host, wanted: _Wanted) -> None:
    """Offline nothing goes on without us."""
    if not host.is_live and (wanted.ending == "ready" or wanted.patience.detach):
        raise LiveOnly(option="--detach" if wanted.patience.detach else "--wait-ready")
