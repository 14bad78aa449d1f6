"""
After a crash: put names and headers right, as far as the evidence goes.

Whoever died at whatever moment, the witness says what was under way and `evidence` which image is right. What is done
about it here can itself be interrupted anywhere and be done again: each step leaves a state that is judged the same way.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from qmpmerge import disposal, durable, evidence, files, jobs, locks, qcow2, qemuimg, witness
from qmpmerge.blockgraph import Layout
from qmpmerge.chain import Chain, Image
from qmpmerge.errors import (
    CannotRecover,
    CommandError,
    FlushUnavailable,
    ImageUnreadable,
    NotDurable,
    NothingThere,
    Undecided,
    Unfinished,
    Unreachable,
)
from qmpmerge.evidence import Judgement, Use
from qmpmerge.hosts import Host
from qmpmerge.locks import Lock
from qmpmerge.monitor import Trace
from qmpmerge.outcome import MergedFile, Outcome, files_advice, launch_advice
from qmpmerge.witness import Witness


@dataclass(frozen=True)
class Recovery:
    """
    What became of one merge that was not finished, or of none.

    `verdict` is ``done``, ``planned`` (a dry run), ``running`` (a job is at work), or ``unchanged``. `right` is the image to
    start the VM from, `reasons` why, `merged` what was done with the merged files, where the merge was finished.
    """

    verdict: str
    image: str
    right: str | None
    action: str
    reasons: tuple[str, ...] = ()
    merged: tuple[MergedFile, ...] = ()
    hints: tuple[str, ...] = ()


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
        return witness.found(path)
    inode = files.inode(path)
    folders = dict.fromkeys((os.path.dirname(path), *_active_folder(path)))
    return [
        told
        for folder in folders
        for told in witness.found(folder)
        if path in (*told.chain.files, *told.away.values()) or (inode is not None and told.concerns({inode}))
    ]


def _active_folder(base: str) -> list[str]:
    """Where the note beside a base says that the active image is: a golden image may lie far from what is built on it."""
    told = locks.noted(Image(base, "raw", 0)) or {}
    with contextlib.suppress(KeyError, IndexError, TypeError):
        return [os.path.dirname(str(told["images"][-1]["file"]))]
    return []


async def _recovered(told: Witness, use: Use | None, *, dry_run: bool, trace: Trace | None) -> Recovery:
    async with _carrier(told, trace) as host:
        with locks.held(told.chain[told.base]) as lock:
            judged = await evidence.judge(told, host, use)
            if dry_run:
                return Recovery("planned", told.chain.active.file, judged.right, _words(judged, told), judged.reasons)
            recovery = await _put_right(told, judged, host)
            _clear(lock, told, judged)
            return recovery


@contextlib.asynccontextmanager
async def _carrier(told: Witness, trace: Trace | None) -> AsyncIterator[Host | None]:
    """A session with the QEMU that carried the merge out; None where it is gone, as a private daemon always is."""
    if not told.is_live or (told.qemu is not None and not told.qemu.is_alive):
        yield None
        return
    from qmpmerge.doors.live import live  # only here a door is needed

    async with contextlib.AsyncExitStack() as stack:
        try:
            host: Host | None = await stack.enter_async_context(
                live(told.target, force=frozenset({"libvirt"}), trace=trace)
            )
        except Unreachable:
            if told.qemu is not None:
                raise
            host = None
        yield host


async def _put_right(told: Witness, judged: Judgement, host: Host | None) -> Recovery:
    image = told.chain.active.file
    merged: list[MergedFile] = []
    hints: list[str] = []
    try:
        if judged.way == "leave":
            hints.append(f"`qmpmerge job {told.target} {told.job} follow` goes on with it")
        elif judged.way == "finish":
            merged, hints = await finish(told, host)
            hints = [*_advice(told, merged), *hints]
        else:
            await undo(told, judged)
    except OSError as error:
        raise CannotRecover(file=error.filename or image, reason=error.strerror or str(error)) from None
    verdict = "running" if judged.way == "leave" else "done"
    return Recovery(verdict, image, judged.right, _words(judged, told), judged.reasons, tuple(merged), tuple(hints))


def _clear(lock: Lock, told: Witness, judged: Judgement) -> None:
    """The note about this merge goes too, but not where it says that what the base shows must be compared."""
    known = locks.noted(told.chain[told.base]) or {}
    if judged.way != "leave" and not known.get("suspect"):
        lock.clear()


def _advice(told: Witness, merged: list[MergedFile]) -> list[str]:
    launch = launch_advice(told.plan.base.file, merged[-1]) if told.plan.pivots else []
    return [*launch, *files_advice(merged)]


def _words(judged: Judgement, told: Witness) -> str:
    """For what was done, and for what would be."""
    return {
        "back": "the merge did not happen, the old chain keeps its names",
        "finish": "the merge had happened, what was left over is its files",
        "repoint": f"{told.chain[min(told.top + 1, len(told.chain))].name} goes back to its old backing file",
        "leave": "a job is at work",
    }[judged.way]


async def finish(told: Witness, host: Host | None) -> tuple[list[MergedFile], list[str]]:
    """The new chain is right: make it durable, then deal with the merged files. Raises OSError, CannotRecover."""
    await _make_durable(told, host)
    if host is not None:
        with contextlib.suppress(CommandError):
            await jobs.dismiss(host.monitor, told.job)
        await host.close(_left_open(told, await host.layout()))
    told = witness.mark(replace(told, phase="proved"))
    witness.sync(told)
    merged, hints = await disposal.finish(told)
    witness.remove(told)
    return merged, hints


def _left_open(told: Witness, layout: Layout) -> list[str]:
    """The nodes of the merged images, where they still are those and no others of the same name."""
    top, base = told.plan.top, told.chain[told.base]
    nodes = layout.between(top.node or "", base.node or "")
    files_there = {os.path.basename(str(layout.nodes[node].info.get("file"))) for node in nodes}
    return nodes if top.name in files_there else []


async def _make_durable(told: Witness, host: Host | None) -> None:
    overlay = told.plan.overlay
    for image in (told.chain[told.base], *([overlay] if overlay is not None else [])):
        try:
            if host is not None and overlay is not None:
                await durable.flush(host.monitor, image)
            elif host is None and files.is_regular(image.file):
                files.sync(image.file)
        except (NotDurable, FlushUnavailable) as error:
            raise CannotRecover(file=image.file, reason=error.reason) from None


async def undo(told: Witness, judged: Judgement) -> None:
    """The old chain is right: give it its names, and where need be its header, back. Raises OSError, CannotRecover."""
    for index in range(told.base + 1, told.top + 1):
        if told.place(index) is None and told.chain[index].inode is not None:
            raise CannotRecover(file=told.chain[index].file, reason="it is neither there nor under its stashed name")
        disposal.give_back(told, index)
    overlay = told.plan.overlay
    if judged.way == "repoint" and overlay is not None and overlay.backing is not None:
        try:
            await qemuimg.repoint(overlay.file, overlay.backing, told.plan.top.format)
        except ImageUnreadable as error:
            raise CannotRecover(file=overlay.file, reason=error.reason) from None
        files.sync(overlay.file)
    witness.remove(told)


def _nothing(path: str) -> Recovery:
    """No witness: nothing is suspected without proof, but what is there is told."""
    stashed = f"{path}{witness.STASHED}"
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


# --- on the way to a merge -------------------------------------------------------------------------------------------


async def settle(host: Host, chain: Chain) -> Outcome | None:
    """
    Before a merge: put right what an earlier one of the chain left, where that is beyond doubt.

    Returns its outcome where it had happened, None where there was nothing or it had not. Raises Unfinished.
    """
    outcome = None
    for told in witness.about(chain):
        if told.is_abandoned:
            outcome = await _settled(told, host) or outcome
    return outcome


async def resume(image: str, *, trace: Trace | None = None) -> Outcome | None:
    """The same for an image whose name is gone, or whose chain cannot be opened as it is."""
    told = witness.beside(image)
    if told is None:
        return None
    async with _carrier(told, trace) as host:
        return await _settled(told, host)


async def _settled(told: Witness, host: Host | None) -> Outcome | None:
    carrier = host if host is not None and _is_carrier(told, host) else None
    try:
        with locks.held(told.chain[told.base]) as lock:
            judged = await evidence.judge(told, carrier)
            if judged.way == "repoint" or (judged.way != "leave" and carrier is None and _runs(told)):
                raise _unfinished(told, judged.reasons)
            recovery = await _put_right(told, judged, carrier)
            _clear(lock, told, judged)
    except Undecided as error:
        raise _unfinished(told, error.evidence) from None
    if judged.way != "finish":
        return None
    verdict = "pivoted" if told.plan.pivots else "merged"
    hints = ("an earlier run had merged them; what remained was done now", *recovery.hints)
    after = Chain(tuple(map(_now, told.plan.result)))
    return Outcome(verdict, told.disk, told.chain, after, told.job, recovery.merged, hints=hints)


def _now(image: Image) -> Image:
    return replace(image, inode=files.inode(image.file))


def _is_carrier(told: Witness, host: Host) -> bool:
    return host.is_live and told.is_live and (told.qemu is None or told.qemu == witness.process(host.pid or 0))


def _runs(told: Witness) -> bool:
    """Whether the QEMU that carried it out runs, though we have no session with it."""
    return told.is_live and told.qemu is not None and told.qemu.is_alive


def _unfinished(told: Witness, reasons: "tuple[str, ...] | list[str]") -> Unfinished:
    image = told.chain.active.file
    return Unfinished(image=image, found="; ".join(reasons), path=image)
