"""
The account that a merge gives of itself while it runs: its witness, kept at the phase that it is in.

Where no witness can be kept (an active image on the network or on a device, a folder that we may not write), the merge
goes on without, and its outcome says what cannot be promised.
"""

import os
from dataclasses import replace

from qmpmerge import disposal, files, witness
from qmpmerge.outcome import MergedFile
from qmpmerge.steps import Merge
from qmpmerge.witness import Phase, Seen, Witness


def begin(merge: Merge, *, resumed: bool) -> None:
    """Write down what is about to be done, before the job is started; `resumed`, go on with what an earlier one wrote."""
    told = _plain(merge)
    known = witness.read(told.path)
    if resumed and known is not None and _is_of_this(known, told):
        # It knows the files by their inodes. Where the job was told to complete, maybe, the name stays away until it is
        # known what came of it.
        away, before = {**told.away, **known.away}, {**told.before, **known.before}
        told = replace(told, chain=known.chain, away=away, before=before, phase=known.phase, seen=known.seen)
    try:
        if not files.is_regular(told.place(len(told.chain)) or told.chain.active.file):
            raise OSError("it is no regular file")
        merge.witness = witness.write(told)
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
        path=witness.path_of(planned.chain.active.file),
        target=_address(host.target),
        disk=merge.disk.name,
        device=merge.disk.drive or merge.disk.qdev,
        job=merge.job,
        chain=planned.chain,
        base=base,
        top=top,
        policy=merge.policy,
        qemu=witness.process(host.pid) if host.pid is not None else None,
        tool=witness.process(os.getpid()),
        is_live=host.is_live,
        away={} if merge.policy == "keep" else disposal.names_away(planned.chain, base, top),
        before=disposal.looks(planned.chain, others),
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
        merge.witness = witness.mark(replace(merge.witness, phase=phase, seen=seen, verified=merge.verified))


def sync(merge: Merge) -> None:
    """Make durable what was noted, and the names of the files beside the witness. Raises OSError."""
    if merge.witness is not None:
        witness.sync(merge.witness)


def end(merge: Merge) -> None:
    """The outcome is known and nothing remains to be done: the witness goes, and the guard."""
    leave(merge)
    if merge.witness is None:
        return
    try:
        witness.remove(merge.witness)
    except OSError as error:
        merge.notes.append(f"{merge.witness.path} cannot be removed: {error.strerror or error}")
    merge.witness = None


def take_back(merge: Merge) -> None:
    """The old chain was proved to be in use: the active image has its name again, and the witness goes."""
    if merge.witness is not None:
        try:
            disposal.give_back(merge.witness, merge.witness.top)
        except OSError as error:
            merge.notes.append(f"{merge.plan.top.file} could not get its name back: {error.strerror or error}")
            leave(merge)
            return
    end(merge)


def leave(merge: Merge) -> None:
    """Whoever comes next finds the witness; the guard goes."""
    if merge.guard is not None:
        merge.guard.reap()
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
    done, hints = await disposal.finish(told)
    merge.notes += hints
    end(merge)
    return tuple(done)
