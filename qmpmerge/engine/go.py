"""
From a job that is to be started, or is there, to a proved outcome; and the ways to leave it.

Success is read back: a fresh discovery of the graph and the header on disk must equal `plan.result`, or the outcome is
*unknown*.
"""

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from qmpmerge import shield
from qmpmerge.chain.outcome import Outcome
from qmpmerge.chain.state import State
from qmpmerge.engine import blockjob, log, pivot, proof, reconnect, safeguards
from qmpmerge.engine.pace.progress import Progress, ReportRaised
from qmpmerge.engine.run import Run
from qmpmerge.errors import (
    Cancelled,
    Failed,
    JobFailed,
    LeftCancelling,
    LeftDisplaced,
    NotProven,
    Postponed,
    RecordLeft,
    StillRunning,
    TimedOut,
    TimeUp,
    Untouched,
)
from qmpmerge.guest import pause
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell

if TYPE_CHECKING:
    from qmpmerge.engine.pace.converge import Ladder


SYNC_SECONDS = 1.0
"""What storage that is well takes at the most to make a record durable."""


async def go(run: Run) -> Outcome:
    """
    Carry `run` out, to a proved outcome, or to where it is held.

    Cancelled before the switch, or where `report` raises, it takes the job back, even one whose start was not confirmed yet;
    after it, it waits. The record goes when the outcome is known, and stays when it is not, or the job goes on.

    Raises subclasses of Refused before anything is sent, of Failed when the job failed, of Unknown when the outcome could
    not be proved, StillRunning, TimeUp, TimedOut.
    """
    run.write_down()
    run.target.monitor.has_acted = True  # by now somebody has: a job that is there already is followed, too
    is_recorded = True
    try:
        try:
            return await _within_limits(run)
        finally:
            is_recorded = await _recorded_or_left(run)
    except (Untouched, Failed, Postponed, Cancelled, asyncio.CancelledError) as error:
        if run.is_sent and isinstance(error, Untouched):  # what was begun and cannot be looked at is not refused
            found = f"no way to look: {error}"
            raise NotProven(target=run.target.name, expected=str(run.plan.result), found=found) from None
        _end(run, error, is_recorded=is_recorded)  # the old chain was proved to be in use
        raise
    except StillRunning as error:
        error.outcome = proof.left(run)
        raise
    except ReportRaised as raised:
        await _ended_by_report(run, is_recorded=is_recorded)
        callers = raised.error
    finally:
        run.close()
        log.headers("after", run.images())
    try:
        raise callers
    finally:
        del callers  # or it holds itself, and the descriptors that its traceback holds


async def _recorded_at_last(run: Run, within: float | None = None) -> bool:
    """Where the job is over, or goes on without us, it is too late to take it back: that it failed is said."""
    try:
        return await run.recorded(within)
    except OSError as error:
        run.notes.append(f"the storage did not make the record durable: {error.strerror or error}")
        return True


async def _recorded_or_left(run: Run) -> bool:
    """
    The same at the end of all, where False is said too: at the time limit, or told to leave, nobody waits for storage that
    hangs. The record is written, and nothing is switched before whoever comes next has made it durable; until then the old
    chain is right by its headers alone (see `Run.write_down`).
    """
    patience = run.request.patience
    left = 0.0 if patience.leaving else patience.left
    waiting = _recorded_at_last(run, None if left is None else max(left, SYNC_SECONDS))
    is_recorded = False
    with contextlib.suppress(asyncio.CancelledError):
        is_recorded = await shield.finished(waiting, unless=patience.is_leaving)
    if not is_recorded:
        path = run.record.path if run.record is not None else run.lock.path
        hint = f"{path} is written, but the storage has not made it durable yet, so it was left"
        run.notes.append(hint)
        _tell_hint(run, hint)
    return is_recorded


def _end(run: Run, error: BaseException, *, is_recorded: bool) -> None:
    """UNDONE, but for a record that the storage still works at. Raises RecordLeft."""
    if is_recorded:
        run.undone(error)
    elif isinstance(error, Cancelled | asyncio.CancelledError):
        raise RecordLeft(image=run.plan.chain.active.file) from None


async def _within_limits(run: Run) -> Outcome:
    patience = run.request.patience
    limit = asyncio.timeout(patience.left)
    try:
        async with limit:
            return await _followed(run)
    except asyncio.CancelledError:
        if not _is_ours_to_end(run):
            raise _left(run) from None
        await _taken_back(run)
        raise
    except LeftDisplaced:
        run.leave()
        raise
    except TimeoutError as error:
        if not (limit.expired() or isinstance(error, StillRunning)):  # none of a time limit, as a system call's
            raise
        return await _stop_waiting(run)


def _is_ours_to_end(run: Run) -> bool:
    """To leave somebody else's job is not to end it, and what was not sent cannot be left."""
    is_ours = run.speed is not None or run.job.startswith(jobs.PREFIX)
    return is_ours and not (run.request.patience.leaving and run.target.is_live and run.is_sent)


async def _ended_by_report(run: Run, *, is_recorded: bool) -> None:
    """As cancelled; what the caller's `report` has raised says the rest."""
    if _is_ours_to_end(run):
        await _taken_back(run)
        if is_recorded:
            run.undone()
    else:
        run.leave()


async def _stop_waiting(run: Run) -> NoReturn:
    """At the time limit, or where we are to leave at once."""
    if run.target.is_live and run.is_sent:
        raise _left(run)
    await _taken_back(run)
    if not run.is_sent:
        raise TimeUp(seconds=run.request.patience.timeout or 0.0)
    raise TimedOut(job=run.job, seconds=run.request.patience.timeout or 0.0)


def _left(run: Run) -> StillRunning:
    """The error that says how to come back to the job."""
    run.leave()
    return StillRunning(target=run.target.name, job=run.job, option=run.request.option)


async def _taken_back(run: Run) -> None:
    """Cancel the job and see that the old chain is in use; given up only where we are told to leave at once."""
    work = reconnect.through(run, lambda doorbell: blockjob.take_back(run, doorbell))
    try:
        await shield.finished(work, unless=run.request.patience.is_leaving)
    except asyncio.CancelledError:
        raise LeftCancelling(target=run.target.name, job=run.job) from None
    _tell_what_is_left(run)


def _tell_what_is_left(run: Run) -> None:
    if run.operation.left_behind is not None:
        _tell_hint(run, run.operation.left_behind)


def _tell_hint(run: Run, hint: str) -> None:
    """At once, since there may be no outcome to say it with."""
    if run.seen is not None:
        with contextlib.suppress(ReportRaised):
            run.tell(Progress(run.disk.name, run.seen, run.operation.counts, hint=hint))


async def _followed(run: Run) -> Outcome:
    patience, polite = run.request.patience, run.request.polite
    is_polite = polite is not None and run.target.can_reconnect and not patience.detach

    async def work(doorbell: Doorbell) -> Outcome | None:
        if not run.is_sent:
            await _start(run)
        if patience.detach:
            await blockjob.see_recorded(run, doorbell)
            await _seen_once(run)
            raise _left(run)
        return None if is_polite else await _helped(run, doorbell)

    outcome = await reconnect.through(run, work)
    if outcome is None:
        assert polite is not None
        await reconnect.follow_politely(run, polite)
        outcome = await reconnect.through(run, lambda doorbell: _helped(run, doorbell))
    return outcome


async def _seen_once(run: Run) -> None:
    job = await jobs.look(run.target.monitor, run.job)
    if job is not None:
        blockjob.see(run, job)


async def _start(run: Run) -> None:
    """Whatever becomes of it, it is sent only once."""
    await run.recorded_before()
    run.is_sent = True
    try:
        await run.operation.start(run)
    except Untouched:
        run.is_sent = False
        raise
    run.is_started = True
    run.log("started", "started: {top} into {into}", top=run.plan.top.label, into=run.plan.receiver.label)


async def _helped(run: Run, doorbell: Doorbell) -> Outcome:
    if run.request.converge is None:
        return await _to_the_end(run, doorbell)
    from qmpmerge.engine.pace.converge import climbing

    async with climbing(run, run.request.converge) as ladder:
        outcome = await _to_the_end(run, doorbell, ladder)
    return replace(outcome, converge=tuple(ladder.rungs))


async def _to_the_end(run: Run, doorbell: Doorbell, ladder: "Ladder | None" = None) -> Outcome:
    _start_deadman(run)
    job = await _copied(run, doorbell)
    if ladder is not None:
        await ladder.stop()  # the guest goes on before it is paused for the pivot, if it was paused to get here
    if job is not None:
        await _made_safe(run, doorbell, job)
    if job is not None and run.is_to_be_held(job):
        run.leave()
        return proof.held(run)
    if job is not None and job.status != "concluded":
        job = await run.operation.switch(run, doorbell, job)
    return await shield.finished(_proved(run, doorbell, job))


def _start_deadman(run: Run) -> None:
    """Early, so that nobody waits for it when the guest is to be paused."""
    request = run.request
    if (
        run.operation.pivots
        and run.target.is_live
        and request.pause
        and request.ending == "pivot"
        and run.deadman is None
    ):
        run.deadman = pause.start_switch(run.target.monitor)


async def _copied(run: Run, doorbell: Doorbell) -> Job | None:
    """COPYING: the job where it waits for us; None where it is gone."""
    async with safeguards.counting(run):
        job = await blockjob.copy(run, doorbell)
    if job is not None and job.status != "concluded":
        await blockjob.see_recorded(run, doorbell)
    await _recorded_at_last(run)
    if job is None and not run.is_started:
        await proof.prove_old_chain(run)
        await run.operation.let_go(run)
        raise JobFailed(job=run.job, reason="the session was lost before QEMU had started it")
    return job


async def _made_safe(run: Run, doorbell: Doorbell, job: Job) -> None:
    """COPYING to SAFE; what has concluded without us is past that."""
    await run.operation.safeguards(run, doorbell, job)
    if run.state is State.COPYING and job.status != "concluded":  # else it was there already, and a session was lost
        run.enter(State.SAFE)


async def _proved(run: Run, doorbell: Doorbell, job: Job | None) -> Outcome:
    """To SWITCHED, PROVED and DONE, or KEPT; for a job that ended without us, the proof."""
    run.past_return = True
    job = await run.operation.end_of(run, doorbell, job)
    if job is not None:
        if job.reason is not None:
            await proof.prove_old_chain(run)
            await run.operation.let_go(run)
            raise blockjob.failure(run, job.reason)
        run.has_ended_well = True
    if run.let_go:
        return await proof.prove(run, "kept", run.plan.chain)
    await run.operation.make_durable(run)
    await run.operation.let_go(run)
    await run.target.close(run.old_nodes)  # what explicit -blockdev nodes the merge left open
    pivot.see_closed(run)
    return await proof.prove(run, run.operation.verdict, run.plan.result)
