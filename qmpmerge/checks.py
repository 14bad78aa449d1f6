"""
May we? All of it is asked before anything is sent, all that says no is told at once, and every refusal says what to do
instead.

Pure checks of sizes and names are made where the plan is made (`plan`); here are those that look at QEMU and at files,
each an async generator of refusals.
"""

import os
import stat
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpmerge import bitmaps, dependents, durable, headers, knownbad, permissions, qcow2, space
from qmpmerge.bitmaps import Bitmap, Handling
from qmpmerge.chain import Image
from qmpmerge.errors import (
    FORCEABLE,
    BackingString,
    BitmapsStay,
    Busy,
    CommandError,
    Dependents,
    DeviceTooSmall,
    Disagrees,
    FlushUnavailable,
    InUse,
    KnownBad,
    NoFormat,
    NoSpace,
    NotWritable,
    Refused,
    Replaced,
    ShorterLayer,
    Temporary,
    WouldLose,
    refuse,
)
from qmpmerge.headers import leads_from
from qmpmerge.hosts import ChainView, Host
from qmpmerge.outcome import Checked, Ending
from qmpmerge.plan import CommitPlan, is_path
from qmpmerge.space import Estimate

if TYPE_CHECKING:
    from qmpmerge.processes import User

Identity = tuple[str, int, int]
"""Which file or device it is, whatever it is called."""


@dataclass(frozen=True)
class Question:
    """All that a check may want to know. `pid` is QEMU's, None where it is not known; `opened` is what it has open."""

    host: Host
    pid: int | None
    opened: set[Identity]
    view: ChainView
    plan: CommitPlan
    ending: Ending
    handling: Handling
    search: Collection[str]
    estimate: Estimate

    @property
    def written(self) -> list[Image]:
        """The images that QEMU will write to."""
        return [self.plan.base, *([self.plan.overlay] if self.plan.overlay is not None else [])]

    @property
    def touched(self) -> list[Image]:
        """The images that QEMU will write to, or that leave the chain, base first."""
        return [self.plan.base, *self.plan.merged, *self.written[1:]]

    @property
    def bitmaps(self) -> list[Bitmap]:
        """The dirty bitmaps that would be lost; an overlay that the guest keeps keeps its own."""
        return [] if self.ending == "keep" else bitmaps.of(self.view.layout, self.plan.merged)


@dataclass(frozen=True)
class Answer:
    """What was found out: each check, the space, and the bitmaps to be carried over."""

    checks: tuple[Checked, ...]
    estimate: Estimate
    bitmaps: tuple[Bitmap, ...]


async def check(
    host: Host,
    view: ChainView,
    plan: CommitPlan,
    *,
    ending: Ending = "pivot",
    handling: Handling = "refuse",
    force: Collection[str] = (),
    search: Collection[str] = (),
    speed: int = 0,
) -> Answer:
    """
    Refuse what would do harm, but for what `force` names (of `errors.FORCEABLE`). Changes nothing that anyone could see.

    `handling` is of the dirty bitmaps of merged images, `search` are more folders in which images may be built on those of
    the chain, `speed` is for the estimate. Raises one of the refusals of `CHECKS`, or SeveralRefusals with all of them.
    """
    pid, opened = _process(host, plan)
    estimate = await space.estimate(plan, live=host.is_live, pid=pid, speed=speed)
    question = Question(host, pid, opened, view, plan, ending, handling, search, estimate)
    checked: list[Checked] = []
    refusals: list[Refused] = []
    for name, ask in CHECKS.items():
        found = [refusal async for refusal in ask(question)]
        insisting = [refusal for refusal in found if refusal.name not in FORCEABLE or refusal.name not in force]
        refusals += insisting
        checked.append(_checked(name, question, forced=len(insisting) < len(found)))
    refuse(refusals)
    await _rewrite_header(host, view, plan)  # the last, because it writes, if only what is there already
    carried = question.bitmaps if handling == "merge" else []
    return Answer(tuple(checked), estimate, tuple(carried))


def _checked(name: str, question: Question, *, forced: bool) -> Checked:
    unseen = "" if question.opened else "what QEMU has open cannot be seen from here"
    unknown = {"no-space": question.estimate.reason, "in-use": unseen, "replaced": unseen}
    if forced:
        return Checked(name, "forced")
    return Checked(name, "not checked", unknown[name]) if unknown.get(name) else Checked(name, "passed")


# --- what QEMU and the headers say --------------------------------------------------------------------------------


async def _busy(question: Question) -> AsyncIterator[Refused]:
    disk = question.view.disk
    if disk.job is not None:
        yield Busy(disk=disk.name, job=disk.job.id, target=question.host.target)


async def _temporary(question: Question) -> AsyncIterator[Refused]:
    """`snapshot=on` drives have an unlinked temporary file of QEMU's on top, ``vl.XXXXXX`` (block.c)."""
    active = question.plan.chain.active
    if active.has_path and active.inode is None and active.name.startswith("vl."):
        yield Temporary(disk=question.view.disk.name, file=active.file)


async def _shorter_layer(question: Question) -> AsyncIterator[Refused]:
    for refusal in question.plan.refusals:
        if isinstance(refusal, ShorterLayer):
            yield refusal


async def _disagrees(question: Question) -> AsyncIterator[Refused]:
    chain = question.plan.chain
    touched = {image.file for image in question.touched[1:]}
    below = dict(zip(chain.files[1:], chain.files, strict=False))
    names = {image.file: image.backing for image in chain}
    for odd in question.view.oddities:
        if odd.name == "disagrees" and odd.file in touched:
            yield Disagrees(image=odd.file, header=names[odd.file] or "none", graph=below[odd.file])


async def _no_format(question: Question) -> AsyncIterator[Refused]:
    """Only of base: what lies above it are overlays, whose first bytes no guest can write."""
    child = question.plan.merged[0]
    if any(odd.name == "no-format" and odd.file == child.file for odd in question.view.oddities):
        yield NoFormat(image=child.file, backing=child.backing or question.plan.base.file)


async def _backing_string(question: Question) -> AsyncIterator[Refused]:
    """The new string must lead to base's inode from every folder from which the present one leads to top."""
    plan = question.plan
    for refusal in plan.refusals:
        if isinstance(refusal, BackingString):
            yield refusal
    overlay, name = plan.overlay, plan.backing_name
    if overlay is None or name is None or not (plan.base.has_path and overlay.has_path):
        return
    if not _leads(overlay, name, plan):
        yield BackingString(overlay=overlay.file, backing=name, reason="it would not lead to the base from there")


def _leads(overlay: Image, name: str, plan: CommitPlan) -> bool:
    if not is_path(name):  # kept as the base's child has it: a file in a json: name must be the base's
        path = qcow2.named_path(name)
        return path is not None and path.startswith("/") and leads_from("/", path, plan.base)
    present = overlay.backing
    known = [folder for folder in headers.folders(overlay) if present and leads_from(folder, present, plan.top)]
    return all(leads_from(folder, name, plan.base) for folder in known or headers.folders(overlay))


async def _would_lose(question: Question) -> AsyncIterator[Refused]:
    found, layout = question.bitmaps, question.view.layout
    lost = bitmaps.snapshots(layout, question.plan.merged) if question.ending != "keep" else []
    if question.handling == "refuse":
        lost += map(str, found)
    if lost:
        yield WouldLose(lost=lost)
    if question.handling == "merge":
        obstacles = [bitmaps.obstacle(layout, question.plan, bitmap) for bitmap in found]
        if any(obstacles):
            yield BitmapsStay(bitmaps=[obstacle for obstacle in obstacles if obstacle is not None])


def _known_bad(question: Question) -> AsyncIterator[KnownBad]:
    pivots = question.plan.pivots and question.ending != "keep"
    return knownbad.found(question.host.monitor, question.view.disk, question.plan, pivots=pivots)


async def _flush_unavailable(question: Question) -> AsyncIterator[Refused]:
    if question.plan.overlay is None:
        return  # an active commit flushes base by itself
    try:
        await durable.check(question.host.monitor, question.plan.base)
    except FlushUnavailable as refusal:
        yield refusal


# --- what the files and other processes say -----------------------------------------------------------------------


async def _replaced(question: Question) -> AsyncIterator[Refused]:
    """
    QEMU opens base and overlay again by name: the name must still lead to the file it has open.

    Not checked where the kernel does not let us see what QEMU has open. A merged image whose name is gone is merged all
    the same: nothing else can save its data.
    """
    for image in question.touched:
        identity = _identity(image.file) if image.has_path else None
        if question.pid is not None and question.opened and identity is not None and identity not in question.opened:
            yield Replaced(file=image.file, pid=question.pid)


def _process(host: Host, plan: CommitPlan) -> tuple[int | None, set[Identity]]:
    """QEMU's pid and what it has open; what answers on the monitor may be a relay, such as ssh, which is not QEMU."""
    from qmpmerge import processes  # psutil is a third of our start-up time

    opened = _open_files(host.pid) if host.pid is not None else set()
    ours = {_identity(image.file) for image in plan.chain if image.has_path}
    if host.pid is None or not (opened & ours or processes.vm_of(host.pid) is not None):
        return None, set()
    return host.pid, opened


def _open_files(pid: int) -> set[Identity]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return set()
    return {identity for name in names if (identity := _identity(f"{folder}/{name}")) is not None}


def _identity(path: str) -> Identity | None:
    """The inode of a file, the device number of a block device: several device nodes can lead to one device."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(status.st_mode):
        return "device", status.st_rdev, 0
    return "file", status.st_dev, status.st_ino


async def _in_use(question: Question) -> AsyncIterator[Refused]:
    """Of a running VM: at the offline door nobody may hold anything. One with ``locking=off`` is seen too."""
    from qmpmerge import processes

    pid = question.pid
    if pid is None or not question.host.is_live:
        return
    users = processes.users([image.file for image in question.touched if image.has_path])
    for file in dict.fromkeys(user.file for user in users if user.pid != pid):
        holders = [user for user in users if user.file == file and user.pid != pid]
        yield InUse(file=file, holders=[_told(user) for user in holders], command=_instead(holders))


def _told(user: "User") -> str:
    monitor = user.vm.monitor if user.vm is not None else ""
    return f"{user}, monitor {monitor}" if monitor else str(user)


def _instead(users: "list[User]") -> str:
    if any(user.vm is not None for user in users):
        return "shut that VM down, or give it a copy of the image"
    return "end it, or wait until it has let go; `--force in-use` goes on if it may see the image change"


async def _dependents(question: Question) -> AsyncIterator[Refused]:
    """
    The merged images leave the chain, and base, which what is built on them would still look through to, changes.

    Looked for in folders, and among what the QEMUs of this host have open, this one and its other disks included.
    """
    from qmpmerge import processes

    plan = question.plan
    found = dependents.find([plan.base, *plan.merged], plan.chain, question.search, processes.qemu_files())
    if found:
        images = list(dict.fromkeys(dependent.image for dependent in found))
        yield Dependents(images=images, dependents=[dependent.file for dependent in found])


async def _no_space(question: Question) -> AsyncIterator[Refused]:
    estimate = question.estimate
    if not estimate.is_enough and estimate.growth is not None and estimate.free is not None:
        yield NoSpace(base=question.plan.base.file, growth=estimate.growth, free=estimate.free)


async def _device_too_small(question: Question) -> AsyncIterator[Refused]:
    """QEMU grows a file, and fails on a device with nothing better than `Invalid argument`."""
    base, needed = question.plan.base, question.plan.top.virtual_size
    if base.has_path and base.format == "raw" and needed > base.virtual_size and _is_device(base.file):
        yield DeviceTooSmall(base=base.file, size=base.virtual_size, needed=needed)


def _is_device(path: str) -> bool:
    identity = _identity(path)
    return identity is not None and identity[0] == "device"


async def _not_writable(question: Question) -> AsyncIterator[Refused]:
    for image in question.written:
        obstacle = permissions.obstacle(image.file, question.pid) if image.has_path else None
        if obstacle is not None:
            yield NotWritable(file=image.file, reason=obstacle)


async def _rewrite_header(host: Host, view: ChainView, plan: CommitPlan) -> None:
    """
    Have QEMU rewrite the overlay's header with the string it has already.

    At the end of an intermediate commit QEMU takes the same path, and a failure there crashes it with the guest; here
    the failure is a clean error. The command records the overlay's own format as the
    backing format, so it is sent only where overlay and top have one format.
    """
    overlay = plan.overlay
    if overlay is None or overlay.format != plan.top.format or overlay.backing is None:
        return
    try:
        await host.monitor.execute(
            "change-backing-file",
            device=view.disk.root,
            image_node_name=overlay.node,
            backing_file=overlay.backing,
        )
    except CommandError as error:
        raise NotWritable(file=overlay.file, reason=error.description) from None


CHECKS: dict[str, Callable[[Question], AsyncIterator[Refused]]] = {
    "busy": _busy,
    "temporary": _temporary,
    "shorter-layer": _shorter_layer,
    "replaced": _replaced,
    "disagrees": _disagrees,
    "no-format": _no_format,
    "backing-string": _backing_string,
    "in-use": _in_use,
    "dependents": _dependents,
    "no-space": _no_space,
    "device-too-small": _device_too_small,
    "not-writable": _not_writable,
    "would-lose": _would_lose,
    "known-bad": _known_bad,
    "flush-unavailable": _flush_unavailable,
}
"""All of them by their refusals' names, in the order in which they are asked and told."""
