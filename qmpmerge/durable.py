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
import re
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from qmpmerge import turns
from qmpmerge.chain import Image
from qmpmerge.errors import CommandError, FlushUnavailable, NotDurable
from qmpmerge.monitor import Address, Monitor

_numbers = itertools.count(1)
FOLDER = "qmpmerge-"
SECONDS = 60.0
GREETING_SECONDS = 1.0
TRIES = 100
UNSEEN = 20
"""How often a server may be running, and be gone when it is looked for: several merges of one QEMU end at once."""

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


async def check(monitor: Monitor, image: Image) -> None:
    """See that a flush of `image` can be asked for. Raises FlushUnavailable."""
    if not await _exports_are_safe(monitor):
        if not image.has_path:
            raise FlushUnavailable(reason="it has iothreads, and an export would crash a QEMU before 9.0")
        return
    async with _server(monitor) as address:
        try:
            async with asyncio.timeout(SECONDS):
                await greet(address)
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
    async with _server(monitor) as address:
        try:
            await monitor.execute("block-export-add", type="nbd", id=export, node_name=node, name=export)
        except CommandError as error:
            raise FlushUnavailable(reason=error.description) from None
        try:
            async with asyncio.timeout(SECONDS):
                problem = await _flush_through(address, export)
        except (OSError, EOFError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            with contextlib.suppress(CommandError):  # gone with its server
                await monitor.execute("block-export-del", id=export, mode="hard")
        if problem is not None:
            raise NotDurable(node=node, reason=problem)


@contextlib.asynccontextmanager
async def _server(monitor: Monitor) -> AsyncIterator[Address]:
    """
    Where QEMU's NBD server listens. QEMU has a single one: we start it and stop it again, or use the one that runs.
    """
    async with _our_turn(monitor):
        with _private_folder(monitor.pid) as folder:
            address, ours = await _started(monitor, f"{folder}/nbd")
            try:
                yield address
            finally:
                if ours:
                    with contextlib.suppress(CommandError):  # stopped by somebody else
                        await monitor.execute("nbd-server-stop")


@contextlib.asynccontextmanager
async def _our_turn(monitor: Monitor) -> AsyncIterator[None]:
    """A server that is stopped under another merge's client hangs QEMU 7.2 with its guest. Raises FlushUnavailable."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(turns.taken(turns.FLUSH, monitor, SECONDS))
        except TimeoutError:
            raise FlushUnavailable(reason="another merge does not let go of its NBD server") from None
        yield


async def _started(monitor: Monitor, path: str) -> tuple[Address, bool]:
    """
    The server's address, and whether we have started it.

    The server of another qmpmerge will be gone in a moment; one that a killed qmpmerge left, which its folder's name
    tells, or that we left ourselves when our session was lost, with its folder, is stopped.
    """
    unseen = 0
    for _ in range(TRIES):
        try:
            await monitor.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}}, max_connections=1)
            return path, True
        except CommandError as error:
            reason = error.description
        address = await _running_server(monitor)
        if address is None:  # it has been stopped since, or cannot be seen from here
            unseen += 1
            if unseen == UNSEEN:
                raise FlushUnavailable(reason=f"{reason}, and it cannot be reached from here")
            await asyncio.sleep(GREETING_SECONDS / 100)
            continue
        owner = _owner(address)
        if owner is None:
            return address, False
        if os.path.exists(f"/proc/{owner}") and os.path.exists(str(address)):
            await asyncio.sleep(GREETING_SECONDS / 10)
        else:
            with contextlib.suppress(CommandError):
                await monitor.execute("nbd-server-stop")
    raise FlushUnavailable(reason="another qmpmerge does not let go of its NBD server")


def _owner(address: Address) -> int | None:
    """The pid of the qmpmerge whose server this is."""
    match = (
        re.match(FOLDER + r"(\d+)-", os.path.basename(os.path.dirname(address))) if isinstance(address, str) else None
    )
    return int(match[1]) if match else None


async def _running_server(monitor: Monitor) -> Address | None:
    """The NBD server's address is not told, so the sockets on which the process listens are tried; None if none is one."""
    from qmpmerge import processes  # only here psutil is needed

    for place in processes.listening(monitor.pid) if monitor.pid is not None else ():
        host, _, port = place.removeprefix("tcp:").rpartition(":")
        address: Address = (host.strip("[]"), int(port)) if place.startswith("tcp:") else place
        if _owner(address) is not None:
            return address  # one client is all that a server of ours lets in, so it is not tried
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(GREETING_SECONDS):
                await greet(address)
                return address
    return None


@contextlib.contextmanager
def _private_folder(pid: int | None) -> Iterator[str]:
    """For QEMU's socket. Made here since `tempfile` takes 8 ms to import. Raises FlushUnavailable."""
    name, reason = f"{FOLDER}{os.getpid()}-{os.urandom(8).hex()}", ""
    for place in filter(None, (os.environ.get("TMPDIR"), "/tmp")):  # noqa: S108
        folder = os.path.join(os.path.abspath(place), name)
        try:
            os.mkdir(folder, 0o700)
            break
        except OSError as error:
            reason = f"{folder}: {error.strerror or error}"
    else:
        raise FlushUnavailable(reason=f"no folder can be made for its socket: {reason}")
    try:
        if os.geteuid() == 0 and pid is not None:
            # QEMU makes the socket and may have dropped its privileges.
            with contextlib.suppress(OSError):
                owner = os.stat(f"/proc/{pid}")
                os.chown(folder, owner.st_uid, owner.st_gid)
        yield folder
    finally:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                os.unlink(os.path.join(folder, name))
            os.rmdir(folder)


async def greet(address: Address) -> None:
    """See that an NBD server answers. Raises OSError, EOFError."""
    async with session(address) as (reader, writer):
        await say_goodbye(reader, writer)


async def say_goodbye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Leave before an export was chosen: else QEMU complains on its stderr."""
    writer.write(struct.pack(">QII", _OPTION_MAGIC, _OPTION_ABORT, 0))
    await _until_closed(reader)


async def _flush_through(address: Address, export: str) -> str | None:
    """Connect, negotiate, flush: None when it went well, else the storage's reason."""
    async with session(address) as (reader, writer):
        await _choose_export(reader, writer, export)
        writer.write(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _COMMAND_FLUSH, 1, 0, 0))
        magic, error, _handle = struct.unpack(">IIQ", await reader.readexactly(16))
        if magic != _REPLY_MAGIC:
            return f"not an NBD reply ({magic:#x})"
        writer.write(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _COMMAND_DISCONNECT, 2, 0, 0))
        await _until_closed(reader)
        return os.strerror(error) if error else None


async def _until_closed(reader: asyncio.StreamReader) -> None:
    """
    Wait until QEMU has let go of the connection.

    Stopped while a client is still there or just going, the NBD server of QEMU 7.2 hangs or crashes with the guest:
    once in some 40 times on a guest that is busy.
    """
    while await reader.read(4096):
        pass


@contextlib.asynccontextmanager
async def session(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """
    A connection to an NBD server, greeted, before an export is chosen. Raises OSError, EOFError.

    A server that lets in so many clients does not answer one more.
    """
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


async def _choose_export(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, export: str) -> None:
    name = export.encode()
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
