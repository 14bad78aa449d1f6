"""
Checks of the files, of their filesystems and of the processes that hold them, each an async generator of refusals.
"""

import asyncio
import os
import shlex
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

from qmpmerge.chain.chain import Image
from qmpmerge.chain.other_way import sparing
from qmpmerge.chain.plan import CommitPlan, PullPlan
from qmpmerge.checks import sight
from qmpmerge.checks.question import Question, Seen, Unseen
from qmpmerge.errors import (
    CannotGrow,
    Dependents,
    DeviceTooSmall,
    Doubtful,
    InUse,
    NoSpace,
    NotReopenable,
    NotWritable,
    Refused,
    Replaced,
    SharedBase,
)
from qmpmerge.images import notes, qcow2
from qmpmerge.images.dependents import is_outside, out_of_reach
from qmpmerge.journal import locks
from qmpmerge.processes import permissions, proc
from qmpmerge.processes.openfiles import FDSET
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.targets import identity
from qmpmerge.targets.command import command

if TYPE_CHECKING:
    from qmpmerge.processes.holders import User


UNSEEN = Unseen("what QEMU has open cannot be seen from here")


async def replaced(question: Question) -> AsyncIterator[Refused | Unseen]:
    """
    QEMU opens base and overlay again by name: the name must still lead to the file it has open.

    A merged image whose name is gone is merged all the same: nothing else can save its data. The active image of a
    `snapshot=on` drive never has one, and is refused as that.
    """
    if question.pid is None or not question.opened:
        yield UNSEEN
        return
    needed = {*question.written, *question.plan.named}
    for image in question.touched:
        astray = None if identity.is_temporary(image) else identity.astray(image, question.pid)
        if astray is not None and (astray.there is not None or image in needed):
            refusal = identity.refusal(astray, question.target)
            if isinstance(question.plan, PullPlan) and image is question.plan.base and astray.there is None:
                cure = f"{refusal.cure}; or pull it too (without `--base`): then nothing needs its name any more"
                refusal = Replaced(file=refusal.file, found=refusal.found, cure=cure)
            yield refusal
        elif image in question.written and (lost := _lost_name(question, image, question.pid)) is not None:
            yield lost
    for blind in sight.unseen(question):
        yield blind


async def doubtful(question: Question) -> AsyncIterator[Refused]:
    """Nothing is taken out of an image that a pull has found damaged, nor into it: what is right may lie below it alone."""
    for image in (*question.plan.merged, question.plan.receiver):
        if locks.is_damaged(image):
            yield Doubtful(file=image.file)


def _lost_name(question: Question, image: Image, pid: int) -> NotReopenable | None:
    """Where the name that QEMU has for the image is not the one by which we know it, or is meant from elsewhere."""
    name = question.view.layout.reopened(image)
    seen = "" if name is None or name.startswith(FDSET) else proc.as_seen_by(pid, name)
    if name is None or seen in ("", image.file) or proc.identity(image.file) in proc.written(pid):
        return None
    there = proc.identity(seen)
    if there in question.opened:
        return None
    leads = "nowhere" if there is None else f"to another file, {_place(name, pid)}"
    return NotReopenable(file=image.file, known_as=name, leads=leads)


def led_astray(layout: Layout, image: Image, pid: int | None) -> NotReopenable | None:
    """
    Where the name that QEMU has for the image leads to another file, which QEMU takes when it opens it again to read it; or
    nowhere: of a raw image that fails, and above any other is put what cannot be merged into it while the VM runs.
    """
    name = layout.reopened(image)
    if pid is None or name is None or name.startswith(FDSET):
        return None
    there = proc.identity(proc.as_seen_by(pid, name))
    if there is not None and there in (proc.open_files(pid) or {there}):
        return None
    leads = "nowhere" if there is None else f"to another file, {_place(name, pid)}"
    return NotReopenable(file=image.file, known_as=name, leads=leads)


def _place(name: str, pid: int) -> str:
    return os.path.normpath(os.path.join(proc.cwd(pid) or "", name))


async def in_use(question: Question) -> AsyncIterator[Refused | Unseen]:
    """
    What only the plan may have open. One with ``locking=off`` is seen too. At the offline door who has the images was looked
    for already.

    What the kernel has is looked for also where QEMU cannot be told from others who have its images open.
    """
    from qmpmerge.processes import holders, kernel

    pid = question.pid
    files = [image.file for image in question.plan.exclusive if image.has_path]
    look = await asyncio.to_thread(kernel.look, files)  # as what follows: it takes as long as QEMU over other checks
    users = question.target.users
    if users is None and pid is not None:
        found = await asyncio.to_thread(holders.users, files, excluding=[pid])
        users = await holders.lasting(files, excluding=[pid], found=found)
    elif users is None:
        users = holders.of_kernel(look)
    for refusal in held(files, users):
        yield refusal
    if pid is None:
        yield UNSEEN
    else:
        async for answer in _by_locks([file for file in files if file not in {user.file for user in users}], pid):
            yield answer
    for reason in look.unseen:
        yield Unseen(reason)
    for blind in sight.unseen(question):
        yield blind


def held(files: Sequence[str], users: "Sequence[User]") -> Iterator[InUse]:
    """Each of the files that somebody has."""
    for file in files:
        holding = [user for user in users if user.file == file]
        if holding:
            yield InUse(file=file, holders=[_told(user) for user in holding], command=_instead(holding))


async def _by_locks(files: list[str], pid: int) -> AsyncIterator[InUse | Unseen]:
    """QEMU programs of which we may not see what they have open, even in other containers."""
    from qmpmerge.processes import holders

    locked = await holders.locked_besides(files, pid)
    for file in (file for file in files if locked[file]):
        yield InUse(file=file, holders=["a process that we may not see"], command=holders.UNKNOWN)
    if files and holders.are_hidden():
        yield Unseen("we may not look at all processes, and who has an image open without QEMU's locks does not show")


def _told(user: "User") -> str:
    monitor = user.vm.monitor if user.vm is not None else ""
    return f"{user}, monitor {monitor}" if monitor else str(user)


def _instead(users: "list[User]") -> str:
    if any(user.vm is not None for user in users):
        return "shut that VM down, or give it a copy of the image"
    letting_go = ", ".join(dict.fromkeys(user.instead for user in users))
    return f"{letting_go}; `--force in-use` goes on if it may see the image change"


async def dependents(question: Question) -> AsyncIterator[Refused | Unseen | Seen]:
    """
    The merged images leave the chain, and base, which what is built on them would still look through to, changes.

    Looked for in folders, and among what the QEMUs of this host have open, this one and its other disks included.
    """
    found = question.others.dependents
    if found:
        images = list(dict.fromkeys(dependent.image for dependent in found))
        others = [dependent.file for dependent in found]
        away = [f"`{out_of_reach(file)}`" for file in others if notes.base_of(file) is not None]
        yield Dependents(
            images=images,
            dependents=others,
            away=away,
            pull=_sparing(question),
            below="" if away else _below(question),
        )
    if question.others.folders:
        yield Seen(question.others.told)
    for blind in sight.unseen_dependents(question):
        yield blind
    for image in question.plan.changed:
        if not (image.has_path or image.is_elsewhere):
            yield Unseen(f"what is built on {image.file} cannot be looked for in folders")


async def shared_base(question: Question) -> AsyncIterator[Refused]:
    """What is built on a golden image lies in folders that nobody but the user knows."""
    plan = question.plan
    if not isinstance(plan, CommitPlan):
        return
    base, active = plan.base, plan.chain.active
    if plan.base_is_named or identity.is_temporary(active) or not is_outside(base, active):
        return
    if not (base.has_path and question.others.covers(os.path.dirname(base.file))):
        yield SharedBase(base=base.file, active=active.file, command=_naming(plan), pull=_sparing(question))


def _below(question: Question) -> str:
    """Offline an older image of the chain may have been named as the newest: the merge below the one that really is."""
    plan, found = question.plan, question.others.dependents
    if (
        question.target.is_live
        or not plan.pivots
        or [one.image for one in found] != [plan.top.file]
        or plan.base is None
    ):
        return ""
    base = [] if plan.base_index == 1 else ["--base", plan.base.file]
    return shlex.join(["qmpmerge", "commit", found[0].file, *base, "--top", plan.top.file])


def _sparing(question: Question) -> str:
    return command(question.target, question.view.disk.name, sparing(question.plan))


def _naming(plan: CommitPlan) -> str:
    """How a base is named on the command line, and where to search for others who are built on it."""
    base, active = plan.base.file, plan.chain.active.file
    if not (plan.base.has_path and plan.chain.active.has_path):
        return f"`--base {plan.chain.index(plan.base)}`"
    place, home = os.path.dirname(os.path.realpath(base)), os.path.dirname(os.path.realpath(active))
    common = os.path.commonpath((place, home))
    folders = [common] if common != "/" else [place, home]
    search = " ".join(f"--search {shlex.quote(folder)}" for folder in folders)
    return f"`--base {shlex.quote(base)}`; or have all who may be built on it searched for: `{search}`"


async def no_space(question: Question) -> AsyncIterator[Refused | Unseen]:
    """Where it is not known nothing is refused: a job that runs out of space waits for it."""
    estimate = question.estimate
    if estimate.reason:
        yield Unseen(estimate.reason)
    elif not estimate.is_enough and estimate.growth is not None and estimate.free is not None:
        receiver = question.plan.receiver.file
        yield NoSpace(base=receiver, growth=estimate.growth, free=estimate.free, reserve=estimate.reserve)


async def device_too_small(question: Question) -> AsyncIterator[Refused]:
    """QEMU grows a file, and fails on a device with nothing better than `Invalid argument`; nor does a part of one grow."""
    base, needed = question.plan.receiver, question.plan.views[0][-1].virtual_size
    if base.has_path and base.format == "raw" and needed > base.virtual_size and (_is_device(base.file) or _ends(base)):
        yield DeviceTooSmall(base=base.label, size=base.virtual_size, needed=needed)


async def cannot_grow(question: Question) -> AsyncIterator[Refused]:
    """Of qcow2 only version 3 notes zeros, and whether base has a way to is seen only where it is a file here."""
    plan = question.plan
    if (
        not isinstance(plan, CommitPlan)
        or not plan.shines_through
        or not (plan.base.has_path and plan.base.format == "qcow2")
    ):
        return
    try:
        header = qcow2.read_of(plan.base)
    except OSError:  # which is told by others
        return
    if header is not None and header.version < 3:
        base, cure = plan.base, shlex.join(["qemu-img", "amend", "-f", "qcow2", "-o", "compat=1.1", plan.base.file])
        needed = plan.top.virtual_size
        yield CannotGrow(base=base.file, size=base.virtual_size, needed=needed, pull=_sparing(question), cure=cure)


def _ends(image: Image) -> bool:
    return image.slice is not None and image.slice.size is not None


def _is_device(path: str) -> bool:
    found = proc.identity(path)
    return found is not None and found[0] == "device"


async def not_writable(question: Question) -> AsyncIterator[Refused | Unseen]:
    """Base and overlay, by whom QEMU runs as; QEMU itself is asked last, see `check`, and not in a dry run."""
    for image in question.written:
        if not image.has_path or identity.astray(image, question.pid) is not None:
            continue  # nothing is to be said of another file, or of none
        obstacle = permissions.obstacle(image.file, question.pid)
        if obstacle is not None:
            yield NotWritable(file=image.file, reason=obstacle)
    if question.dry_run and question.rewrites:
        yield Unseen("whether QEMU can rewrite the overlay's header is tried when the merge is made")
