"""
The QMP session: the only module that imports qemu.qmp.

Every wait has a limit, and every way in which a session can fail has a name: qemu.qmp itself waits
for ever for a greeting that does not come and for a reply that is missing. Events only wake us: what they say is asked
for again, so a lost event costs half a second and nothing else.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import pwd
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import ConnectError
from qemu.qmp.qmp_client import NegotiationError

from qmpmerge.errors import (
    CannotConnect,
    CommandError,
    MonitorSilent,
    NobodyListens,
    NoPermission,
    NoReply,
    NoSuchTarget,
    NotASocket,
    NotQmp,
    SessionLost,
)

Address = str | tuple[str, int]
"""The path of a UNIX socket, or host and port."""

Trace = Callable[[str, str], None]
"""Told of the traffic: direction (``->`` sent, ``<-`` received, ``<!`` event) and the text."""

GREETING_SECONDS = 5.0
TRIES = 3
"""
How often a session is begun. Who comes right after somebody else can be given what was meant for that one: QEMU 7.2 sent an
event before the reply, once in some hundred times.
"""
COMMAND_SECONDS = 60.0
WAKING_EVENTS = {
    "JOB_STATUS_CHANGE",
    "BLOCK_JOB_READY",
    "BLOCK_JOB_PENDING",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_ERROR",
}

# Replies grow with the chain: 1000 layers make 1.2 MB, and other people's nodes can be many. qemu.qmp's own limit of
# 10 MB would end the session.
_LARGEST_REPLY = 256 * 1024 * 1024

# Their arguments have underscores, as before QMP had rules.
_OLD = frozenset({"block_set_io_throttle"})

# qemu.qmp logs what it raises; people see our errors instead.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Monitor:
    """
    A negotiated QMP session. Made by `connected`.

    `pid` is the QEMU process where the kernel tells it (UNIX sockets on this host), else None. `version` is QEMU's, as
    in ``(7, 2, 22)``.
    """

    def __init__(
        self, client: QMPClient, name: str, pid: int | None, trace: Trace | None, connection: socket.socket
    ) -> None:
        self._client = client
        self._connection = connection
        self.name = name
        self.pid = pid
        self._trace = trace
        self.version = _version_of(client)

    @property
    def descriptor(self) -> int:
        """The connection, for a process that is to inherit it; -1 once the session has ended."""
        return self._connection.fileno()

    async def execute(self, command: str, *, timeout: float = COMMAND_SECONDS, **arguments: object) -> Any:
        """
        Run one QMP command and return its value; underscores in argument names become hyphens, but for `_OLD` commands.

        Raises CommandError when QEMU says no, SessionLost when the session ended before the reply, NoReply when none
        came in time. After the last two nobody knows whether the command ran or still will: ask, never send it again.
        """
        sent = {key if command in _OLD else key.replace("_", "-"): value for key, value in arguments.items()}
        shown = {**sent, "data": "(not shown)"} if command == "object-add" else sent
        _refuse_broken_text(command, sent)
        self._tell("->", {"execute": command, "arguments": shown} if sent else {"execute": command})
        try:
            async with asyncio.timeout(timeout):
                value = await self._client.execute(command, sent or None)
        except TimeoutError:
            raise NoReply(target=self.name, command=command, seconds=timeout) from None
        except ExecuteError as error:
            self._tell("<-", {"error": str(error)})
            raise CommandError(command, str(error)) from None
        except (QMPError, OSError, EOFError, ValueError) as error:
            raise SessionLost(target=self.name, command=command, reason=_reason(error)) from None
        self._tell("<-", {"return": value})
        return value

    async def execute_all(self, commands: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Any]:
        """
        Send commands one after the other without waiting in between; QEMU runs them in their order.

        Returns the value or the CommandError of each. Raises SessionLost and NoReply as `execute` does.
        """
        sent = (self.execute(command, **arguments) for command, arguments in commands)
        told = await asyncio.gather(*sent, return_exceptions=True)
        for value in told:
            if isinstance(value, BaseException) and not isinstance(value, CommandError):
                raise value
        return told

    def _tell(self, direction: str, message: object) -> None:
        if self._trace is not None:  # a long chain is a megabyte to write out
            self._trace(direction, json.dumps(message))

    async def accepts(self, command: str, argument: str) -> bool:
        """Whether this QEMU's `command` takes `argument`, by its schema and not by its version."""
        schema = {entry["name"]: entry for entry in await self.execute("query-qmp-schema")}
        members = schema[schema[command]["arg-type"]]["members"] if command in schema else []
        return any(member["name"] == argument for member in members)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["Doorbell"]:
        """
        Ring a `Doorbell` for every job event while the block runs.

        Enter it before the job is started: its first events come before the reply.
        """
        with self._client.listener(names=WAKING_EVENTS) as listener:
            yield Doorbell(listener, self._trace)

    async def close(self) -> None:
        """End the session; what was sent and not answered is not run any more (QEMU drops it with the connection)."""
        await _disconnect(self._client)


def _refuse_broken_text(command: str, sent: Mapping[str, object]) -> None:
    """JSON carries text, a file name may be any bytes: QEMU ends the session over a name that is no UTF-8."""
    try:
        json.dumps(sent, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CommandError(command, "a name is no UTF-8, which QMP cannot carry") from None


class Doorbell:
    """Job events as a doorbell: they say when to look, never what is true."""

    def __init__(self, listener: Any, trace: Trace | None) -> None:
        self._listener = listener
        self._trace = trace

    async def wait(self, seconds: float) -> None:
        """Return when it rang, at the latest after `seconds`; a dead session does not ring."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                self._note(await self._listener.get())
        for event in self._listener.clear():
            self._note(event)

    def _note(self, event: object) -> None:
        if self._trace is not None:
            self._trace("<!", str(event))


@contextlib.asynccontextmanager
async def connected(
    address: Address, *, timeout: float = GREETING_SECONDS, trace: Trace | None = None
) -> AsyncIterator[Monitor]:
    """
    Connect, wait for the greeting, negotiate; disconnect at the end of the block.

    Raises a subclass of Unreachable for everything that can go wrong before the session is there.
    """
    session = await connect(address, timeout=timeout, trace=trace)
    try:
        yield session
    finally:
        await session.close()


async def connect(address: Address, *, timeout: float = GREETING_SECONDS, trace: Trace | None = None) -> Monitor:
    """The same without a block: whoever connects closes the session."""
    name = address if isinstance(address, str) else f"tcp:{address[0]}:{address[1]}"
    tries = 0
    while True:
        connection = await _connect(address, name, timeout)
        try:
            return await _begun(connection, name, _peer_pid(connection), timeout, trace)
        except _Overtaken:
            tries += 1
            if tries == TRIES:
                raise NotQmp(address=name, got="an answer, but not to what was asked") from None


class _Overtaken(Exception):
    """Something else came before the reply to the very first command."""


@contextlib.asynccontextmanager
async def opened(
    connection: socket.socket, *, name: str, pid: int, trace: Trace | None = None
) -> AsyncIterator[Monitor]:
    """The same on a connection that is there already, to the process `pid` that we started ourselves."""
    connection.setblocking(False)
    try:
        session = await _begun(connection, name, pid, COMMAND_SECONDS, trace)
    except _Overtaken:
        raise NotQmp(address=name, got="an answer, but not to what was asked") from None
    try:
        yield session
    finally:
        await session.close()


async def _begun(connection: socket.socket, name: str, pid: int | None, timeout: float, trace: Trace | None) -> Monitor:
    client = QMPClient(readbuflen=_LARGEST_REPLY)
    await _greet(client, connection, name, pid, timeout)
    try:
        return Monitor(client, name, pid, trace, connection)
    except (KeyError, TypeError, ValueError):
        await _disconnect(client)
        raise NotQmp(address=name, got="it greets, but not as a QEMU does") from None


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
            with _short(address) as short:
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
        raise NoPermission(address=path, owner="another user") from None
    except OSError as error:
        raise CannotConnect(address=path, reason=error.strerror or str(error)) from None
    if not stat.S_ISSOCK(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special file"
        raise NotASocket(path=path, kind=kind)


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """The path as connect(2) takes it: one of more than 107 bytes goes by a descriptor of the socket's file."""
    if len(os.fsencode(path)) <= 107:
        yield path
        return
    descriptor = os.open(path, os.O_PATH)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


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
        uid = os.stat(path).st_uid
        return pwd.getpwuid(uid).pw_name
    except (OSError, KeyError):
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
        raise MonitorSilent(address=name, seconds=timeout, holder=why, stopped=stopped) from None
    except ConnectError as error:
        if isinstance(error.exc, NegotiationError):
            raise _Overtaken from None
        raise NotQmp(address=name, got=_what_came(error)) from None
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


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


async def _disconnect(client: QMPClient) -> None:
    # disconnect() raises whatever ended the session; who needed to know was told by execute() already.
    with contextlib.suppress(QMPError, OSError, EOFError, ValueError, TypeError, RecursionError):
        async with asyncio.timeout(GREETING_SECONDS):
            await client.disconnect()


def _version_of(client: QMPClient) -> tuple[int, int, int]:
    greeting = client.greeting
    assert greeting is not None, "a connected client was greeted"
    numbers: Any = greeting.QMP.version["qemu"]
    return int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"])
