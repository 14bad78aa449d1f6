"""
The pivot: the device moves onto the base, while nobody writes.

The guest is paused once the job is ready. While it stands still base and top are equal; that is written down, top's name
is taken away, and only then the job is completed: whatever dies from here on, at no instant can a start from the old
name show older data without a word. The guest runs again when QEMU's graph has been read.
"""

import asyncio
import contextlib
import os
from dataclasses import replace

from qmpmerge import folder, shield
from qmpmerge.chain.state import State
from qmpmerge.engine import blockjob, rest, safeguards
from qmpmerge.engine.log import held
from qmpmerge.engine.run import Run
from qmpmerge.errors import ImageUnreadable, LeftDisplaced, RecordFailed
from qmpmerge.guest.pause import Pause, paused
from qmpmerge.images import files, qcow2
from qmpmerge.journal import merged_files, store
from qmpmerge.journal.record import look
from qmpmerge.qemu import discovery, mutex
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.targets import identity

EVENT_SECONDS = 0.02
"""How long the event of the job's end is waited for, which comes within one; asked before that, QEMU has to be asked again."""


async def pivot(run: Run, doorbell: Doorbell, status: str) -> Job | None:
    """
    Move the device onto the base; returns the job as it ended. Until the name is taken away it can be cancelled.

    Raises NotPaused, NotVerified, NotAtRest, MigrationBegan, RecordFailed with the job taken back; LeftDisplaced;
    PauseUnproven; what a lost session raises.
    """
    await asyncio.to_thread(folder.renaming)  # the first thread takes a millisecond, with all that is loaded for it
    try:
        with held():
            job = await _paused(run, doorbell, status)
    except mutex.NoTurn as error:  # so nothing has been done yet
        raise await safeguards.not_paused(run, doorbell, error) from None
    return job or await shield.finished(blockjob.ended(run, doorbell))


async def _paused(run: Run, doorbell: Doorbell, status: str) -> Job | None:
    async with paused(run.target.monitor, run.deadman) as pause:
        if pause.switch is not None:
            run.log("paused", "the guest is paused")
        rests = await _comes_to_rest(run, doorbell, pause) and not pause.has_lapsed
        job = await shield.finished(_move(run, doorbell, status, rests))
    run.paused_seconds = pause.seconds
    if pause.seconds is not None:
        run.log("resumed", "the guest runs again, after {milliseconds:.1f} ms", milliseconds=1000 * pause.seconds)
    if pause.is_unguarded:
        run.notes.append(
            "the guest was not paused for the pivot: the process that was to guard the pause did not start"
        )
    return job


async def _comes_to_rest(run: Run, doorbell: Doorbell, pause: Pause) -> bool:
    """
    Whether nobody writes, once base and top have been compared where that is asked for. The last look is right before the
    switch; what is asked in it goes out at once, for the guest waits.
    """
    is_others, since = pause.switch is None and run.target.is_live, None
    takes_time = is_others or (run.verify is True and not run.verified)
    if takes_time:
        since = await rest.begin(run)
    if since is not None and is_others:
        with contextlib.suppress(ImageUnreadable):  # what that means is for the comparison to say
            await safeguards.write_out_top(run)
    if not run.verified:
        await _verify(run, doorbell, since)
    look = rest.lasts(run, since) if takes_time else rest.begin(run)
    last, _ = await shield.together([look, safeguards.see_that_it_stays(run, doorbell)])
    return last is not None


async def _verify(run: Run, doorbell: Doorbell, since: int | None) -> None:
    """Compare base and top where that is asked for and possible; what was not compared is noted."""
    top = run.plan.top
    if run.verify is None and not run.plan.receiver.has_path:
        run.notes.append(safeguards.not_compared(run.plan, "`--verify` does so while the guest is paused"))
    elif run.verify is True and since is None:
        run.notes.append("base and top were not compared: somebody could write to the disk at any time")
    elif run.verify is True and top.has_path and not os.path.exists(top.file):
        run.notes.append("base and top were not compared: top has lost its name already")
    elif run.verify is True:
        async with run.deadman.patient() if run.deadman else contextlib.nullcontext():
            await safeguards.verify(run, doorbell, since)


async def _move(run: Run, doorbell: Doorbell, status: str, rests: bool) -> Job | None:
    run.past_return = True
    try:
        _write_down(run, rests)
        _take_name_away(run)
        syncing = asyncio.ensure_future(asyncio.to_thread(_make_durable, run))
        if not rests:  # else nothing will be written to the base before we have waited for it
            await syncing
    except OSError as error:
        is_another = isinstance(error, FileNotFoundError)
        astray = identity.astray(run.plan.top, run.target.pid) if is_another else None
        await blockjob.take_back(run, doorbell)
        if astray is not None:
            raise identity.displaced(astray, run.target) from None
        path = run.record.path if run.record else run.plan.top.file
        raise RecordFailed(path=path, reason=error.strerror or str(error)) from None
    try:
        return await _ended(run, doorbell, status)
    finally:
        try:
            await syncing
        except OSError as error:
            run.notes.append(f"the storage did not make the new names durable: {error.strerror or error}")


async def _ended(run: Run, doorbell: Doorbell, status: str) -> Job | None:
    """
    Tell the job to end; None once the graph shows the device on base, which it does before anybody has asked for the job: the
    guest need not wait for that.
    """
    doorbell.silence()
    try:
        wanted = await blockjob.tell_to_end(run, doorbell, status)
    except LeftDisplaced:  # nothing was asked for
        _give_name_back(run)
        raise
    await doorbell.wait(EVENT_SECONDS)
    job, moved = None, await _has_moved(run)
    if not moved:
        job = await blockjob.ended(run, doorbell, wanted)
        moved = await _has_moved(run, job)
    await _note_whether_it_moved(run, moved)
    return job


async def _note_whether_it_moved(run: Run, moved: bool | None) -> None:
    """What was written before tells enough where this cannot be written: the guest waits."""
    if run.record is None or moved is None:
        return
    with contextlib.suppress(OSError):
        if not moved:
            merged_files.give_back(run.record, run.record.top)
        else:  # before the guest's next write, which base alone will have
            run.enter(State.SWITCHED)
            await asyncio.to_thread(store.sync_content, run.record)


def _write_down(run: Run, rests: bool) -> None:
    """With what both files look like while nobody writes; a device, or a disk on the network, has no such evidence."""
    record = run.record
    if record is None:
        return
    places = {index: place for index in (record.base, record.top) if (place := record.place(index)) is not None}
    evident = rests and len(places) == 2 and all(map(files.is_regular, places.values()))
    seen = {index: look(record.chain[index], place) for index, place in places.items()} if evident else {}
    with contextlib.suppress(OSError):
        run.top_header = qcow2.read(places[record.top]) if evident else None
    run.enter(State.SWITCHING, seen=seen)


def see_closed(run: Run) -> None:
    """
    What top looks like now that QEMU has closed it: it has cleared the mark that reference counts are lazy, and stored bitmaps.
    Only whoever saw it right before the switch, and sees it right after it was closed, tells that from a write of somebody's.
    """
    record, before = run.record, run.top_header
    place = record.place(record.top) if record is not None else None
    if record is None or before is None or place is None or record.top not in record.seen:
        return
    with contextlib.suppress(OSError):  # then it is one that was changed
        after = qcow2.read(place)
        if after is not None and (before.dirty or after.has_bitmaps):
            seen = {**record.seen, record.top: look(record.chain[record.top], place)}
            run.record = store.mark(replace(record, seen=seen))


def _make_durable(run: Run) -> None:
    """
    The record and the names; and the times of base and top as they are noted, for QEMU's own flushes (fdatasync) need not
    keep those: after a power cut an older one would look like a write.
    """
    run.sync()
    record = run.record
    for index in record.seen if record is not None else ():
        assert record is not None, "it was there a moment ago"
        place, data = record.place(index), record.chain[index].data
        for file in (place, data.file if data is not None else None):
            if file is not None:
                with contextlib.suppress(PermissionError):  # QEMU may be somebody else
                    files.sync(file)


def _take_name_away(run: Run) -> None:
    """
    Where that is not allowed the merge goes on, and says so; not where another file has the name: QEMU would open it, or wait
    for ever where it is a FIFO. Raises OSError.
    """
    record = run.record
    if record is None or record.top not in record.away or record.place(record.top) == record.away[record.top]:
        return
    try:
        place = merged_files.take_away(record, record.top)
    except FileNotFoundError:
        raise
    except OSError as error:
        away = {index: name for index, name in record.away.items() if index != record.top}
        run.record = store.write(replace(record, away=away))
        run.notes.append(f"{record.chain.active.file} could not be renamed: {error.strerror or error}")
    else:
        run.log("renamed", "{file} is called {now} now", file=record.chain.active.file, now=place)


def _give_name_back(run: Run) -> None:
    if run.record is not None:
        with contextlib.suppress(OSError):  # the guest waits, and whoever comes next finds it
            merged_files.give_back(run.record, run.record.top)


async def _has_moved(run: Run, job: Job | None = None) -> bool | None:
    """As the graph tells it; a disk that nobody uses has no device to look at, and nobody who could write."""
    device = run.disk.drive or run.disk.qdev or ""
    used = await discovery.in_use(run.target.monitor, device) if run.target.is_live else set()
    if not (used or device):
        return job is not None and job.reason is None
    if run.plan.top.node in used:
        return False
    return True if run.plan.receiver.node in used else None
