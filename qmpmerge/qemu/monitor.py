"""
The QMP session: the only module that imports qemu.qmp.

Every wait has a limit, and every way in which a session can fail has a name: qemu.qmp itself waits
for ever for a greeting that does not come and for a reply that is missing. Events only wake us: what they say is asked
for again, so a lost event costs half a second and nothing else.
"""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import StateError

from qmpmerge import watch
from qmpmerge.errors import NoReply, QemuRefused, SessionLost
from qmpmerge.qemu import reply

GREETING_SECONDS = 5.0

COMMAND_SECONDS = 60.0
WAKING_EVENTS = {
    "JOB_STATUS_CHANGE",
    "BLOCK_JOB_READY",
    "BLOCK_JOB_PENDING",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_ERROR",
}

# Replies grow with the chain: 1000 layers make 1.2 MB, 40 MB at the worst where QEMU 7.2 calls each of them by a nested
# json: name. qemu.qmp's own limit of 10 MB would end the session; without any a server could fill our memory, since what
# is decoded can be twenty times as large.
LARGEST_REPLY = 64 * 1024 * 1024

REPLAY = "qmpmerge-replay"
"""The key in a greeting's version by which a replay tells that it is one, with the folder that its files lie in."""

# Their arguments have underscores, as before QMP had rules.
_OLD = frozenset({"block_set_io_throttle"})


_QUESTIONS = ("query-", "x-debug-query-")


# qemu.qmp logs what it raises; people see our errors instead.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Monitor:
    """
    A negotiated QMP session. Made by `connected`. `has_paused` says that the guest was stopped in it by us, and not seen to
    run again. `has_acted` says that more than questions were asked in it, or that it follows what was begun in another one.

    `pid` is the QEMU process where the kernel tells it (UNIX sockets on this host), else None. `version` is QEMU's, as
    in ``(7, 2, 22)``; `replay` the folder of one that is no QEMU, but `qmpmerge replay`. `tell` hears a sentence when others
    are waited for.
    """

    def __init__(self, client: QMPClient, name: str, pid: int | None, connection: socket.socket) -> None:
        self._client = client
        self._connection = connection
        self.name = name
        self.pid = pid
        self.tell: Callable[[str], None] = lambda text: None
        self.version, self.replay = _version_of(name, client)
        self.has_paused = False
        self.has_acted = False

    @property
    def descriptor(self) -> int:
        """The connection, for a process that is to inherit it; -1 once the session has ended."""
        return self._connection.fileno()

    async def execute(self, command: str, *, timeout: float = COMMAND_SECONDS, **arguments: object) -> Any:
        """
        Run one QMP command and return its value; underscores in argument names become hyphens, but for `_OLD` commands.

        Raises QemuRefused when QEMU says no, SessionLost when the session ended before the reply, NoReply when none
        came in time, BadReply where the value is not what `reply.SHAPES` says. After the last three nobody knows whether
        the command ran or still will: ask, never send it again.
        """
        sent = {key if command in _OLD else key.replace("_", "-"): value for key, value in arguments.items()}
        _refuse_broken_text(command, sent)
        self.has_acted = self.has_acted or not command.startswith(_QUESTIONS)
        try:
            async with asyncio.timeout(timeout):
                value = await self._client.execute(command, sent or None)
        except TimeoutError:
            raise NoReply(target=self.name, command=command, seconds=timeout) from None
        except ExecuteError as error:
            raise QemuRefused(command=command, reason=str(error)) from None
        except StateError:  # what its library has to say is for who writes programs with it
            raise SessionLost(target=self.name, command=command, reason="it had ended already") from None
        except (QMPError, OSError, EOFError, ValueError) as error:
            raise SessionLost(target=self.name, command=command, reason=_reason(error)) from None
        reply.see(self.name, command, value)
        return value

    async def execute_all(self, commands: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Any]:
        """
        Send commands one after the other without waiting in between; QEMU runs them in their order.

        Returns the value or the QemuRefused of each. Raises the others as `execute` does.
        """
        sent = (self.execute(command, **arguments) for command, arguments in commands)
        replies = await asyncio.gather(*sent, return_exceptions=True)
        for value in replies:
            if isinstance(value, BaseException) and not isinstance(value, QemuRefused):
                raise value
        return replies

    async def hand_over(self, descriptor: int) -> int:
        """
        Give QEMU a descriptor of ours, and return the number of the set in which it has it (``/dev/fdset/N``), until
        `remove-fd`. Raises as `execute`, QemuRefused also where the monitor is no UNIX socket of this host.
        """
        try:
            if self._connection.family != socket.AF_UNIX:
                raise OSError("its monitor is no UNIX socket")
            socket.send_fds(self._connection, [b" "], [descriptor])
        except OSError as error:
            raise QemuRefused(command="add-fd", reason=error.strerror or str(error)) from None
        return int((await self.execute("add-fd"))["fdset-id"])

    async def accepts(self, command: str, argument: str) -> bool:
        """Whether this QEMU's `command` takes `argument`, by its schema and not by its version."""
        schema = {entry["name"]: entry for entry in await self.execute("query-qmp-schema")}
        taken = schema.get(schema.get(command, {}).get("arg-type"), {})
        return any(member.get("name") == argument for member in taken.get("members", ()))

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["Doorbell"]:
        """
        Ring a `Doorbell` for every job event while the block runs.

        Enter it before the job is started: its first events come before the reply.
        """
        doorbell = Doorbell()
        with self._client.listen(doorbell):
            yield doorbell

    async def close(self) -> None:
        """End the session; what was sent and not answered is not run any more (QEMU drops it with the connection)."""
        await disconnect(self._client)


def _refuse_broken_text(command: str, sent: Mapping[str, object]) -> None:
    """JSON carries text, a file name may be any bytes: QEMU ends the session over a name that is no UTF-8."""
    try:
        json.dumps(sent, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise QemuRefused(command=command, reason="a name is no UTF-8, which QMP cannot carry") from None


class _Client(QMPClient):
    """
    Understands monitors with ``pretty=on`` too, which write an object over several lines, and close it at the margin.

    Each message comes through here in its order, before anybody waits for it: `wire` sees them.
    """

    def __init__(self, wire: watch.Wire | None) -> None:
        super().__init__(readbuflen=LARGEST_REPLY)
        self._wire = wire

    async def _do_recv(self) -> Message:
        text = await (self._read() if self._wire is None else self._read_until_closed(self._wire))
        self._acknowledge()
        message = Message(text, eager=True)
        if self._wire is not None:
            self._wire.received(text, _id(message))
        return message

    async def _read(self) -> bytes:
        lines = [await self._readline()]
        size = len(lines[0])
        while lines[0].rstrip() == b"{" and lines[-1].rstrip(b"\r\n") != b"}" and size <= LARGEST_REPLY:
            lines.append(await self._readline())
            size += len(lines[-1])
        return b"".join(lines)

    async def _read_until_closed(self, wire: watch.Wire) -> bytes:
        try:
            return await self._read()
        except asyncio.CancelledError:
            wire.closed("by us")
            raise
        except (OSError, EOFError, ValueError) as error:
            wire.closed("by the other end" if isinstance(error, EOFError) else _reason(error))
            raise

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if self._is_logged else msg

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if self._is_logged else msg

    @property
    def _is_logged(self) -> bool:
        """qemu.qmp writes each message out for its log, indented, whether or not it is read: a tenth of the time of a merge."""
        return self.logger.isEnabledFor(logging.DEBUG)

    def _do_send(self, msg: Message) -> None:
        if self._wire is not None:
            self._wire.sent(bytes(msg), str(msg.get("execute")), _id(msg))
        super()._do_send(msg)
        self._acknowledge()

    def _acknowledge(self) -> None:
        """
        Over TCP acknowledge at once what comes: QEMU, with Nagle's algorithm on, does not send a reply while the event
        before it is not acknowledged, and the kernel takes 40 ms for that. It is told each time, since it forgets that.
        """
        connection = self._writer.get_extra_info("socket") if self._writer is not None else None
        if connection is not None and connection.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):  # it has ended, which the next read tells
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _id(message: Message) -> str | None:
    """Ours are text, whatever comes."""
    found = message.get("id")
    return found if isinstance(found, str) else None


def new_client(name: str, pid: int | None) -> QMPClient:
    """A client that keeps nothing: the listener that each one of qemu.qmp has would keep all events until its end."""
    watcher = watch.current()
    client = _Client(watcher.connected(name, pid) if watcher is not None else None)
    client.events.event_filter = lambda event: False
    return client


class Doorbell(EventListener):
    """
    Job events as a doorbell: they say when to look, never what is true.

    A bell that has rung already is not rung twice: however many events come, nothing grows. (Listeners of qemu.qmp keep
    all that they were told, even what was taken from them.)
    """

    def __init__(self) -> None:
        super().__init__(WAKING_EVENTS)
        self.heard: dict[str, str] = {}
        """The errors with which jobs were said to end, by their ids: a reason to be told, no proof of anything."""
        self._rung = asyncio.Event()

    async def put(self, event: Message) -> None:
        """Called by qemu.qmp for every event."""
        if not self.accept(event):
            return
        self._rung.set()
        data = event.get("data")
        if event["event"] == "BLOCK_JOB_COMPLETED" and isinstance(data, dict) and "error" in data:
            self.heard = {str(data.get("device")): str(data["error"])}

    def silence(self) -> None:
        """What it has rung for is known."""
        self._rung.clear()

    async def wait(self, seconds: float) -> None:
        """Return when it rang, at the latest after `seconds`; a dead session does not ring."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        self._rung.clear()


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


async def disconnect(client: QMPClient) -> None:
    """End the session, whatever it ended with already."""
    # disconnect() raises whatever ended the session; who needed to know was told by execute() already.
    with contextlib.suppress(QMPError, OSError, EOFError, ValueError, TypeError, RecursionError):
        async with asyncio.timeout(GREETING_SECONDS):
            await client.disconnect()


def _version_of(name: str, client: QMPClient) -> tuple[tuple[int, int, int], str | None]:
    """And the folder of a replay. Raises BadReply."""
    greeting = client.greeting
    assert greeting is not None, "a connected client was greeted"
    told: Any = greeting.QMP.version
    reply.see_shape(name, "the greeting", told, reply.GREETING)
    numbers = told["qemu"]
    replay = told.get(REPLAY)
    return (numbers["major"], numbers["minor"], numbers["micro"]), None if replay is None else str(replay)
