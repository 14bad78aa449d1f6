"""
Checks of the files, of their filesystems and of the processes that hold them, each an async generator of refusals.
"""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from qmpmerge.chain.chain import Image
from qmpmerge.checks.question import Question, Unseen
from qmpmerge.errors import Dependents, DeviceTooSmall, InUse, NoSpace, NotWritable, Refused, Replaced
from qmpmerge.images.dependents import find
from qmpmerge.processes import permissions
from qmpmerge.processes.proc import identity

if TYPE_CHECKING:
    from qmpmerge.processes.holders import User


UNSEEN = Unseen("what QEMU has open cannot be seen from here")


async def replaced(question: Question) -> AsyncIterator[Refused | Unseen]:
    """
    QEMU opens base and overlay again by name: the name must still lead to the file it has open.

    A merged image whose name is gone is merged all the same: nothing else can save its data.
    """
    if question.pid is None or not question.opened:
        yield UNSEEN
        return
    for image in question.touched:
        found = identity(image.file) if image.has_path else None
        if found is not None and found not in question.opened:
            yield Replaced(file=image.file, pid=question.pid)


async def in_use(question: Question) -> AsyncIterator[Refused | Unseen]:
    """
    Of a running VM: at the offline door nobody may hold anything. One with ``locking=off`` is seen too.

    What the kernel has is looked for also where QEMU cannot be told from others who have its images open.
    """
    from qmpmerge.processes import holders, kernel

    pid = question.pid
    if pid is None:
        yield UNSEEN
        return
    files = [image.file for image in question.touched if image.has_path]
    look = kernel.look(files)
    users = holders.of_kernel(look) if question.target.is_live else ()
    if not question.opened:
        yield UNSEEN
    elif question.target.is_live:
        users = (*holders.processes(files, excluding=[pid]), *users)
    for file in files:
        holding = [user for user in users if user.file == file]
        if holding:
            yield InUse(file=file, holders=[_told(user) for user in holding], command=_instead(holding))
    for reason in look.unseen:
        yield Unseen(reason)


def _told(user: "User") -> str:
    monitor = user.vm.monitor if user.vm is not None else ""
    return f"{user}, monitor {monitor}" if monitor else str(user)


def _instead(users: "list[User]") -> str:
    if any(user.vm is not None for user in users):
        return "shut that VM down, or give it a copy of the image"
    letting_go = ", ".join(dict.fromkeys(user.instead for user in users))
    return f"{letting_go}; `--force in-use` goes on if it may see the image change"


async def dependents(question: Question) -> AsyncIterator[Refused]:
    """
    The merged images leave the chain, and base, which what is built on them would still look through to, changes.

    Looked for in folders, and among what the QEMUs of this host have open, this one and its other disks included.
    """
    from qmpmerge.processes import holders

    plan = question.plan
    found = find([plan.base, *plan.merged], plan.chain, question.search, holders.qemu_files())
    if found:
        images = list(dict.fromkeys(dependent.image for dependent in found))
        yield Dependents(images=images, dependents=[dependent.file for dependent in found])


async def no_space(question: Question) -> AsyncIterator[Refused | Unseen]:
    """Where it is not known nothing is refused: a job that runs out of space waits for it."""
    estimate = question.estimate
    if estimate.reason:
        yield Unseen(estimate.reason)
    elif not estimate.is_enough and estimate.growth is not None and estimate.free is not None:
        yield NoSpace(base=question.plan.base.file, growth=estimate.growth, free=estimate.free)


async def device_too_small(question: Question) -> AsyncIterator[Refused]:
    """QEMU grows a file, and fails on a device with nothing better than `Invalid argument`; nor does a part of one grow."""
    base, needed = question.plan.base, question.plan.top.virtual_size
    if base.has_path and base.format == "raw" and needed > base.virtual_size and (_is_device(base.file) or _ends(base)):
        yield DeviceTooSmall(base=base.label, size=base.virtual_size, needed=needed)


def _ends(image: Image) -> bool:
    return image.slice is not None and image.slice.size is not None


def _is_device(path: str) -> bool:
    found = identity(path)
    return found is not None and found[0] == "device"


async def not_writable(question: Question) -> AsyncIterator[Refused | Unseen]:
    """Base and overlay, by whom QEMU runs as; QEMU itself is asked last, see `check`, and not in a dry run."""
    for image in question.written:
        obstacle = permissions.obstacle(image.file, question.pid) if image.has_path else None
        if obstacle is not None:
            yield NotWritable(file=image.file, reason=obstacle)
    if question.dry_run and question.rewrites:
        yield Unseen("whether QEMU can rewrite the overlay's header is tried when the merge is made")
