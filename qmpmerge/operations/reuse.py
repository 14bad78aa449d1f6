"""
Overlays that somebody has made before the snapshot, with a header of their own or on a block device: whether each is one, and
shows nothing but what it is put on.

Such a file is somebody's: nothing of it is written here, and it stays whatever happens.
"""

import errno
import shlex
from collections.abc import Iterator

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.errors import ImageUnreadable, InUse, NotAnOverlay, NotWritable, OverlayNotEmpty
from qmpmerge.images import dependents, qcow2, qemuimg
from qmpmerge.images.files import is_device
from qmpmerge.images.qcow2 import Qcow2Header
from qmpmerge.processes import permissions
from qmpmerge.qemu.blockgraph import Disk, Layout

DAMAGED = "it was not closed as it should have been, or is damaged (`qemu-img check` tells)"


async def backing_of(layout: Layout, disk: Disk, below: Image, path: str, pid: int | None) -> str:
    """
    The backing string in the header of the overlay at `path`, which can be put on `below`, the active image of `disk`.

    Raises NotAnOverlay, OverlayNotEmpty, InUse, NotWritable, and what `qemuimg.held` raises.
    """
    member = next((image for one in layout.disks for image in one.chain or () if image.is_file(path)), None)
    if member is not None:
        raise _refusal(disk, below, path, "QEMU has it in a chain already")
    header = _header(disk, below, path)
    for reason in _reasons(header, below, path):
        raise _refusal(disk, below, path, reason)
    await _see_alone(disk, below, path)
    await see_empty(disk.name, path)
    if not await qemuimg.is_sound(Image(path, "qcow2", header.virtual_size)):
        raise _refusal(disk, below, path, DAMAGED)
    obstacle = permissions.obstacle(path, pid)
    if obstacle is not None:
        raise NotWritable(file=path, reason=obstacle)
    assert header.backing is not None, "else there was a reason"
    return header.backing


def _header(disk: Disk, below: Image, path: str) -> Qcow2Header:
    try:
        header = qcow2.read(path)
    except OSError as error:
        is_there = error.errno != errno.ENOENT
        raise _refusal(disk, below, path, error.strerror or str(error), is_free=not is_there) from None
    if header is None:
        raise _refusal(disk, below, path, "it has no qcow2 header", is_free=is_device(path))
    return header


def _refusal(disk: Disk, below: Image, path: str, reason: str, *, is_free: bool = False) -> NotAnOverlay:
    """With the command that makes one: there, where that overwrites nothing but what may be on a device."""
    there = path if is_free else f"{path}.new"
    name = below.file if below.slice is None else backing.json_name(below, path)
    words = ["qemu-img", "create", "-f", "qcow2", "-u", "-b", name, "-F", below.format, there, str(below.virtual_size)]
    return NotAnOverlay(file=path, disk=disk.name, reason=reason, command=shlex.join(words))


def _reasons(header: Qcow2Header, below: Image, path: str) -> Iterator[str]:
    """What keeps an image from being an overlay of this one."""
    if header.backing is None:
        yield "its header names no backing file"
    elif not _leads(header.backing, below, path):
        yield f"its header names {header.backing}, and not {below.label}, as its backing file"
    if header.backing_format != below.format:
        yield f"its header records {header.backing_format or 'no format'} for its backing file, which is {below.format}"
    if header.virtual_size < below.virtual_size:
        yield f"it has {header.virtual_size} bytes and the disk {below.virtual_size}: the guest would lose the rest"
    if header.data_file is not None:
        yield f"its data is in another file, {header.data_file}"
    if header.encrypted:
        yield "it is encrypted, and a running QEMU is given no passphrase here"
    if header.snapshots:
        yield "it has internal snapshots"
    if header.dirty or header.corrupt:
        yield DAMAGED


def _leads(name: str, below: Image, path: str) -> bool:
    """Whether the next start gets to the image, by which of its names ever the overlay is opened."""
    overlay = Image(path, "qcow2", 0)
    if below.has_path and below.slice is None and backing.is_path(name):
        return all(backing.leads_from(place, name, below) for place in backing.folders(overlay))
    return backing.leads_to(overlay, name, below) is True


async def _see_alone(disk: Disk, below: Image, path: str) -> None:
    """Nobody has it open, and nothing is built on it. Raises InUse, NotAnOverlay."""
    from qmpmerge.processes import holders

    users = await holders.lasting([path])
    names = [str(user) for user in users] or (["a process that we may not see"] if holders.is_locked(path) else [])
    if names:
        command = "wait until it is closed, or name another overlay" if users else holders.UNKNOWN
        raise InUse(file=path, holders=names, command=command)
    image = dependents.image_at(path)
    look = await dependents.look([image], Chain((image,)), opened=holders.qemu_files())
    for above in look.dependents:
        raise _refusal(disk, below, path, f"{above.file} is built on it, and would show what the guest writes")


async def see_empty(disk: str, path: str) -> None:
    """
    The overlay shows what it is built on: what it has of its own would be there in the place of what the guest has written.

    Raises OverlayNotEmpty, ImageUnreadable.
    """
    try:
        held = await qemuimg.held_by(path)
    except OSError as error:
        raise ImageUnreadable(file=path, reason=error.strerror or str(error)) from None
    if held:
        raise OverlayNotEmpty(file=path, disk=disk, held=sum(extent.length for extent in held))
