"""QEMU's own NBD server, for the moment of a flush."""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Iterator

from qmpmerge.errors import CommandError, FlushUnavailable
from qmpmerge.images import nbd
from qmpmerge.qemu import mutex
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.sockets import Address

FOLDER = "qmpmerge-"
SECONDS = 60.0
GREETING_SECONDS = 1.0
TRIES = 100
UNSEEN = 20
"""How often a server may be running, and be gone when it is looked for: several merges of one QEMU end at once."""


@contextlib.asynccontextmanager
async def running(monitor: Monitor) -> AsyncIterator[Address]:
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
            await stack.enter_async_context(mutex.taken(mutex.FLUSH, monitor, SECONDS))
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
    from qmpmerge.processes import holders  # only here psutil is needed

    for place in holders.listening(monitor.pid) if monitor.pid is not None else ():
        host, _, port = place.removeprefix("tcp:").rpartition(":")
        address: Address = (host.strip("[]"), int(port)) if place.startswith("tcp:") else place
        if _owner(address) is not None:
            return address  # one client is all that a server of ours lets in, so it is not tried
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(GREETING_SECONDS):
                await nbd.greet(address)
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
