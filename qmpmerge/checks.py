"""
May we? All of it is asked before anything is sent, and every refusal says what to do instead.

Pure checks of sizes and names are made where the plan is made (`plan`); here are those that look at QEMU and at files.
"""

import os
import stat
from collections.abc import Collection

from qmpmerge import dependents, durable, headers
from qmpmerge.blockgraph import Disk
from qmpmerge.chain import Image
from qmpmerge.errors import (
    BackingString,
    Busy,
    CommandError,
    Dependents,
    Disagrees,
    NoSpace,
    NotWritable,
    Replaced,
    Temporary,
)
from qmpmerge.headers import leads_from
from qmpmerge.hosts import ChainView, Host
from qmpmerge.plan import CommitPlan


async def check(
    host: Host, view: ChainView, plan: CommitPlan, *, force: Collection[str] = (), search: Collection[str] = ()
) -> None:
    """
    Refuse what would do harm, but for what `force` names. Changes nothing that anyone could see.

    `search` are more folders in which images may be built on those that go. Raises Busy, Temporary, Replaced, Disagrees,
    NoSpace, Dependents, BackingString, NotWritable, FlushUnavailable.
    """
    disk = view.disk
    if disk.job is not None:
        raise Busy(disk=disk.name, job=disk.job.id, target=host.target)
    _refuse_temporary(disk, plan)
    _refuse_replaced(host.pid, plan)
    _refuse_small_device(plan)
    _refuse_disagreeing(view, plan)
    if "dependents" not in force:
        _refuse_dependents(plan, search)
    if plan.overlay is not None:
        _refuse_lost_name(plan.overlay, plan)
        await durable.check(host.monitor, plan.base)
        await _rewrite_header(host, disk, plan)


def _refuse_temporary(disk: Disk, plan: CommitPlan) -> None:
    """`snapshot=on` drives have an unlinked temporary file of QEMU's on top, ``vl.XXXXXX`` (block.c)."""
    active = plan.chain.active
    if active.has_path and active.inode is None and active.name.startswith("vl."):
        raise Temporary(disk=disk.name, file=active.file)


def _refuse_replaced(pid: int | None, plan: CommitPlan) -> None:
    """
    QEMU opens base and overlay again by name: the name must still lead to the file it has open.

    Not checked where the kernel does not let us see what QEMU has open.
    """
    opened = _open_files(pid) if pid is not None else set()
    if pid is None or not opened:
        return
    for image in (plan.base, *plan.merged, *([plan.overlay] if plan.overlay else [])):
        if image.has_path and _identity(image.file) not in opened:
            raise Replaced(file=image.file, pid=pid)


Identity = tuple[str, int, int]


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


def _refuse_disagreeing(view: ChainView, plan: CommitPlan) -> None:
    touched = {image.file for image in (*plan.merged, *([plan.overlay] if plan.overlay else []))}
    below = dict(zip(plan.chain.files[1:], plan.chain.files, strict=False))
    names = {image.file: image.backing for image in plan.chain}
    for odd in view.oddities:
        if odd.name == "disagrees" and odd.file in touched:
            raise Disagrees(image=odd.file, header=names[odd.file] or "none", graph=below[odd.file])


def _refuse_small_device(plan: CommitPlan) -> None:
    """QEMU grows a file, and fails on a device with nothing better than `Invalid argument`."""
    base, needed = plan.base, plan.top.virtual_size
    if base.has_path and needed > base.virtual_size and _is_device(base.file):
        raise NoSpace(base=base.file, size=base.virtual_size, needed=needed)


def _is_device(path: str) -> bool:
    identity = _identity(path)
    return identity is not None and identity[0] == "device"


def _refuse_dependents(plan: CommitPlan, search: Collection[str]) -> None:
    """The merged images leave the chain, and base, which what is built on them would still look through to, changes."""
    found = dependents.find(plan.merged, plan.chain, search)
    if found:
        images = list(dict.fromkeys(dependent.image for dependent in found))
        raise Dependents(images=images, dependents=[dependent.file for dependent in found])


def _refuse_lost_name(overlay: Image, plan: CommitPlan) -> None:
    """The new string must lead to base's inode from every folder from which the present one leads to top."""
    name, present = plan.backing_name, overlay.backing
    if name is None or not (plan.base.has_path and overlay.has_path):
        return
    known = [folder for folder in headers.folders(overlay) if present and leads_from(folder, present, plan.top)]
    if not all(leads_from(folder, name, plan.base) for folder in known or headers.folders(overlay)):
        raise BackingString(overlay=overlay.file, backing=name, reason="it would not lead to the base from there")


async def _rewrite_header(host: Host, disk: Disk, plan: CommitPlan) -> None:
    """
    Have QEMU rewrite the overlay's header with the string it has already.

    At the end of an intermediate commit QEMU takes the same path, and a failure there crashes it with the guest; here
    the failure is a clean error. The command records the overlay's own format as the
    backing format, so it is sent only where overlay and top have one format.
    """
    overlay = plan.overlay
    assert overlay is not None
    if overlay.format != plan.top.format or overlay.backing is None:
        return
    try:
        await host.monitor.execute(
            "change-backing-file",
            device=disk.root,
            image_node_name=overlay.node,
            backing_file=overlay.backing,
        )
    except CommandError as error:
        raise NotWritable(overlay=overlay.file, reason=error.description) from None
