"""
Which image is right after a merge was left in the middle: what the record, QEMU's graph, the headers and the contents say.

Nothing is changed here, and nothing guessed: where the evidence does not decide, `Undecided` shows it.
"""

import contextlib
import os
import shlex
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Literal

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Image
from qmpmerge.chain.state import State
from qmpmerge.errors import ImageUnreadable, InUse, Undecided
from qmpmerge.images import files, qcow2, qemuimg
from qmpmerge.journal import spared
from qmpmerge.journal.record import Record, look
from qmpmerge.qemu import jobs
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets import identity
from qmpmerge.targets.target import Target
from qmpmerge.value import Value

Way = Literal["back", "finish", "repoint", "leave"]
"""
``back``: the old chain is right, names go back and the record goes. ``finish``: the new chain is right, only the merged
files are left. ``repoint``: the overlay's header names a base that is not complete, so it gets its old name back.
``leave``: a job is at work.
"""
Use = Literal["base", "top"]
"""Which image a user who has looked takes for the right one."""


class Judgement(Value):
    """What to do, and the sentences that say why. `right` is the image to start the VM from."""

    way: Way
    right: str
    reasons: tuple[str, ...]

    @property
    def state(self) -> State:
        """Where the crash has left the operation."""
        return State.SWITCHED if self.way == "finish" else State.COPYING


Decide = Callable[[Record, bool | None, Use | None], Awaitable[Judgement]]
"""
Judges an operation by its record, by what QEMU's graph shows (see `Layout.has_moved`; None also where QEMU is gone), and by
what the user says. Raises Undecided.
"""


async def judge(
    record: Record, target: Target | None, use: Use | None, *, layout: Layout | None, kept: Image, decide: Decide
) -> Judgement:
    """
    Judge one operation. `target` is the QEMU that carried it out, where it still runs; `layout` is what it has shown, where
    that was asked for already. `kept` is the image that the disk shows once it is done, in the place of top; `decide` looks
    at the rest where the graph does not show that it was not done.

    Raises Undecided, NotUnderItsName, and what asking QEMU raises.
    """
    moved = None
    if target is not None:
        seen = next((job for job in layout.jobs if job.id == record.job), None) if layout is not None else None
        if layout is None or seen is None or seen.status == "concluded":
            seen = await jobs.look(target.monitor, record.job)  # first: one that is over by now moves nothing any more
            target.remember(record.chain)
            layout = await target.layout()
        moved = layout.has_moved(record.device, record.plan.top, kept)
        is_at_work = seen is not None and seen.status not in ("concluded", "null")
        if moved is False or (moved is None and is_at_work):  # its device may be gone
            return _judge_old(record, seen)
    judged = await decide(record, moved, use)
    _see_names(record, target, use)
    return judged


async def see_unused(record: Record, judged: Judgement, ours: Target | None) -> None:
    """
    An image that is to lose its name must not be what somebody runs from, whatever the record says; what `ours` has open does
    not count where that is a daemon of our own. Raises InUse.
    """
    from qmpmerge.processes import holders

    place = record.place(record.top) if judged.way == "finish" else None
    ourselves = [ours.pid] if ours is not None and not ours.is_live and ours.pid is not None else []
    users = await holders.lasting([place], excluding=ourselves) if place is not None else ()
    if users and place is not None:
        again = f"qmpmerge recover {shlex.quote(record.chain.active.file)}"
        command = f"by the record of an earlier merge nobody should: shut down who runs from it, then `{again}`"
        raise InUse(file=place, holders=list(map(str, users)), command=command)


def _see_names(record: Record, target: Target | None, use: Use | None) -> None:
    """
    What stays must be under its name, or be taken for right by a user who has looked. Raises NotUnderItsName where QEMU
    still has it open, Undecided.
    """
    for image in record.plan.named:
        if image.inode is None or record.place(record.chain.index(image)) is not None:
            continue
        astray = identity.astray(image, target.pid) if target is not None else None
        if target is not None and astray is not None:
            raise identity.unproven(astray, target, record.plan)
        if target is None and (use is None or files.inode(image.file) is None):
            reason = f"what lies at {image.file}, if anything, is not the file that was merged into"
            raise _undecided(record, reason, choices=_there(record) if files.inode(image.file) is not None else ())


def _back(record: Record, *reasons: str) -> Judgement:
    return Judgement("back", record.chain.active.file, reasons)


def _finish(record: Record, *reasons: str) -> Judgement:
    return Judgement("finish", record.plan.result.active.file, reasons)


def _judge_old(record: Record, job: Job | None) -> Judgement:
    """QEMU shows the chain as it was."""
    if record.state in (State.SWITCHED, State.PROVED):
        raise _undecided(record, "the record says that the merge was done, QEMU shows the old chain")
    if job is not None and job.status not in ("concluded", "null"):
        return Judgement("leave", record.chain.active.file, (f"job {job.id} is {job.status}",))
    return _back(record, f"QEMU uses {record.chain.active.name} on the old chain")


# --- active: the device may have moved ------------------------------------------------------------------------------


async def by_contents(record: Record, moved: bool | None, use: Use | None) -> Judgement:
    """`Decide` for an active merge, which writes to no header: whether the move was seen, else names, contents and times."""
    base, top = record.chain[record.base], record.chain.active
    if moved:
        return _finish(record, f"QEMU uses {base.name}")
    if record.state in (State.SWITCHED, State.PROVED):
        seen, doubt = "the move onto the base was seen and written down", _brought_back(record)
        return _finish(record, seen) if doubt is None else _by_user(record, use, [seen, doubt])
    if record.has_old_chain:
        return _back(record, "the move onto the base was never asked for")
    if record.state is State.COPYING:
        return await _left_ready(record, use)
    if record.top in record.away and record.place(record.top) == record.own_name(record.top):
        return _back(record, f"the move is asked for once {top.name} has lost its name, and it has it still")
    reasons: list[str] = []
    equal = await same(record, reasons)
    if equal:
        return _finish(record, *reasons)
    return _by_times(record, equal, reasons) or _by_user(record, use, reasons)


async def _left_ready(record: Record, use: Use | None) -> Judgement:
    """
    The guest may have been moved by anybody, and have written to base alone since. Until then it writes to both, so neither
    times nor differences tell which is older; where there are none, nothing is lost with either.
    """
    base, top = record.chain[record.base].name, record.chain.active.name
    reasons = [f"the job was left ready: who had the monitor could move the guest onto {base}, and nobody saw whether"]
    if await same(record, reasons):
        return _back(record, *reasons)
    reasons += [
        f"{name} was last written to at {_last_written(record, index)}"
        for index, name in ((record.base, base), (record.top, top))
    ]
    return _by_user(record, use, reasons)


def _last_written(record: Record, index: int) -> str:
    place = record.place(index)
    with contextlib.suppress(OSError):
        seconds = look(record.chain[index], place or "").changed // 10**9
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    return "a time that is not known"


def _brought_back(record: Record) -> str | None:
    """
    How somebody has used the old image since, or has put one where the VM was started from after that name was taken away for
    the move; None where nobody has. After a power cut the old name can be there again by itself, with the image as it was.
    """
    own, top = record.own_name(record.top), record.chain[record.top]
    if record.top not in record.away:
        return f"{top.name} was written to since" if _was_changed(record, record.top) else None
    if files.inode(own) is None:
        return None
    if record.place(record.top) != own:
        return f"another file is called {own} since"
    if record.is_of_an_earlier_boot and not _was_changed(record, record.top):
        return None
    return f"{top.name} was given its name back since"


def _by_times(record: Record, equal: bool | None, reasons: list[str]) -> Judgement | None:
    """Which of the two was written to since both were equal and nobody wrote; None where that does not decide."""
    changed = {index: _was_changed(record, index) for index in (record.base, record.top)}
    base, top = record.chain[record.base], record.chain.active
    words = {True: "was written to since both were equal", False: "was not", None: "is not known"}
    reasons += [f"{base.name} {words[changed[record.base]]}", f"{top.name} {words[changed[record.top]]}"]
    untouched = changed[record.base] is False and equal is None  # it could not be seen that both are equal still
    if changed[record.top] is False and (changed[record.base] or untouched):
        return _finish(record, *reasons)
    if changed[record.base] is False and changed[record.top]:
        return _back(record, *reasons)
    return None


def _was_changed(record: Record, index: int) -> bool | None:
    """After a reboot an unchanged time proves nothing: the power may have gone before the last one was on the disk."""
    place = record.place(index)
    if place is None or index not in record.seen:
        return None
    try:
        is_other = look(record.chain[index], place) != record.seen[index]
    except OSError:
        return None
    return is_other or (None if record.is_of_an_earlier_boot else False)


def _by_user(record: Record, use: Use | None, reasons: Sequence[str]) -> Judgement:
    if use is None:
        raise _undecided(record, *reasons, choices=_there(record))
    said = f"the user says that {use} is right"
    return _finish(record, said) if use == "base" else _back(record, said)


# --- intermediate: the header may have been rewritten ----------------------------------------------------------------


async def by_header(record: Record, moved: bool | None, use: Use | None) -> Judgement:
    """`Decide` where a header is rewritten: what the overlay's names, and whether what that shows was complete by then."""
    plan, overlay = record.plan, record.plan.overlay
    assert overlay is not None
    points, named = _points_to(record, overlay, use), plan.base.name if plan.base is not None else "no backing file"
    if points == "old":
        if moved and plan.direction == "pull":  # the header could not be written: see `Pull.relink`
            return _finish(record, f"QEMU uses {overlay.name} on {named}, the header is the old one")
        if moved or record.state is State.PROVED:
            raise _undecided(record, f"the merge was seen to be done, and the header of {overlay.name} is the old one")
        return _back(record, f"the header of {overlay.name} is the old one")
    if points is None:
        raise _undecided(record, f"the header of {overlay.name} names neither its old backing file nor the new one")
    if record.state is not State.COPYING:
        return _finish(record, f"{plan.receiver.name} was durable before the header of {overlay.name} named {named}")
    reasons = [f"the header of {overlay.name} names {named}, and nobody had made {plan.receiver.name} durable"]
    equal = await same(record, reasons)
    if equal or (equal is None and use == "base"):
        return _finish(record, *reasons)
    if moved or (equal is None and use is None):
        raise _undecided(record, *reasons, choices=() if moved else _there(record))
    return Judgement("repoint", record.chain.active.file, tuple(reasons))


def _points_to(record: Record, overlay: Image, use: Use | None) -> Literal["base", "old"] | None:
    place = record.place(record.top + 1) or (overlay.file if use is not None else None)
    try:
        header = qcow2.read_of(replace(overlay, file=place)) if place is not None else None
    except OSError:
        header = None
    if header is None or (header.backing is None and record.base):
        return None
    folder, base = os.path.dirname(overlay.file), record.plan.base
    if header.backing == record.plan.backing_name or not header.backing:
        return "base"
    if base is not None and backing.leads_from(folder, header.backing, base):
        return "base"
    is_old = header.backing == overlay.backing or backing.leads_from(folder, header.backing, record.plan.top)
    return "old" if is_old else None


# --- what all of it rests on -----------------------------------------------------------------------------------------


async def same(record: Record, reasons: list[str]) -> bool | None:
    """Whether the plan's two views show the same data; None where that cannot be seen. The reason is added to `reasons`."""
    upto, without = ([placed(record, record.chain.index(image)) for image in view] for view in record.plan.views)
    images = [image for image in upto if image is not None]
    others = [image for image in without if image is not None]
    if len(images) < len(upto) or len(others) < len(without):
        reasons.append("not all images are there to compare")
        return None
    equal = await compared(images, others)
    base, top = record.plan.receiver.name, record.plan.top.name
    told = f"{base} and {top}" if record.plan.direction == "commit" else f"{base} with {top} and without"
    if isinstance(equal, str):
        reasons.append(f"{told} cannot be compared: {equal}")
        return None
    reasons.append(f"{told} show {'the same' if equal else 'different'} data")
    return equal


async def compared(images: Sequence[Image], others: Sequence[Image]) -> bool | str:
    """Whether these images and those others, base first, show the same data; else why that cannot be seen."""
    user = next((used for image in images if (used := spared.in_use(image.file)) is not None), None)
    if user is not None:
        return user
    try:
        return await qemuimg.same(images, others)
    except ImageUnreadable as error:
        return str(error)


def placed(record: Record, index: int) -> Image | None:
    """The image under the name that it has now; one that is no file keeps its name."""
    image, place = record.chain[index], record.place(index)
    if place is not None:
        return replace(image, file=place)
    return image if not image.has_path or (image.inode is None and files.inode(image.file) is None) else None


def _there(record: Record) -> list[Use]:
    """Which of the two a user can choose: those that are there, as long as there is what the merge has written to."""
    if any(image.inode is not None and files.inode(image.file) is None for image in record.plan.written):
        return []
    own = files.inode(record.own_name(record.top))
    is_taken = own is not None and record.place(record.top) != record.own_name(record.top)
    return ["base"] if placed(record, record.top) is None or is_taken else ["base", "top"]


def _undecided(record: Record, *reasons: str, choices: Sequence[Use] = ()) -> Undecided:
    indexes = record.chain.index(record.plan.receiver), record.top
    base, top = (record.place(index) or record.chain[index].file for index in indexes)
    path = record.chain.active.file
    return Undecided(base=base, top=top, evidence=list(reasons), path=path, choices=list(choices))
