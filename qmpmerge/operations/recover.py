"""
After a crash: put names and headers right, as far as the evidence goes.

Whoever died at whatever moment, the witness says what was under way and `evidence` which image is right. What is done
about it here can itself be interrupted anywhere and be done again: each step leaves a state that is judged the same way.
"""

import contextlib
import os
from collections.abc import Sequence

from qmpmerge.chain.chain import Image
from qmpmerge.errors import NothingThere
from qmpmerge.images import files, qcow2
from qmpmerge.journal import locks, stash, store
from qmpmerge.journal.record import Witness
from qmpmerge.qemu.monitor import Trace
from qmpmerge.recovery import evidence, put_right
from qmpmerge.recovery.evidence import Use
from qmpmerge.recovery.put_right import Recovery


def verdict_of(found: Sequence[Recovery]) -> str:
    """What all of it came to: a job that is at work needs the user, what was done comes before what was not needed."""
    verdicts = {one.verdict for one in found}
    return next(verdict for verdict in ("running", "planned", "done", "unchanged") if verdict in verdicts)


async def recover(
    path: "str | os.PathLike[str]", *, use: Use | None = None, dry_run: bool = False, trace: Trace | None = None
) -> list[Recovery]:
    """
    Put right every merge that was not finished at `path`: the name that a VM is started from, even if nothing has it any
    more, another image of the chain, or a folder.

    `use` decides where the evidence does not. Raises NothingThere, Undecided, Locked, CannotRecover, and what the live door
    raises where the QEMU that carried the merge out still runs.
    """
    path = os.path.abspath(path)
    found = concerned(path)
    if not found:
        return [_nothing(path)]
    return [await _recovered(told, use, dry_run=dry_run, trace=trace) for told in found]


def concerned(path: str) -> list[Witness]:
    """The witnesses of a folder, or those that tell of the image at `path`; they lie beside the active image."""
    if os.path.isdir(path):
        return store.found(path)
    inode = files.inode(path)
    folders = dict.fromkeys((os.path.dirname(path), *_active_folder(path)))
    return [
        told
        for folder in folders
        for told in store.found(folder)
        if path in (*told.chain.files, *told.away.values()) or (inode is not None and told.concerns({inode}))
    ]


def _active_folder(base: str) -> list[str]:
    """Where the note beside a base says that the active image is: a golden image may lie far from what is built on it."""
    told = locks.noted(Image(base, "raw", 0)) or {}
    with contextlib.suppress(KeyError, IndexError, TypeError):
        return [os.path.dirname(str(told["images"][-1]["file"]))]
    return []


async def _recovered(told: Witness, use: Use | None, *, dry_run: bool, trace: Trace | None) -> Recovery:
    async with put_right.carrier(told, trace) as host:
        with locks.held(told.chain[told.base]) as lock:
            judged = await evidence.judge(told, host, use)
            if dry_run:
                return Recovery(
                    "planned", told.chain.active.file, judged.right, put_right.action_of(judged, told), judged.reasons
                )
            recovery = await put_right.put_right(told, judged, host)
            put_right.clear_note(lock, told, judged)
            return recovery


def _nothing(path: str) -> Recovery:
    """No witness: nothing is suspected without proof, but what is there is told."""
    stashed = f"{path}{stash.STASHED}"
    if os.path.lexists(path):
        return Recovery("unchanged", path, None, "no merge was left unfinished here")
    if not os.path.lexists(stashed):
        raise NothingThere(path=path)
    with contextlib.suppress(OSError):
        header = qcow2.read(stashed)
        if header is not None and header.backing is not None:
            below = f"it is built on {header.backing}, into which or below which it was merged"
            return Recovery("unchanged", path, None, f"{stashed} was stashed by a merge that was finished", (below,))
    return Recovery("unchanged", path, None, f"{stashed} is there, and no merge was left unfinished")
