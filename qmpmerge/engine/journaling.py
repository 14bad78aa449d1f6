"""
The account that a merge gives of itself while it runs: its witness, kept at the phase that it is in.

Where no witness can be kept (an active image on the network or on a device, a folder that we may not write), the merge
goes on without, and its outcome says what cannot be promised.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from qmpmerge.chain.chain import Chain
from qmpmerge.chain.outcome import MergedFile
from qmpmerge.engine import before_switch
from qmpmerge.engine.operation import Merge
from qmpmerge.errors import Error, JobFailed, NotDurable, NotVerified, StillRunning, Unknown
from qmpmerge.images import files
from qmpmerge.journal import merged_files, record, stash, store
from qmpmerge.journal.locks import Lock
from qmpmerge.journal.note import SCHEMA, find, place
from qmpmerge.journal.record import Phase, Seen, Witness
from qmpmerge.processes import proc
from qmpmerge.qemu import jobs


def begin(merge: Merge, *, resumed: bool) -> None:
    """Write down what is about to be done, before the job is started; `resumed`, go on with what an earlier one wrote."""
    told = _plain(merge)
    known = store.read(told.path)
    if resumed and known is not None and _is_of_this(known, told):
        # It knows the files by their inodes. Where the job was told to complete, maybe, the name stays away until it is
        # known what came of it.
        away, before = {**told.away, **known.away}, {**told.before, **known.before}
        told = replace(told, chain=known.chain, away=away, before=before, phase=known.phase, seen=known.seen)
    try:
        if not files.is_regular(told.place(len(told.chain)) or told.chain.active.file):
            raise OSError("it is no regular file")
        merge.witness = store.write(told)
    except OSError as error:
        merge.witness = None
        if merge.plan.pivots:
            merge.notes.append(_without(merge, error))


def _is_of_this(known: Witness, told: Witness) -> bool:
    return (known.job, known.chain.files, known.base, known.top) == (told.job, told.chain.files, told.base, told.top)


def _plain(merge: Merge) -> Witness:
    host, planned = merge.host, merge.plan
    base, top = planned.chain.index(planned.base), planned.chain.index(planned.top)
    others = range(base + 1, top if planned.pivots else top + 1)
    return Witness(
        path=store.path_of(planned.chain.active.file),
        target=_address(host.target),
        disk=merge.disk.name,
        device=merge.disk.drive or merge.disk.qdev,
        job=merge.job,
        chain=planned.chain,
        base=base,
        top=top,
        policy=merge.policy,
        qemu=proc.process(host.pid) if host.pid is not None else None,
        tool=proc.process(os.getpid()),
        is_live=host.is_live,
        away={} if merge.policy == "keep" else stash.names_away(planned.chain, base, top),
        before=record.looks(planned.chain, others),
    )


def _address(target: str) -> str:
    """What the user called the host, so that it means the same from every folder."""
    path = target.removeprefix("unix:")
    return os.path.abspath(path) if os.path.lexists(path) else target


def _without(merge: Merge, error: OSError) -> str:
    active, reason = merge.plan.chain.active.file, error.strerror or error
    return (
        f"no witness could be kept beside {active} ({reason}): had this host died during the pivot, nobody could tell "
        f"which image holds the last writes"
    )


def note(merge: Merge, phase: Phase, *, seen: dict[int, Seen] | None = None) -> None:
    """The merge is in this phase now; durable after `sync`. Raises OSError."""
    if merge.witness is not None:
        seen = merge.witness.seen if seen is None else seen
        merge.witness = store.mark(replace(merge.witness, phase=phase, seen=seen, verified=merge.verified))


def sync(merge: Merge) -> None:
    """Make durable what was noted, and the names of the files beside the witness. Raises OSError."""
    if merge.witness is not None:
        store.sync(merge.witness)


def end(merge: Merge) -> None:
    """The outcome is known and nothing remains to be done: the witness goes, and the dead man's switch."""
    leave(merge)
    if merge.witness is None:
        return
    try:
        store.remove(merge.witness)
    except OSError as error:
        merge.notes.append(f"{merge.witness.path} cannot be removed: {error.strerror or error}")
    merge.witness = None


def take_back(merge: Merge) -> None:
    """The old chain was proved to be in use: the active image has its name again, and the witness goes."""
    if merge.witness is not None:
        try:
            merged_files.give_back(merge.witness, merge.witness.top)
        except OSError as error:
            merge.notes.append(f"{merge.plan.top.file} could not get its name back: {error.strerror or error}")
            leave(merge)
            return
    end(merge)


def leave(merge: Merge) -> None:
    """Whoever comes next finds the witness; the dead man's switch goes."""
    if merge.guard is not None:
        merge.guard.close()
        merge.guard = None


async def settle_files(merge: Merge) -> tuple[MergedFile, ...]:
    """The outcome is proved and durable: deal with the merged files, and then nothing remains."""
    told = merge.witness or replace(_plain(merge), verified=merge.verified)
    if merge.witness is not None:
        try:
            note(merge, "proved")
            sync(merge)
            told = merge.witness
        except OSError as error:
            merge.notes.append(f"{merge.witness.path} cannot be written: {error.strerror or error}")
    done, hints = await merged_files.finish(told)
    merge.notes += hints
    end(merge)
    return tuple(done)


def _note(merge: Merge, since: float) -> dict[str, Any]:
    chain = merge.plan.chain
    return {
        "schema": SCHEMA,
        "job": merge.job,
        "target": merge.host.target,
        "since": since,
        "images": [asdict(image) for image in chain],
        "base": chain.index(merge.plan.base),
        "top": chain.index(merge.plan.top),
        "old_nodes": merge.old_nodes,
        "base_driver": merge.base_driver,
        "suspect": merge.suspect,
    }


@contextlib.contextmanager
def noted(lock: Lock, merge: Merge, *, is_new: bool) -> Iterator[None]:
    """
    Keep a note for who comes next while the merge is under way, and after it where there is something to be known: the
    job goes on, the outcome is not proved, or base could not be written as it should. One that is not new keeps the time
    at which it was begun.
    """
    earlier = None if is_new else find(Chain((place(merge.plan),)))
    note = _note(merge, earlier.since if earlier and earlier.job == merge.job else time.time())
    lock.note(note)
    try:
        yield
    except (Unknown, StillRunning):
        raise
    except (JobFailed, NotDurable, NotVerified) as error:
        if merge.suspect is None and not is_suspicious(error):
            lock.clear()
        else:
            lock.note({**note, "suspect": merge.suspect or str(error.facts["reason"])})
        raise
    except BaseException:
        if merge.suspect is None:
            lock.clear()  # it was taken back: everything is as it was
        raise


def is_suspicious(error: Error) -> bool:
    """
    Whether after this failure base may not hold what QEMU believes: not where somebody cancelled the job, or where base
    and top could not be compared.
    """
    reason = error.facts["reason"]
    return reason == before_switch.DIFFERENT if isinstance(error, NotVerified) else reason != jobs.CANCELED
