"""
A flush whose error we see.

QEMU hides flush errors from everybody who asks through the human monitor, and a block-commit succeeds over a base whose
flush failed (7.2 to 11.1). A flush through a read-only NBD export of the node carries the errno.
The server is QEMU's own, on a socket in a private folder, for the few milliseconds that it takes.
"""

import asyncio
import contextlib
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from qmpmerge.errors import CommandError, FlushUnavailable, NotDurable
from qmpmerge.monitor import Address, Monitor

EXPORT = "qmpmerge-flush"
FOLDER = "qmpmerge-"
SECONDS = 60.0
GREETING_SECONDS = 1.0

# docs/interop/nbd.txt of QEMU, and the NBD project's doc/proto.md
_MAGIC = b"NBDMAGICIHAVEOPT"
_FIXED_NEWSTYLE_NO_ZEROES = 3
_OPTION_MAGIC = 0x49484156454F5054
_OPTION_ABORT = 2
_OPTION_GO = 7
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REPLY_ACK = 1
_REQUEST_MAGIC = 0x25609513
_COMMAND_DISCONNECT = 2
_COMMAND_FLUSH = 3
_REPLY_MAGIC = 0x67446698


async def check(monitor: Monitor) -> None:
    """See that QEMU has an NBD server that we can reach. Raises FlushUnavailable."""
    async with _server(monitor) as address:
        try:
            async with asyncio.timeout(SECONDS):
                await _greet(address)
        except (OSError, EOFError, TimeoutError) as error:
            raise FlushUnavailable(reason=f"its NBD server cannot be reached ({error})") from None


async def flush(monitor: Monitor, node: str) -> None:
    """
    Make all that was written to `node` durable, down to the storage.

    Raises NotDurable with the storage's reason, FlushUnavailable when QEMU cannot be asked.
    """
    async with _server(monitor) as address:
        try:
            await monitor.execute("block-export-add", type="nbd", id=EXPORT, node_name=node, name=EXPORT)
        except CommandError as error:
            raise FlushUnavailable(reason=error.description) from None
        try:
            async with asyncio.timeout(SECONDS):
                problem = await _flush_through(address)
        except (OSError, EOFError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            await monitor.execute("block-export-del", id=EXPORT, mode="hard")
        if problem is not None:
            raise NotDurable(node=node, reason=problem)


@contextlib.asynccontextmanager
async def _server(monitor: Monitor) -> AsyncIterator[Address]:
    """
    Where QEMU's NBD server listens. QEMU has a single one: we start it and stop it again, or use the one that runs.

    One that a killed qmpmerge left behind is known by its folder, and stopped.
    """
    await _remove_leftover_export(monitor)
    with _private_folder(monitor.pid) as folder:
        address: Address = f"{folder}/nbd"
        data = {"type": "unix", "data": {"path": address}}
        try:
            await monitor.execute("nbd-server-start", addr=data, max_connections=1)
            ours = True
        except CommandError as error:
            address = await _running_server(monitor, error.description)
            ours = isinstance(address, str) and os.path.basename(os.path.dirname(address)).startswith(FOLDER)
        try:
            yield address
        finally:
            if ours:
                await monitor.execute("nbd-server-stop")


async def _remove_leftover_export(monitor: Monitor) -> None:
    exports = await monitor.execute("query-block-exports")
    if EXPORT in [export["id"] for export in exports]:
        with contextlib.suppress(CommandError):  # it goes by itself once its client is gone
            await monitor.execute("block-export-del", id=EXPORT, mode="hard")


async def _running_server(monitor: Monitor, reason: str) -> Address:
    """The NBD server's address is not told, so the sockets on which the process listens are tried."""
    from qmpmerge import processes  # only here psutil is needed

    for socket in processes.listening(monitor.pid) if monitor.pid is not None else ():
        host, _, port = socket.removeprefix("tcp:").rpartition(":")
        address: Address = (host.strip("[]"), int(port)) if socket.startswith("tcp:") else socket
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(GREETING_SECONDS):
                await _greet(address)
                return address
    raise FlushUnavailable(reason=f"{reason}, and it cannot be reached from here")


@contextlib.contextmanager
def _private_folder(pid: int | None) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        if os.geteuid() == 0 and pid is not None:
            # QEMU makes the socket and may have dropped its privileges.
            with contextlib.suppress(OSError):
                owner = Path(f"/proc/{pid}").stat()
                os.chown(folder, owner.st_uid, owner.st_gid)
        yield folder


async def _greet(address: Address) -> None:
    """See that an NBD server answers, and say goodbye: else QEMU complains on its stderr."""
    async with _session(address) as (_reader, writer):
        writer.write(struct.pack(">QII", _OPTION_MAGIC, _OPTION_ABORT, 0))
        await writer.drain()


async def _flush_through(address: Address) -> str | None:
    """Connect, negotiate, flush: None when it went well, else the storage's reason."""
    async with _session(address) as (reader, writer):
        await _choose_export(reader, writer)
        writer.write(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _COMMAND_FLUSH, 1, 0, 0))
        magic, error, _handle = struct.unpack(">IIQ", await reader.readexactly(16))
        if magic != _REPLY_MAGIC:
            return f"not an NBD reply ({magic:#x})"
        writer.write(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _COMMAND_DISCONNECT, 2, 0, 0))
        return os.strerror(error) if error else None


@contextlib.asynccontextmanager
async def _session(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to an NBD server, greeted, before an export is chosen."""
    if isinstance(address, str):
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        reader, writer = await asyncio.open_connection(*address)
    try:
        if await reader.readexactly(len(_MAGIC)) != _MAGIC:
            raise OSError("not an NBD server")
        await reader.readexactly(2)
        writer.write(struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES))
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _choose_export(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    name = EXPORT.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    writer.write(struct.pack(">QII", _OPTION_MAGIC, _OPTION_GO, len(data)) + data)
    while True:
        header = await reader.readexactly(20)
        magic, _option, kind, length = struct.unpack(">QIII", header)
        payload = await reader.readexactly(length)
        if magic != _OPTION_REPLY_MAGIC or kind & 0x80000000:
            raise OSError(f"the NBD server refused: {payload.decode(errors='backslashreplace')}")
        if kind == _REPLY_ACK:
            return
