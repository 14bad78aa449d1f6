"""What is asked for of one disk: its overlay, made or there already, and whether it can be that."""

import os
import shlex
import uuid
from dataclasses import replace

from qmpmerge.chain import backing
from qmpmerge.chain.chain import ELSEWHERE, Image
from qmpmerge.checks import sight
from qmpmerge.errors import BackingString, Busy, FileExists, NotSeen, Refused, Temporary
from qmpmerge.processes import proc
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.targets import identity
from qmpmerge.targets.target import Target
from qmpmerge.value import Value


class Order(Value):
    """
    One overlay to make, or to use as it is (`is_reused`): on which disk, where, with which backing string in its header.
    """

    disk: Disk
    below: Image
    file: str
    backing: str
    node: str
    is_reused: bool = False


async def of_disk(target: Target, layout: Layout, name: str, file: str, reuse: bool) -> Order:
    """
    The order for a disk. Raises Busy, Temporary, NotSeen, FileExists, BackingString; with `reuse` what `reuse.backing_of` does.
    """
    disk = layout.find(name, target.name)
    assert disk.chain is not None, "find() returns disks with an image only"
    if disk.job is not None:
        raise Busy(disk=disk.name, job=disk.job.id, target=target.name, verbs=disk.job.verbs)
    below = disk.chain.active
    if identity.is_temporary(below):
        raise Temporary(disk=disk.name, file=below.file)
    path = os.path.abspath(file)
    _refuse_unseen(target, disk.name, below, path)
    order = Order(disk, below, path, "", f"qmpmerge-{uuid.uuid4().hex[:8]}", is_reused=reuse)
    if reuse:
        return replace(order, backing=await _reused(target, layout, order))
    if os.path.lexists(path):
        raise FileExists(file=path, option=await _option(target, layout, order))
    return replace(order, backing=_backing(below, path))


async def _reused(target: Target, layout: Layout, order: Order) -> str:
    from qmpmerge.operations import reuse  # only --reuse needs it, and a refusal

    return await reuse.backing_of(layout, order.disk, order.below, order.file, target.pid)


async def _option(target: Target, layout: Layout, order: Order) -> str:
    """The option that takes what has the name already, where there is one."""
    try:
        await _reused(target, layout, order)
    except Refused:
        return ""
    return "--reuse"


def _refuse_unseen(target: Target, disk: str, below: Image, path: str) -> None:
    """The image below must be one that we can name, and the overlay's folder the one that QEMU sees under its name."""
    again = f"snapshot pid:{target.pid} {shlex.quote(f'{disk}={path}')}"
    folder = os.path.dirname(path)
    seen = None if target.pid is None else proc.identity(proc.as_seen_by(target.pid, folder))
    if below.is_elsewhere:
        reason, cure = sight.whereabouts(below, target.pid, again)
        raise NotSeen(unseen=[below.file.removeprefix(ELSEWHERE)], reason=reason, cure=cure)
    why = sight.doubtful(below, is_seen=target.pid is not None and bool(proc.open_files(target.pid)))
    if why is not None:
        raise NotSeen(unseen=[below.file], reason=why[0], cure=why[1])
    if seen is not None and seen != proc.identity(folder):
        cure = sight.inside(target.pid or 0, again)
        raise NotSeen(unseen=[folder], reason="QEMU sees another folder under this name", cure=cure)


def _backing(below: Image, path: str) -> str:
    """The string for the new header; it must lead to the image below from where the overlay will really be."""
    if not below.has_path:
        return below.file
    if below.slice is not None:
        return backing.json_name(below, path)
    folder = os.path.realpath(os.path.dirname(path))
    if folder != os.path.dirname(os.path.realpath(below.file)):
        return below.file
    name = os.path.basename(os.path.realpath(below.file))
    if ":" in name.split("/", 1)[0]:
        name = f"./{name}"  # `a:b` would be read as a protocol
    if not backing.leads_from(folder, name, below):
        raise BackingString(overlay=path, backing=name, reason="it does not lead to the present image")
    return name
