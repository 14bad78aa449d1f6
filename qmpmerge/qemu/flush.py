"""
A flush whose error we see.

QEMU hides flush errors from everybody who asks through the human monitor, and a block-commit succeeds over a base whose
flush failed (7.2 to 11.1). A flush through a read-only NBD export of the node carries the errno. The server is QEMU's
own, on a socket in a private folder, for the few milliseconds that it takes.

Where a disk lives in an iothread, QEMU before 9.0 aborts, with the guest, when a client leaves such an export; and a job
that has grown its base lets no export in. There we ask through the human monitor and sync the file ourselves: that shows
errors of the storage, and what it cannot show, a table that QEMU failed to write, a comparison of base and top must find.
A node that we have opened ourselves is reopened instead, with the very options that it has.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Mapping
from typing import Any

from qmpmerge.chain.chain import Image
from qmpmerge.errors import CommandError, FlushUnavailable, NotDurable
from qmpmerge.images import nbd
from qmpmerge.qemu import nbdserver
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.qemu.nbdserver import SECONDS

_numbers = itertools.count(1)


async def check(monitor: Monitor, image: Image) -> None:
    """See that a flush of `image` can be asked for. Raises FlushUnavailable."""
    if not await _exports_are_safe(monitor):
        if not image.has_path:
            raise FlushUnavailable(reason="it has iothreads, and an export would crash a QEMU before 9.0")
        return
    async with nbdserver.running(monitor) as address:
        try:
            async with asyncio.timeout(SECONDS):
                await nbd.greet(address)
        except (OSError, EOFError, TimeoutError) as error:
            raise FlushUnavailable(reason=f"its NBD server cannot be reached ({error})") from None


async def flush(monitor: Monitor, image: Image, *, opened: Mapping[str, Any] | None = None) -> bool:
    """
    Make all that was written to `image` durable, down to the storage.

    `opened` are the options of its node where we have opened it ourselves. Returns whether every error would have been
    seen; where not, what the image shows must be compared. Raises NotDurable with the storage's reason, FlushUnavailable
    when QEMU cannot be asked.
    """
    if await _exports_are_safe(monitor):
        try:
            await _flush_by_export(monitor, image.node or "")
            return True
        except FlushUnavailable:
            # A job that has grown its base lets no export in (it holds `resize`, which an export does not share).
            if not image.has_path:
                raise
    if opened is not None:
        await _flush_by_reopening(monitor, opened)
        return True
    if image.format != "raw" or not await _exports_are_safe(monitor):
        await _flush_unseen(monitor, image)
    await asyncio.to_thread(_sync, image)
    return image.format == "raw"  # it has no tables of its own that QEMU could have failed to write


async def _flush_by_reopening(monitor: Monitor, opened: Mapping[str, Any]) -> None:
    """QEMU flushes a node before it reopens it, here with the options that it has, and tells the error (6.1)."""
    try:
        await monitor.execute("blockdev-reopen", options=[{**opened, "read-only": False}])
    except CommandError as error:
        if "flushing" in error.description:
            raise NotDurable(node=str(opened["node-name"]), reason=error.description) from None
        raise FlushUnavailable(reason=error.description) from None


async def _flush_unseen(monitor: Monitor, image: Image) -> None:
    """Through the human monitor, which shows no error."""
    try:
        await monitor.execute("human-monitor-command", command_line=f"qemu-io {image.node} flush")
    except CommandError as error:
        raise FlushUnavailable(reason=error.description) from None


async def _exports_are_safe(monitor: Monitor) -> bool:
    if monitor.version >= (9, 0, 0):
        return True
    try:
        return not await monitor.execute("query-iothreads")
    except CommandError:
        return True  # a storage daemon that does not know the word has none


def _sync(image: Image) -> None:
    """
    fsync from a descriptor of our own. The kernel reports an error of writing back that nobody has seen yet also to
    who opened the file later (errseq_t, Linux 4.16).
    """
    try:
        descriptor = os.open(image.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise NotDurable(node=image.file, reason=error.strerror or str(error)) from None


async def _flush_by_export(monitor: Monitor, node: str) -> None:
    export = f"qmpmerge-flush-{os.getpid()}-{next(_numbers)}"
    async with nbdserver.running(monitor) as address:
        try:
            await monitor.execute("block-export-add", type="nbd", id=export, node_name=node, name=export)
        except CommandError as error:
            raise FlushUnavailable(reason=error.description) from None
        try:
            async with asyncio.timeout(SECONDS):
                problem = await nbd.flush_through(address, export)
        except (OSError, EOFError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            with contextlib.suppress(CommandError):  # gone with its server
                await monitor.execute("block-export-del", id=export, mode="hard")
        if problem is not None:
            raise NotDurable(node=node, reason=problem)
