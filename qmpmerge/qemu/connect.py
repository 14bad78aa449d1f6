"""A session with a monitor: connect, greet, find out who holds it."""

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator

from qemu.qmp import QMPClient
from qemu.qmp.protocol import ConnectError
from qemu.qmp.qmp_client import NegotiationError

from qmpmerge import folder, sockets, users
from qmpmerge.errors import (
    BadReply,
    CannotConnect,
    MonitorSilent,
    NobodyListens,
    NoPermission,
    NoSuchTarget,
    NotASocket,
    NotQmp,
)
from qmpmerge.qemu import monitor
from qmpmerge.qemu.monitor import COMMAND_SECONDS, GREETING_SECONDS, Monitor
from qmpmerge.sockets import Address

TRIES = 3
"""
How often a session is begun. Who comes right after somebody else can be given what was meant for that one: QEMU 7.2 sent an
event before the reply, once in some hundred times.
"""


class _Overtaken(Exception):
    """Something else came before the reply to the very first command."""


@contextlib.asynccontextmanager
async def connected(address: Address, *, timeout: float = GREETING_SECONDS) -> AsyncIterator[Monitor]:
    """
    Connect, wait for the greeting, negotiate; disconnect at the end of the block.

    Raises a subclass of Unreachable for everything that can go wrong before the session is there.
    """
    session = await connect(address, timeout=timeout)
    try:
        yield session
    finally:
        await session.close()


async def connect(address: Address, *, timeout: float = GREETING_SECONDS) -> Monitor:
    """The same without a block: whoever connects closes the session."""
    name = address if isinstance(address, str) else f"tcp:{address[0]}:{address[1]}"
    tries = 0
    while True:
        connection = await _connect(address, name, timeout)
        try:
            return await _begun(connection, name, _peer_pid(connection), timeout)
        except _Overtaken:
            tries += 1
            if tries == TRIES:
                raise NotQmp(address=name, got="an answer, but not to what was asked") from None


@contextlib.asynccontextmanager
async def opened(connection: socket.socket, *, name: str, pid: int) -> AsyncIterator[Monitor]:
    """The same on a connection that is there already, to the process `pid` that we started ourselves."""
    connection.setblocking(False)
    try:
        session = await _begun(connection, name, pid, COMMAND_SECONDS)
    except _Overtaken:
        raise NotQmp(address=name, got="an answer, but not to what was asked") from None
    try:
        yield session
    finally:
        await session.close()


async def _begun(connection: socket.socket, name: str, pid: int | None, timeout: float) -> Monitor:
    client = monitor.new_client(name, pid)
    await _greet(client, connection, name, pid, timeout)
    try:
        session = Monitor(client, name, pid, connection)
    except BadReply as error:
        await monitor.disconnect(client)
        raise NotQmp(address=name, got=f"it greets, but not as a QEMU does ({error.came})") from None
    if session.replay is not None:
        folder.change_only_below(session.replay)
    return session


async def _connect(address: Address, name: str, timeout: float) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if isinstance(address, str):
        _refuse_other_files(address)
    elif ":" in address[0]:
        family = socket.AF_INET6
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.setblocking(False)
    try:
        if isinstance(address, str):
            # At once or not at all: asyncio would take a full backlog (EAGAIN) for a connection under way.
            with sockets.short(address) as short:
                connection.connect(short)
        else:
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(connection, address)
    except TimeoutError:
        connection.close()
        raise CannotConnect(address=name, reason=f"no answer within {timeout:g} s") from None
    except OSError as error:
        connection.close()
        raise _connect_error(error, address, name, timeout) from None
    except asyncio.CancelledError:
        connection.close()
        raise
    return connection


def _refuse_other_files(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise NoSuchTarget(target=path) from None
    except PermissionError:
        raise NoPermission(address=path, owner=_owner(_closed_folder(path))) from None
    except OSError as error:
        raise CannotConnect(address=path, reason=error.strerror or str(error)) from None
    if not stat.S_ISSOCK(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special file"
        raise NotASocket(path=path, kind=kind)


def _closed_folder(path: str) -> str:
    """The folder that keeps us from looking at `path`."""
    closed = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(closed):  # nor can what lies in it be looked at
        closed = os.path.dirname(closed)
    return closed


def _connect_error(error: OSError, address: Address, name: str, timeout: float) -> Exception:
    if error.errno == errno.ECONNREFUSED:
        return NobodyListens(address=name)
    if error.errno in (errno.EACCES, errno.EPERM) and isinstance(address, str):
        return NoPermission(address=name, owner=_owner(address))
    if error.errno == errno.EAGAIN:
        # The backlog is full of clients that wait for the one that is served.
        return MonitorSilent(address=name, seconds=0, holder="other clients are waiting already")
    return CannotConnect(address=name, reason=error.strerror or str(error))


def _owner(path: str) -> str:
    try:
        return users.name(os.stat(path).st_uid)
    except OSError:
        return "another user"


def _peer_pid(connection: socket.socket) -> int | None:
    """
    The QEMU process, by SO_PEERCRED.

    That is the process which called listen(): None over TCP, in another pid namespace, and where somebody else made the
    socket and handed it to QEMU.
    """
    if connection.family != socket.AF_UNIX:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _uid, _gid = struct.unpack("3i", credentials)
    return int(pid) if pid and _is_qemu(pid) else None


def _is_qemu(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = file.read()
    except OSError:
        return False
    return "qemu" in name or "kvm" in name


async def _greet(client: QMPClient, connection: socket.socket, name: str, pid: int | None, timeout: float) -> None:
    try:
        async with asyncio.timeout(timeout):
            await client.connect(connection)
    except TimeoutError:
        stopped = _is_stopped(pid)
        why = f"QEMU (pid {pid}) is stopped" if stopped else "another client holds it, or it is no QMP monitor"
        raise MonitorSilent(address=name, seconds=timeout, holder=why, stopped=stopped, pid=pid) from None
    except ConnectError as error:
        if isinstance(error.exc, NegotiationError):
            raise _Overtaken from None
        raise NotQmp(address=name, got=_what_came(error)) from None
    except AssertionError:  # qemu.qmp takes it for granted that a session which has just begun has not ended
        await monitor.disconnect(client)
        raise NotQmp(address=name, got="it closed the connection at once") from None
    finally:
        if client.runstate.name == "IDLE":
            connection.close()


def _is_stopped(pid: int | None) -> bool:
    """Whether the process is stopped (SIGSTOP, a debugger): state T or t in proc(5)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def _what_came(error: ConnectError) -> str:
    cause = error.exc
    if isinstance(cause, EOFError):
        return "it closed the connection at once"
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    message = str(getattr(cause, "exc", cause)) or type(cause).__name__
    return message.strip().splitlines()[0][:200]
