"""
The course of a merge: from a job that is to be started, or is there, to a proved outcome; and the ways to leave it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import NoReturn

from qmpmerge import shield
from qmpmerge.chain.outcome import Outcome
from qmpmerge.engine import before_switch, blockjob, journaling, pivot, proof, reconnect, switch, take_back
from qmpmerge.engine.converge import Converge, Ladder, climbing
from qmpmerge.engine.operation import Begun, Merge
from qmpmerge.engine.patience import Patience
from qmpmerge.errors import (
    Cancelled,
    Failed,
    JobFailed,
    LeftCancelling,
    NotProven,
    StillRunning,
    TimedOut,
    TimeUp,
    Untouched,
)
from qmpmerge.guest import pause
from qmpmerge.qemu import jobs
from qmpmerge.qemu.monitor import Doorbell


@contextlib.asynccontextmanager
async def in_time(patience: Patience) -> AsyncIterator[None]:
    """What comes before the job's start, within the time limit. Raises TimeUp."""
    try:
        async with asyncio.timeout(patience.left):
            yield
    except TimeoutError:
        raise TimeUp(seconds=patience.timeout or 0.0) from None


async def run(begun: Begun, *, polite: float | None = None, converge: Converge | None = None) -> Outcome:
    """
    From a job that is to be started, or runs, to a proved outcome, with a witness: that goes when the outcome is known,
    and stays when it is not, or the job goes on.

    Cancelled before the switch it takes the job back, even one whose start was not confirmed yet; after it, it waits.
    """
    merge = begun.merge
    merge.converge = converge
    journaling.begin(merge, resumed=begun.speed is None)
    try:
        return await _run(begun, polite)
    except (Untouched, Failed, Cancelled, asyncio.CancelledError):  # the old chain was proved to be in use
        journaling.take_back(merge)
        raise
    finally:
        journaling.leave(merge)


async def _run(begun: Begun, polite: float | None) -> Outcome:
    merge = begun.merge
    with journaling.noted(begun.lock, merge, is_new=begun.speed is not None):
        try:
            async with asyncio.timeout(merge.patience.left):
                outcome = await _followed(begun, polite)
        except asyncio.CancelledError:
            mine = begun.speed is not None or merge.job.startswith(jobs.PREFIX)
            if not mine or (merge.patience.leaving and merge.host.is_live):
                raise left(merge) from None  # leaving somebody else's job is not ending it
            await _take_back(merge)
            raise
        except (StillRunning, TimeoutError):
            return await _stop_waiting(merge)
        if outcome.verdict != "ready":
            begun.lock.clear()  # all is proved: there is nothing to be told to who comes next
        return outcome


async def _stop_waiting(merge: Merge) -> NoReturn:
    """At the time limit, or where we are to leave at once."""
    patience = merge.patience
    if merge.host.is_live and (patience.then == "leave" or patience.detach or merge.switching):
        raise left(merge)
    await _take_back(merge)
    if merge.host.is_live:
        raise TimeUp(seconds=patience.timeout or 0.0)
    raise TimedOut(job=merge.job)


def left(merge: Merge) -> StillRunning:
    """The error that says how to come back to the job."""
    option = {"pivot": "", "keep": " --keep-overlay", "ready": " --wait-ready"}[merge.ending]
    return StillRunning(target=merge.host.target, job=merge.job, option=option)


async def _take_back(merge: Merge) -> None:
    """Cancel the job and see that the old chain is in use; given up only where we are told to leave at once."""
    work = reconnect.through(merge, lambda doorbell: take_back.take_back(merge, doorbell))
    try:
        await shield.finished(work, unless=merge.patience.is_leaving)
    except asyncio.CancelledError:
        raise LeftCancelling(target=merge.host.target, job=merge.job) from None


async def _followed(begun: Begun, polite: float | None) -> Outcome:
    merge = begun.merge
    is_polite = polite is not None and merge.host.can_reconnect and not merge.patience.detach
    merge.is_started = begun.speed is None
    is_sent = merge.is_started

    async def work(doorbell: Doorbell) -> Outcome | None:
        nonlocal is_sent
        if not is_sent:
            is_sent = True  # whatever becomes of it: it is never sent twice
            await blockjob.start(merge, begun.speed or 0)
            merge.is_started = True
        if merge.patience.detach:
            raise left(merge)
        return None if is_polite else await _helped_to_the_end(merge, doorbell)

    outcome = await reconnect.through(merge, work)
    if outcome is None:
        assert polite is not None
        await reconnect.follow_politely(merge, polite)
        outcome = await reconnect.through(merge, lambda doorbell: _helped_to_the_end(merge, doorbell))
    return outcome


async def _helped_to_the_end(merge: Merge, doorbell: Doorbell) -> Outcome:
    async with climbing(merge.host.monitor, merge.disk, merge.job, merge.watch, merge.converge) as ladder:
        outcome = await _to_the_end(merge, doorbell, ladder)
    return replace(outcome, rungs=tuple(ladder.rungs))


async def _to_the_end(merge: Merge, doorbell: Doorbell, ladder: Ladder) -> Outcome:
    """What cannot be looked at once the job was started is not refused, as if nothing had been done: it is unknown."""
    try:
        _put_on_guard(merge)
        job = await blockjob.copy(merge, doorbell)
        await ladder.stop()  # the guest goes on before it is paused for the pivot, if it was paused to get here
        if job is None and not merge.is_started:
            await take_back.prove_old_chain(merge)
            raise JobFailed(job=merge.job, reason="the session was lost before QEMU had started it")
        if job is not None and job.status == "ready" and merge.ending == "ready":
            return proof.ready(merge)
        if job is not None:
            await before_switch.make_sure(merge, doorbell, job)
        if job is not None and job.status == "ready" and merge.ending == "pivot" and merge.plan.pivots:
            job = await pivot.pivot(merge, doorbell, job.status)
        return await shield.finished(switch.switch(merge, doorbell, job))
    except Untouched as error:
        found = f"no way to look: {error}"
        raise NotProven(target=merge.host.target, expected=str(merge.plan.result), found=found) from None


def _put_on_guard(merge: Merge) -> None:
    """Early, so that nobody waits for it when the guest is to be paused."""
    will_pause = merge.plan.pivots and merge.host.is_live and merge.pauses and merge.ending == "pivot"
    if will_pause and merge.guard is None:
        merge.guard = pause.start_switch(merge.host.monitor)
