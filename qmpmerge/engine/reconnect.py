"""
Sessions with the monitor that end before the merge does: lost ones are made again, and polite ones left in between.

After a lost session, or a reply that says nothing, nobody can say whether the last command took effect. The connection is
closed first, so that a command which QEMU has not read will not be run later; then QEMU is asked again, and what it says is
the truth.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qmpmerge import shield
from qmpmerge.chain.state import State
from qmpmerge.engine import blockjob, proof
from qmpmerge.engine.pace.progress import Meter
from qmpmerge.engine.run import Run
from qmpmerge.errors import (
    BadReply,
    DaemonEnded,
    JobFailed,
    MonitorSilent,
    NoReply,
    NoSuchDisk,
    PauseUnproven,
    SessionLost,
    StillRunning,
    Unknown,
    Untouched,
)
from qmpmerge.processes import proc
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.targets.target import Target

T = TypeVar("T")

POLITE_TRIES_SECONDS = 0.5
"""How soon a polite follower looks again whether who took the monitor has let go of it."""


async def through(run: Run, work: Callable[[Doorbell], Awaitable[T]]) -> T:
    """
    Do `work`, which first looks where the job stands; once more with a new session where the first one is lost.

    Raises SessionLost, NoReply or BadReply where there is no second one: then the outcome is unknown. DaemonEnded where it is
    known: a daemon of our own ends with us, and what it was not told to switch it has not switched.
    """
    try:
        async with run.target.monitor.listening() as doorbell:
            return await work(doorbell)
    except (SessionLost, NoReply, BadReply) as lost:
        if not run.target.is_live and not _may_have_switched(run):
            raise DaemonEnded(reason=str(lost)) from None
        if not run.target.can_reconnect:
            raise
        again = _again(run, work, lost)
        return await (shield.finished(again) if run.past_return else again)


def _may_have_switched(run: Run) -> bool:
    return run.past_return or (run.record is not None and run.record.state is not State.COPYING)


async def _again(run: Run, work: Callable[[Doorbell], Awaitable[T]], lost: Unknown) -> T:
    pid = run.target.pid
    run.log("reconnect", "{reason}; another session is made", reason=str(lost))
    before = None if pid is None else proc.process(pid)
    if run.deadman is not None:  # it has the old connection too, and QEMU serves one at a time
        run.deadman.close()
        run.deadman = None
    try:
        await reconnect(run.target, lost)
    except SessionLost as last:
        if pid is None or proc.process(pid) is not None or not run.plan.chain.active.has_path:
            raise
        image = run.plan.chain.active.file
        raise SessionLost(target=last.target, command=last.command, reason=last.reason, image=image) from None
    if pid is not None and (before is None or proc.process(run.target.pid or 0) != before):
        await _see_the_new_qemu(run, "reconnecting")
    async with run.target.monitor.listening() as doorbell:
        return await work(doorbell)


async def reconnect(target: Target, lost: Unknown) -> None:
    """
    A new session, at the first try. Raises `lost` where there is none: what the target does now is not known. PauseUnproven
    where its guest was paused by us, and QEMU may be there still.
    """
    try:
        await target.reconnect()
    except Untouched:
        is_gone = target.pid is not None and proc.process(target.pid) is None
        if target.monitor.has_paused and not is_gone:
            raise PauseUnproven(target=target.name, reason=str(lost)) from None
        raise lost from None


async def _see_the_new_qemu(run: Run, command: str) -> None:
    """
    Another QEMU has no job of ours, whatever it calls its own. Where it was started from the old chain, the merge has failed
    and that is all; where it was not from the new one either, it has nothing to do with us. Raises JobFailed, SessionLost.
    """
    found = None
    with contextlib.suppress(NoSuchDisk):
        found = (await proof.view_after(run, run.plan.chain)).chain
    if found is not None and found.same_files(run.plan.chain):
        raise JobFailed(job=run.job, reason="QEMU was started anew, and the job ended with the old one")
    is_theirs = await jobs.look(run.target.monitor, run.job) is not None
    if is_theirs or found is None or not found.same_files(run.plan.result):
        reason, active = "QEMU was started anew, on other images", run.plan.chain.active
        image = active.file if active.has_path else ""
        raise SessionLost(target=run.target.name, command=command, reason=reason, image=image)


async def follow_politely(run: Run, every: float) -> Job | None:
    """
    Follow the job to where it wants a decision, leaving the monitor to others for `every` seconds between two looks.

    Where somebody else holds it then, we wait for our turn. Raises StillRunning at the deadline, JobFailed and SessionLost
    where another QEMU has the monitor by now.
    """
    meter, pid = Meter(run.disk.name), run.target.pid
    qemu = None if pid is None else proc.process(pid)
    while True:
        job = await jobs.look(run.target.monitor, run.job)
        if job is None or job.status in run.operation.decisions:
            return job
        blockjob.tell(run, meter, job)
        await jobs.resume_for_space(run.target.monitor, job)
        await run.target.monitor.close()
        await _sleep(run, every)
        await our_turn(run)
        if qemu is not None and proc.process(run.target.pid or 0) != qemu:
            await _see_the_new_qemu(run, "a wait")


async def _sleep(run: Run, seconds: float) -> None:
    left = run.request.patience.left
    await asyncio.sleep(seconds if left is None else max(0.0, min(seconds, left)))
    if left is not None and left <= seconds:
        raise StillRunning(target=run.target.name, job=run.job)


async def our_turn(run: Run) -> None:
    """Wait for a session of our own. Raises Unreachable where the monitor is gone, and not only held by somebody else."""
    while True:
        with contextlib.suppress(MonitorSilent):
            await run.target.reconnect()
            return
        if run.deadline is not None and time.monotonic() >= run.deadline:
            raise StillRunning(target=run.target.name, job=run.job)
        await asyncio.sleep(POLITE_TRIES_SECONDS)
