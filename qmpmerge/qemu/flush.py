"""
A flush whose error we see.

QEMU hides flush errors from everybody who asks through the human monitor, and a block-commit succeeds over a base whose
flush failed (7.2 to 11.1). But before QEMU reopens a node it flushes it, with all below that the node may write to, and
tells the error (`bdrv_reopen_prepare`). So we put a node of our own beside the others on the image, and reopen it as it is:
``blkdebug`` without any rule, which can hold the permission ``write-unchanged`` that neither jobs nor devices keep for
themselves. Nothing but the monitor is shared with QEMU, so it does not matter where and as whom it runs.

QEMU stands still while it flushes, as at the end of any block-commit. So what the kernel holds of the image is written out
first, by ourselves; of one on the network nobody but QEMU can. That is not begun earlier, while the job copies (by
sync_file_range), though it would halve what the guest's worst flush waits for: whoever begins it may be the only one who is
told that it failed. Where ext4 finds no place for what was written it drops that, says so in the return value, and every
later flush succeeds, the guest's own too (Linux 6.18).
"""

import asyncio
from typing import Any

from qmpmerge.chain.chain import Image
from qmpmerge.errors import Busy, FlushUnavailable, NotDurable, QemuRefused
from qmpmerge.images import files
from qmpmerge.qemu import blockgraph, discovery, mutex
from qmpmerge.qemu.monitor import Monitor

NODE = blockgraph.FLUSH
SECONDS = 60.0
"""How long another merge of the same QEMU may take for its flush."""


async def check(monitor: Monitor, image: Image) -> None:
    """See that a flush of `image` can be asked for, by one of a node that may not write. Raises FlushUnavailable, Busy."""
    try:
        await _ask(monitor, image, {"read-only": True})
    except mutex.NoTurn as error:
        raise Busy(disk=monitor.name, target=monitor.name, holder=error.holder) from None


async def flush(monitor: Monitor, image: Image, *, header_only: bool = False) -> None:
    """
    Make all that was written to `image` durable, down to the storage; or its header alone, which QEMU writes past its
    caches, so that it need not stand still where we can sync the file.

    Raises NotDurable with the storage's reason, FlushUnavailable when QEMU cannot be asked.
    """
    is_synced = await asyncio.to_thread(_sync, image, monitor.pid)
    if is_synced and header_only:
        return
    try:
        await _ask(monitor, image, {"take-child-perms": ["write-unchanged"]})
    except mutex.NoTurn as error:
        cure = "wait until the other merges of this QEMU have ended"
        raise FlushUnavailable(reason=str(error), cure=cure) from None


async def _ask(monitor: Monitor, image: Image, more: dict[str, Any]) -> None:
    """
    All in one go, so that a kill leaves hardly ever something; what one has left the next takes away. Raises NoTurn,
    FlushUnavailable.
    """
    await _see_that_it_survives(monitor, image)
    options = {"driver": "blkdebug", "node-name": NODE, "image": image.node, **more}
    remove = ("blockdev-del", {"node-name": NODE})
    commands = [remove, ("blockdev-add", options), ("blockdev-reopen", {"options": [options]}), remove]
    async with mutex.taken(mutex.FLUSH, monitor, SECONDS):
        _, added, flushed, _ = await monitor.execute_all(commands)
    _judge(image, added, flushed)


async def _see_that_it_survives(monitor: Monitor, image: Image) -> None:
    """
    QEMU 7.2 aborts when a node is put above one that lies in an iothread of an export's: it gives back a lock that it does not
    hold as it moves that one away, which a device forbids. 10.0 and later do it. Raises FlushUnavailable.
    """
    if monitor.version >= (10, 0, 0):
        return
    try:
        objects = await monitor.execute("qom-list", path="/objects")
    except QemuRefused:  # a storage daemon has none before its first
        return
    if all(entry["type"] != "child<iothread>" for entry in objects) or not await monitor.execute("query-block-exports"):
        return
    disks = (await discovery.discover(monitor, lambda name: (name, None))).disks
    if not any(disk.drive or disk.qdev for disk in disks if image.node in disk.nodes):
        reason = f"QEMU {'.'.join(map(str, monitor.version))} would abort if the image is exported in an iothread"
        cure = "end the daemon and name the image as TARGET, use QEMU 10 or later, or export it without `iothread`"
        raise FlushUnavailable(reason=reason, cure=cure)


def _judge(image: Image, added: object, flushed: object) -> None:
    if isinstance(added, QemuRefused) and "read-only" in added.reason:
        return  # QEMU has flushed it when it made it so; where that fails, it stays as it was
    for reply in (added, flushed):
        if isinstance(reply, QemuRefused) and "flushing" in reply.reason:
            raise NotDurable(node=image.node or image.file, reason=reply.reason)
        if isinstance(reply, QemuRefused):
            cure = "use a QEMU of version 6.1 or later that was built with the block driver `blkdebug`"
            raise FlushUnavailable(reason=reply.reason, cure=cure)


def _sync(image: Image, pid: int | None) -> bool:
    """
    fsync the image's file from a descriptor of our own; returns whether we can, where QEMU has its own folders too.

    The kernel reports an error of writing back that nobody has seen yet also to who opened the file later (errseq_t, Linux
    4.16). Raises NotDurable.
    """
    try:
        file = files.of_image(image, pid)
        if file is None:
            return False
        with file:
            file.sync()
            return True
    except OSError as error:
        raise NotDurable(node=image.file, reason=error.strerror or str(error)) from None
