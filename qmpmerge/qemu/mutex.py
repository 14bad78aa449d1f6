"""
What only one of all merges of a QEMU may do at a time, whichever process they are in.

A turn is a name in the kernel's abstract namespace of UNIX sockets: it is freed with its holder, however that ends, and
nothing is left on a disk. Processes of other network namespaces do not see it.
"""

import asyncio
import contextlib
import errno
import socket
import zlib
from collections.abc import AsyncIterator

from qmpmerge.qemu.monitor import Monitor

LOOK_AGAIN_SECONDS = 0.01
FLUSH, PAUSE = "flush", "pause"


@contextlib.asynccontextmanager
async def taken(what: str, monitor: Monitor, seconds: float | None = None) -> AsyncIterator[socket.socket]:
    """
    Wait for our turn at `what` of this QEMU, and have it during the block.

    It is freed with the last descriptor of the socket that the block gets: who hands that on hands on the turn.

    Where the kernel has no such names for us nobody is kept away. Raises TimeoutError after `seconds`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as turn:
        async with asyncio.timeout(seconds):
            while not _is_ours(turn, f"\0qmpmerge-{what}-{_qemu(monitor)}"):  # noqa: ASYNC110 - nobody rings across processes
                await asyncio.sleep(LOOK_AGAIN_SECONDS)
        yield turn


def _qemu(monitor: Monitor) -> int:
    """Its pid, or where the kernel does not tell (TCP), a number made of its address."""
    return monitor.pid or zlib.crc32(monitor.name.encode(errors="surrogatepass"))


def _is_ours(turn: socket.socket, name: str) -> bool:
    try:
        turn.bind(name)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True
