"""
Which image is right after a merge was left in the middle: what the witness, QEMU's graph, the headers and the contents say.

Nothing is changed here, and nothing guessed: where the evidence does not decide, `Undecided` shows it.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Image
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.errors import CommandError, ImageUnreadable, NoDisk, NoSuchDisk, Undecided
from qmpmerge.images import files, qcow2, qemuimg
from qmpmerge.journal import merged_files, record
from qmpmerge.journal.record import Witness
from qmpmerge.qemu import jobs
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.target import Host

Way = Literal["back", "finish", "repoint", "leave"]
"""
``back``: the old chain is right, names go back and the witness goes. ``finish``: the new chain is right, only the merged
files are left. ``repoint``: the overlay's header names a base that is not complete, so it gets its old name back.
``leave``: a job is at work.
"""
Use = Literal["base", "top"]
"""Which image a user who has looked takes for the right one."""


@dataclass(frozen=True)
class Judgement:
    """What to do, and the sentences that say why. `right` is the image to start the VM from."""

    way: Way
    right: str
    reasons: tuple[str, ...]


async def judge(told: Witness, host: Host | None, use: Use | None = None) -> Judgement:
    """
    Judge one merge. `host` is the QEMU that carried it out, where it still runs.

    Raises Undecided, and what asking the host raises.
    """
    moved = None
    if host is not None:
        job = await jobs.look(
            host.monitor, told.job
        )  # first: a job that is over by now moves nothing after the next look
        moved = has_moved(await host.layout(), told.device, told.plan)
        if moved is False:
            return _judge_old(told, job)
    if told.plan.pivots:
        return await _judge_pivot(told, moved, use)
    return await _judge_header(told, moved, use)


def _back(told: Witness, *reasons: str) -> Judgement:
    return Judgement("back", told.chain.active.file, reasons)


def _finish(told: Witness, *reasons: str) -> Judgement:
    return Judgement("finish", told.plan.result.active.file, reasons)


def _judge_old(told: Witness, job: Job | None) -> Judgement:
    """QEMU shows the chain as it was."""
    if told.phase in ("switched", "proved"):
        raise _undecided(told, "the witness says that the merge was done, QEMU shows the old chain")
    if job is not None and job.status not in ("concluded", "null"):
        return Judgement("leave", told.chain.active.file, (f"job {job.id} is {job.status}",))
    return _back(told, f"QEMU uses {told.chain.active.name} on the old chain")


# --- active: the device may have moved ------------------------------------------------------------------------------


async def _judge_pivot(told: Witness, moved: bool | None, use: Use | None) -> Judgement:
    base, top = told.chain[told.base], told.chain.active
    if moved:
        return _finish(told, f"QEMU uses {base.name}")
    if told.phase in ("switched", "proved"):
        return _finish(told, "the move onto the base was seen and written down")
    if told.phase == "copying":
        return _back(told, "the move onto the base was never asked for")
    if told.top in told.away and told.place(told.top) == top.file:
        return _back(told, f"the move is asked for once {top.name} has lost its name, and it has it still")
    reasons: list[str] = []
    equal = await same(told, reasons)
    if equal:
        return _finish(told, *reasons)
    return _by_times(told, equal, reasons) or _by_user(told, use, reasons)


def _by_times(told: Witness, equal: bool | None, reasons: list[str]) -> Judgement | None:
    """Which of the two was written to since both were equal and nobody wrote; None where that does not decide."""
    changed = {index: _was_changed(told, index) for index in (told.base, told.top)}
    base, top = told.chain[told.base], told.chain.active
    words = {True: "was written to since both were equal", False: "was not", None: "is not known"}
    reasons += [f"{base.name} {words[changed[told.base]]}", f"{top.name} {words[changed[told.top]]}"]
    untouched = changed[told.base] is False and equal is None  # it could not be seen that both are equal still
    if changed[told.top] is False and (changed[told.base] or untouched):
        return _finish(told, *reasons)
    if changed[told.base] is False and changed[told.top]:
        return _back(told, *reasons)
    return None


def _was_changed(told: Witness, index: int) -> bool | None:
    """After a reboot an unchanged time proves nothing: the power may have gone before the last one was on the disk."""
    place = told.place(index)
    if place is None or index not in told.seen:
        return None
    try:
        is_other = record.seen(place) != told.seen[index]
    except OSError:
        return None
    return is_other or (None if told.is_of_an_earlier_boot else False)


def _by_user(told: Witness, use: Use | None, reasons: Sequence[str]) -> Judgement:
    if use is None:
        raise _undecided(told, *reasons)
    said = f"the user says that {use} is right"
    return _finish(told, said) if use == "base" else _back(told, said)


# --- intermediate: the header may have been rewritten ----------------------------------------------------------------


async def _judge_header(told: Witness, moved: bool | None, use: Use | None) -> Judgement:
    overlay = told.plan.overlay
    assert overlay is not None
    points = _points_to(told, overlay)
    if points == "old":
        if moved or told.phase == "proved":
            raise _undecided(told, f"the merge was seen to be done, and the header of {overlay.name} is the old one")
        return _back(told, f"the header of {overlay.name} is the old one")
    if points is None:
        raise _undecided(told, f"the header of {overlay.name} names neither its old backing file nor the new one")
    if told.phase != "copying":
        return _finish(told, f"{told.chain[told.base].name} was durable before the header of {overlay.name} named it")
    reasons = [f"the header of {overlay.name} names {told.chain[told.base].name}, which nobody had made durable"]
    equal = await same(told, reasons)
    if equal or (equal is None and use == "base"):
        return _finish(told, *reasons)
    if moved or (equal is None and use is None):
        raise _undecided(told, *reasons)
    return Judgement("repoint", told.chain.active.file, tuple(reasons))


def _points_to(told: Witness, overlay: Image) -> Literal["base", "old"] | None:
    place = told.place(told.top + 1)
    try:
        header = qcow2.read(place) if place is not None else None
    except OSError:
        header = None
    if header is None or header.backing is None:
        return None
    folder = os.path.dirname(overlay.file)
    if header.backing == told.plan.backing_name or backing.leads_from(folder, header.backing, told.chain[told.base]):
        return "base"
    is_old = header.backing == overlay.backing or backing.leads_from(folder, header.backing, told.plan.top)
    return "old" if is_old else None


# --- what all of it rests on -----------------------------------------------------------------------------------------


def has_moved(layout: Layout, device: str, planned: CommitPlan) -> bool | None:
    """
    Whether QEMU's graph shows the new chain under the disk; None where it shows neither.

    Nodes that the merge has left over look like the old chain, so only what a device, or an export, uses is looked at.
    """
    kept = planned.base if planned.pivots else planned.overlay
    assert kept is not None
    if device:
        with contextlib.suppress(NoSuchDisk, NoDisk):
            chain = layout.find(device, "").chain or ()
            return False if _is_in(planned.top, chain) else True if _is_in(kept, chain) else None
        return None
    used = {node for root in layout.exported for node in layout.subtree(root)}
    return False if planned.top.node in used else True if kept.node in used else None


def _is_in(image: Image, chain: Iterable[Image]) -> bool:
    return any(one.same_as(image) for one in chain)


async def same(told: Witness, reasons: list[str]) -> bool | None:
    """Whether top and base show the same data; None where it cannot be told. The reason is added to `reasons`."""
    base, top = told.chain[told.base], told.plan.top
    images = [placed(told, index) for index in range(1, told.top + 1)]
    known = [image for image in images if image is not None]
    if len(known) < len(images):
        reasons.append("not all images are there to compare")
        return None
    user = next((used for image in known if (used := merged_files.in_use(image.file)) is not None), None)
    if user is not None:
        reasons.append(f"{base.name} and {top.name} cannot be compared: {user}")
        return None
    try:
        equal = await qemuimg.same(known, known[: told.base])
    except (ImageUnreadable, CommandError) as error:
        reasons.append(f"{base.name} and {top.name} cannot be compared: {error}")
        return None
    reasons.append(f"{base.name} and {top.name} show {'the same' if equal else 'different'} data")
    return equal


def placed(told: Witness, index: int) -> Image | None:
    """The image under the name that it has now; one that is no file keeps its name."""
    image, place = told.chain[index], told.place(index)
    if place is not None:
        return replace(image, file=place)
    return image if not image.has_path or (image.inode is None and files.inode(image.file) is None) else None


def _undecided(told: Witness, *reasons: str) -> Undecided:
    base, top = (told.place(index) or told.chain[index].file for index in (told.base, told.top))
    return Undecided(base=base, top=top, evidence=list(reasons), path=told.chain.active.file)
