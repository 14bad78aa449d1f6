"""
Sessions with the monitor that end before the merge does: lost ones are made again, and polite ones left in between.

After a lost session nobody can say whether the last command took effect. The connection is closed first, so that a
command which QEMU has not read will not be run later; then QEMU is asked again, and what it says is the truth.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qmpmerge import shield
from qmpmerge.engine import blockjob, take_back
from qmpmerge.engine.operation import Merge
from qmpmerge.engine.progress import Meter
from qmpmerge.errors import JobFailed, MonitorSilent, NoReply, SessionLost, StillRunning, Untouched
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.targets.target import Host

T = TypeVar("T")

POLITE_TRIES_SECONDS = 0.5
"""How soon a polite follower looks again whether who took the monitor has let go of it."""


async def through(merge: Merge, work: Callable[[Doorbell], Awaitable[T]]) -> T:
    """
    Do `work`, which first looks where the job stands; once more with a new session where the first one is lost.

    Raises SessionLost or NoReply where there is no second one: then the outcome is unknown.
    """
    try:
        async with merge.host.monitor.listening() as doorbell:
            return await work(doorbell)
    except (SessionLost, NoReply) as lost:
        if not merge.host.can_reconnect:
            raise
        again = _again(merge, work, lost)
        return await (shield.finished(again) if merge.switching else again)


async def _again(merge: Merge, work: Callable[[Doorbell], Awaitable[T]], lost: SessionLost | NoReply) -> T:
    before = _identity(merge.host)
    if merge.guard is not None:  # it has the old connection too, and QEMU serves one at a time
        merge.guard.close()
        merge.guard = None
    await reconnect(merge.host, lost)
    if before is not None and _identity(merge.host) != before:
        await _see_the_new_qemu(merge)
    async with merge.host.monitor.listening() as doorbell:
        return await work(doorbell)


async def reconnect(host: Host, lost: SessionLost | NoReply) -> None:
    """A new session, at the first try. Raises `lost` where there is none: what the target does now is not known."""
    try:
        await host.reconnect()
    except Untouched:
        raise lost from None


def _identity(host: Host) -> tuple[int, str] | None:
    """Which QEMU it is: its pid, and when that process was started (field 22 of proc(5)'s stat)."""
    try:
        with open(f"/proc/{host.pid}/stat", encoding="ascii", errors="replace") as file:
            return (host.pid or 0, file.read().rpartition(")")[2].split()[19])
    except OSError:
        return None if host.pid is None else (host.pid, "")


async def _see_the_new_qemu(merge: Merge) -> None:
    """Another QEMU has no job of ours. Where it was started from the old chain, the merge has failed and that is all."""
    if await jobs.look(merge.host.monitor, merge.job) is None:
        now = await take_back.view_after(merge, merge.plan.chain)
        if now.chain.same_files(merge.plan.chain):
            raise JobFailed(job=merge.job, reason="QEMU was started anew, and the job ended with the old one")


async def follow_politely(merge: Merge, every: float) -> Job | None:
    """
    Follow the job to where it wants a decision, leaving the monitor to others for `every` seconds between two looks.

    Where somebody else holds it then, we wait for our turn. Raises StillRunning at the deadline.
    """
    meter = Meter(merge.disk.name, blockjob.counts(merge))
    while True:
        job = await jobs.look(merge.host.monitor, merge.job)
        if job is None or job.status in blockjob.DECISIONS:
            return job
        blockjob.tell(merge, meter, job)
        await jobs.resume_for_space(merge.host.monitor, job)
        await merge.host.monitor.close()
        await _sleep(merge, every)
        await our_turn(merge)


async def _sleep(merge: Merge, seconds: float) -> None:
    left = merge.patience.left
    await asyncio.sleep(seconds if left is None else max(0.0, min(seconds, left)))
    if left is not None and left <= seconds:
        raise StillRunning(target=merge.host.target, job=merge.job)


async def our_turn(merge: Merge) -> None:
    """Wait for a session of our own. Raises Unreachable where the monitor is gone, and not only held by somebody else."""
    while True:
        with contextlib.suppress(MonitorSilent):
            await merge.host.reconnect()
            return
        if merge.deadline is not None and time.monotonic() >= merge.deadline:
            raise StillRunning(target=merge.host.target, job=merge.job)
        await asyncio.sleep(POLITE_TRIES_SECONDS)
