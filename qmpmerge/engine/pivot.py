"""
The pivot: the device moves onto the base, while nobody writes.

The guest is paused once the job is ready. While it stands still base and top are equal; that is written down, top's name
is taken away, and only then the job is completed: whatever dies from here on, at no instant can a start from the old
name show older data without a word. The guest runs again when QEMU's graph has been read.
"""

import asyncio
import contextlib
import os
import time
from dataclasses import replace

from qmpmerge import shield
from qmpmerge.engine import before_switch, blockjob, journaling, take_back
from qmpmerge.engine.operation import Merge
from qmpmerge.errors import CommandError, NotWitnessed
from qmpmerge.guest.pause import paused
from qmpmerge.images import files
from qmpmerge.journal import merged_files, record, store
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.recovery import evidence

CLEAN_SECONDS = 2.0


async def pivot(merge: Merge, doorbell: Doorbell, status: str) -> Job | None:
    """
    Move the device onto the base; returns the job as it ended. Until the name is taken away it can be cancelled.

    Raises NotVerified, NotWitnessed with the job taken back; PauseUnproven; what a lost session raises.
    """
    exported = await _is_exported(merge)
    async with paused(merge.host.monitor, merge.guard) as pause:
        rests = (pause.guest_rests or not merge.host.is_live) and not exported and await _is_clean(merge)
        top = merge.plan.top
        is_there = not top.has_path or os.path.exists(top.file)
        if merge.verify is True and rests and not merge.verified and is_there:
            async with merge.guard.patient() if merge.guard else contextlib.nullcontext():
                await before_switch.verify(merge, doorbell)
        elif merge.verify is True and not merge.verified:
            reason = "somebody could write to the disk at any time" if not rests else "top has lost its name already"
            merge.notes.append(f"base and top were not compared: {reason}")
        elif merge.verify is None and not merge.plan.base.has_path and not merge.verified:
            merge.notes.append(before_switch.not_compared(merge.plan, "`--verify` does so while the guest is paused"))
        job = await shield.finished(_move(merge, doorbell, status, rests and not pause.has_lapsed))
    merge.paused_ms = pause.milliseconds
    if pause.is_unguarded:
        merge.notes.append(
            "the guest was not paused for the pivot: the process that was to guard the pause did not start"
        )
    return job


async def _move(merge: Merge, doorbell: Doorbell, status: str, rests: bool) -> Job | None:
    merge.switching = True
    try:
        _write_down(merge, rests)
        _take_name_away(merge)
        syncing = asyncio.ensure_future(asyncio.to_thread(_make_durable, merge))
        if not rests:  # else nothing will be written to the base before we have waited for it
            await syncing
    except OSError as error:
        await take_back.take_back(merge, doorbell)
        path = merge.witness.path if merge.witness else merge.plan.top.file
        raise NotWitnessed(path=path, reason=error.strerror or str(error)) from None
    job = await blockjob.end(merge, doorbell, status)
    moved = await _has_moved(merge, job)
    if merge.witness is not None and moved is not None:
        with contextlib.suppress(OSError):  # what was written before tells enough, and the guest waits
            if not moved:
                merged_files.give_back(merge.witness, merge.witness.top)
            journaling.note(merge, "switched" if moved else "copying")
            if moved:  # before the guest's next write, which base alone will have
                await asyncio.to_thread(files.sync, merge.witness.path)
    try:
        await syncing
    except OSError as error:
        merge.notes.append(f"the storage did not make the new names durable: {error.strerror or error}")
    return job


def _write_down(merge: Merge, rests: bool) -> None:
    """With what both files look like while nobody writes; a device, or a disk on the network, has no such evidence."""
    told = merge.witness
    if told is None:
        return
    places = {index: place for index in (told.base, told.top) if (place := told.place(index)) is not None}
    evident = rests and len(places) == 2 and all(map(files.is_regular, places.values()))
    seen = {index: record.seen(place) for index, place in places.items()} if evident else {}
    journaling.note(merge, "switching", seen=seen)


def _make_durable(merge: Merge) -> None:
    """
    The witness and the names; and the times of base and top as they are noted, for QEMU's own flushes (fdatasync) need not
    keep those: after a power cut an older one would look like a write.
    """
    journaling.sync(merge)
    told = merge.witness
    for index in told.seen if told is not None else ():
        place = told.place(index) if told is not None else None
        if place is not None:
            with contextlib.suppress(PermissionError):  # QEMU may be somebody else
                files.sync(place)


def _take_name_away(merge: Merge) -> None:
    """Where that is not allowed the merge goes on, and says so."""
    told = merge.witness
    if told is None or told.top not in told.away or told.place(told.top) == told.away[told.top]:
        return
    try:
        merged_files.take_away(told, told.top)
    except OSError as error:
        away = {index: name for index, name in told.away.items() if index != told.top}
        merge.witness = store.write(replace(told, away=away))
        merge.notes.append(f"{told.chain.active.file} could not be renamed: {error.strerror or error}")


async def _is_clean(merge: Merge) -> bool:
    """Wait until the job has nothing left to copy; a writer that does not rest is not waited for for ever."""
    deadline = time.monotonic() + CLEAN_SECONDS
    while time.monotonic() < deadline:
        told = await merge.host.monitor.execute("query-block-jobs")
        job = next((job for job in told if job["device"] == merge.job), None)
        if job is None:
            return False
        if job["offset"] == job["len"] and not job["busy"]:
            return True
    return False


async def _is_exported(merge: Merge) -> bool:
    """Whether somebody can write past the guest; what we have opened ourselves we have not exported."""
    if not merge.host.is_live:
        return False
    try:
        return bool(await merge.host.monitor.execute("query-block-exports"))
    except CommandError:
        return True


async def _has_moved(merge: Merge, job: Job | None) -> bool | None:
    """As the graph tells it; a disk that nobody uses has no device to look at, and nobody who could write."""
    if not merge.host.is_live:
        return job is not None and job.error is None
    layout = await merge.host.layout()
    moved = evidence.has_moved(layout, merge.disk.drive or merge.disk.qdev, merge.plan)
    is_used = bool(merge.disk.drive or merge.disk.qdev or layout.exported)
    return moved if is_used else job is not None and job.error is None
