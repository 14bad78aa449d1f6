"""
One overlay of a snapshot: its file, the note about it and its node, each made, and taken away again where what follows fails;
a file that was there before stays.
"""

import contextlib
import errno
import os
import shlex
from collections.abc import AsyncIterator, Iterator

from qmpmerge import folder
from qmpmerge.chain import backing
from qmpmerge.chain.chain import Image
from qmpmerge.checks import sight
from qmpmerge.errors import (
    CannotCreate,
    FileExists,
    NotProven,
    NotSeen,
    QemuRefused,
    Untouched,
    unproven,
)
from qmpmerge.folder import File, Folder
from qmpmerge.images import dependents, files, notes, qcow2, qemuimg
from qmpmerge.operations.orders import Order
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.targets import identity
from qmpmerge.targets.target import Target


def see_creatable(order: Order) -> None:
    """Most of what `made` needs, without making it. Raises CannotCreate."""
    place = os.path.dirname(order.file)
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        number = errno.EACCES if os.path.isdir(place) else errno.ENOENT
        raise CannotCreate(file=order.file, reason=os.strerror(number))


@contextlib.asynccontextmanager
async def made(order: Order) -> AsyncIterator[File]:
    """The overlay's file, made with the owner and mode of the image below; removed again when the block fails."""
    file = _make_empty(order)
    try:
        await qemuimg.create_overlay(
            file, size=order.below.virtual_size, backing=order.backing, backing_format=order.below.format
        )
        _make_durable(file, file.place)
        yield file
    except Untouched:
        with contextlib.suppress(OSError):
            file.remove()
        raise


@contextlib.asynccontextmanager
async def found(order: Order) -> AsyncIterator[File]:
    """The file of an overlay that is there already, and stays however the block ends. Raises CannotCreate."""
    try:
        file, (place, _name) = folder.reading(order.file), folder.split(os.path.realpath(order.file))
    except OSError as error:
        raise CannotCreate(file=order.file, reason=error.strerror or str(error)) from None
    with file, place:
        _make_durable(file, place)
        yield file


def _make_durable(made: File, place: Folder) -> None:
    """What the guest flushes to it is worth nothing if a power cut takes its name."""
    try:
        made.sync()
        place.sync()
    except OSError as error:
        raise CannotCreate(file=made.path, reason=error.strerror or str(error)) from None


async def rival(target: Target, order: Order) -> str:
    """
    Of a running VM a warning where another image, that is not empty, is built on the one that it writes to; else empty.

    Nothing is refused for it: that image is ruined by every write until the overlay is there, and by none after it.
    """
    assert order.disk.chain is not None
    if not target.is_live:
        return ""
    look = await dependents.look([order.below], order.disk.chain)
    rivals = [one.file for one in look.dependents if notes.base_of(one.file) is None and not _is_empty(one.file)]
    doctor = f"`qmpmerge doctor {shlex.quote(target.name)}` tells more"
    return f"{', '.join(rivals)} is built on {order.below.file} too, to which the VM wrote: {doctor}" if rivals else ""


def _is_empty(file: str) -> bool:
    try:
        return qcow2.is_empty(file)
    except OSError:
        return False


@contextlib.contextmanager
def noted(order: Order, made: File) -> Iterator[str]:
    """
    A note beside an image in another folder where its overlay is, for who starts the VM; taken away again when the block
    fails. Killed in between, the overlay is empty, and a start from it shows what the image below does.

    Yields why there is no note; empty where there is one, or none is needed.
    """
    if files.is_device(order.below.file):
        yield (
            f"no note is kept beside a device, so `qmpmerge active {shlex.quote(order.below.file)}` is refused: launch scripts "
            f"name the overlay, or its folder"
        )
        return
    try:
        if order.below.has_path and notes.is_needed(order.below.file, order.file):
            notes.put_on(order.below.file, order.below.inode, order.file)
    except OSError as error:
        yield (
            f"it could not be noted beside {order.below.file} that {order.file} was put on it ({error.strerror or error}): "
            f"`qmpmerge active` finds that only from {order.file}"
        )
        return
    try:
        yield ""
    except Untouched:
        with contextlib.suppress(OSError):
            notes.take_away(order.below.file, [made.inode[1]])
        raise


def _make_empty(order: Order) -> File:
    try:
        place, name = folder.split(order.file)
        made = place.create(name)
    except FileExistsError:
        raise FileExists(file=order.file) from None
    except OSError as error:
        raise CannotCreate(file=order.file, reason=error.strerror or str(error)) from None
    with contextlib.suppress(OSError):  # a base on the network, or in a place that we may not see
        model = os.stat(order.below.file)
        made.allow((model.st_mode & 0o777) | 0o600)
        made.belong(model)
    with contextlib.suppress(OSError):
        notes.forget(order.file)
    return made


@contextlib.asynccontextmanager
async def opened(target: Target, layout: Layout, order: Order, file: File) -> AsyncIterator[None]:
    """
    The overlay as a node, with the cache settings of the image below; closed again when the block fails. QEMU opens it by its
    name, and the guest must not write to another file: Replaced.
    """
    _see(file)
    told = layout.nodes[order.below.node or ""].info
    cache = {key: bool(told.get("cache", {}).get(key, False)) for key in ("direct", "no-flush")}
    try:
        await target.monitor.execute(
            "blockdev-add",
            driver="qcow2",
            node_name=order.node,
            backing=None,
            cache=cache,
            discard="unmap",
            detect_zeroes=told.get("detect_zeroes", "off"),
            file={**backing.storage(order.file), "cache": cache, "discard": "unmap"},
        )
        _see(file)
        _see_opened(target, order, file)
        yield
    except Untouched:
        await _close(target, order)
        raise


def _see_opened(target: Target, order: Order, file: File) -> None:
    """
    That it is this very file which QEMU has open. Raises Replaced; NotSeen where it has another under the name, as in a
    container, and that cannot be seen: what we have made is not there, what somebody else has can be anything.
    """
    image = Image(file.path, "qcow2", 0, inode=file.inode)
    is_open = identity.is_open(image, target.pid)
    if is_open is False:
        raise identity.swapped(file.path)
    doubt = sight.doubtful(image, is_seen=bool(is_open)) if order.is_reused else None
    if doubt is not None:
        raise NotSeen(unseen=[file.path], reason=doubt[0], cure=doubt[1])


async def _close(target: Target, order: Order) -> None:
    """A file that QEMU has open is not to be removed. Raises NotProven where it has it still."""
    try:
        await target.monitor.execute("blockdev-del", node_name=order.node)
    except QemuRefused as error:
        expected = f"{order.file} closed again"
        with unproven(target.name, expected):
            if order.node in (await target.layout()).nodes:
                raise NotProven(target=target.name, expected=expected, found=str(error)) from None


def _see(file: File) -> None:
    """That its name still leads to it. Raises Replaced."""
    if files.inode(file.path) != file.inode:
        raise identity.swapped(file.path)
