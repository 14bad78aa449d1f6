"""
The QEMU guest agent: freeze the guest's filesystems around a block, with a thaw that cannot be forgotten.

A guest that stays frozen is as bad as one that crashed, so the thaw does not hang on our staying alive. Before the
freeze a *guardian* is started: a small process of its own session, which inherits the connection (an agent serves one
client at a time). It waits, and thaws the guest when we die, or when we are stopped for longer than a limit. Two
processes that read one socket would take each other's replies, so before we thaw we ask the guardian, which decides.

Nothing helps when both are killed at once, as ``systemctl kill --signal=KILL`` or the end of a container does.
"""

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

from qmpmerge import shield
from qmpmerge.errors import AgentFailed, Unknown

GUARDIAN_SECONDS = 10.0
"""How long we wait for a word of the guardian before we go on without it."""

THAW_TRIES = 3
"""How often the guardian tries."""

# Of the agent's replies that we ask for none has 200 bytes; the guest may send what it likes.
_LONGEST_LINE = 64 * 1024

_SENTINEL = b"\xff"

# One-byte words. Ours to the guardian:
_FROZEN = b"f"  # the guest is frozen, the limit counts from now
_MAY_WE = b"?"  # the block is over: may we thaw?
# The guardian's to us, followed by the number of filesystems that it thawed if it did:
_READY = b"r"  # it holds the connection and ignores signals
_YOURS = b"y"  # thaw
_TAKEN = b"g"  # leave the connection alone: it is thawing

# Run without site-packages, to be small and quick: neither this module nor the package's __init__ needs them.
_GUARDIAN = """\
# qmpmerge: thaws the guest if qmpmerge dies
import asyncio, sys
sys.path.append(sys.argv[1])
from qmpmerge import agent
asyncio.run(agent.guard(0, 1, float(sys.argv[2]), float(sys.argv[3])))
"""

_CONNECT_REASONS = {
    errno.ENOENT: "there is no such socket",
    errno.ECONNREFUSED: "nobody listens there: it is no socket, or its QEMU is gone",
    errno.EACCES: "no permission to connect",
    # The backlog is full of clients that wait for the one that is served; asyncio turns EAGAIN into EINVAL.
    errno.EAGAIN: "other clients are waiting already",
    errno.EINVAL: "other clients are waiting already",
}


# For errors.py, under "after the start".
@dataclasses.dataclass(eq=False)
class ThawUnproven(Unknown):
    """
    The guest may be frozen still: the agent confirmed no thaw, neither to us nor to the guardian.

    Every try wrote the command to the channel, so an agent that was only slow still thaws the guest when it gets there.
    """

    agent: str
    reason: str
    sentence = "THE GUEST MAY STILL BE FROZEN: its agent at {agent} did not confirm the thaw: {reason}"
    advice = (
        'thaw it now: `echo \'{{"execute":"guest-fsfreeze-thaw"}}\' | socat -t5 - UNIX-CONNECT:{agent}`, '
        "or `fsfreeze --unfreeze MOUNTPOINT` in the guest"
    )


# For errors.py, under "after the start".
@dataclasses.dataclass(eq=False)
class FreezeUnproven(Unknown):
    """
    The guest runs again, but its filesystems were not frozen to the end of the block, or nobody can say.

    Somebody thawed them earlier: the guardian after its limit, a command in the guest, or a Windows guest, where a
    freeze ends by itself after 10 s.
    """

    agent: str
    frozen: int
    held: int
    sentence = (
        "the guest behind {agent} was thawed too early: of {frozen} frozen filesystems, {held} were still frozen "
        "when the snapshot was taken"
    )
    advice = "the guest is thawed and the snapshot is there, but only crash-consistent; take another one"


@contextlib.asynccontextmanager
async def frozen(path: str, *, timeout: float = 10.0, limit: float = 30.0) -> AsyncIterator[int]:
    """
    Freeze the guest's filesystems for the block; yields how many were frozen, which may be 0.

    `path` is the UNIX socket of the agent's channel on the host. `timeout` is for each exchange with the agent; `limit`
    for how long the guest may stay frozen if our process hangs. Seconds both. However the block ends, the guest is
    thawed and the agent asked whether it is; a cancellation that comes during the thaw is taken back, since the block's
    work is done by then.

    Raises AgentFailed before the block when the guest was not frozen, or was frozen by somebody else already (theirs
    is left alone). Raises ThawUnproven, whatever else was raised, when the guest may still be frozen. Raises
    FreezeUnproven after a block that went well when the guest was thawed before its end.
    """
    with _refusing(path):
        connection = await _connect(path)
    with connection:
        channel = _Channel(connection)
        with _refusing(path):
            await _refuse_frozen(channel, timeout)
            guardian = await _Guardian.start(connection, timeout, limit)
        with contextlib.closing(guardian):
            try:
                with _refusing(path):
                    count = await _freeze(channel, timeout)
                guardian.tell(_FROZEN)
                yield count
            finally:
                held = await shield.finished(_release(path, channel, guardian, timeout))
    if held < count:
        raise FreezeUnproven(agent=path, frozen=count, held=held)


async def guard(control: int, agent: int, timeout: float, limit: float) -> None:
    """
    Be the guardian, in a process of its own: see this module's docstring.

    `control` and `agent` are descriptors of sockets: to the process that is guarded, and to the guest agent.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=control) as guarded, socket.socket(fileno=agent) as connection:
        guarded.setblocking(False)
        _send_word(guarded, _READY)
        await _until_needed(guarded, timeout, limit)
        _send_word(guarded, _TAKEN)
        for _ in range(THAW_TRIES):
            with contextlib.suppress(_AgentError):
                thawed = await _thaw(_Channel(connection), timeout)
                _send_word(guarded, str(thawed).encode())
                return


async def _until_needed(guarded: socket.socket, timeout: float, limit: float) -> None:
    """Return when the other end is gone, or has been silent for longer than its next step may take."""
    patience = timeout + limit
    while True:
        try:
            async with asyncio.timeout(patience):
                word = await asyncio.get_running_loop().sock_recv(guarded, 1)
        except OSError:  # TimeoutError too
            return
        if not word:
            return
        if word == _MAY_WE:
            _send_word(guarded, _YOURS)
        patience = limit if word == _FROZEN else timeout + limit


class _AgentError(Exception):
    """Why the agent did not do as asked, in words for AgentFailed and ThawUnproven."""


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    try:
        yield
    except _AgentError as error:
        raise AgentFailed(agent=path, reason=str(error)) from None


# --- talking to the agent -----------------------------------------------------------------------------------------


class _Channel:
    """
    The agent's protocol on a connected socket.

    Reads only while a reply is awaited: what a reader kept for later would be missing in the guardian.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = b""
        connection.setblocking(False)

    async def ask(self, *commands: str, seconds: float) -> list[dict[str, object]]:
        """
        Synchronise, run the commands, return their replies in order.

        All is written before anything is read: an agent that is busy, with a freeze that takes long, say, comes to
        these commands afterwards, even if nobody waits for them any more. Raises _AgentError.
        """
        mark = int.from_bytes(os.urandom(4), "big")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                await loop.sock_sendall(self._connection, _request(mark, commands))
                await self._skip_to(mark)
                return [_decoded(await self._line()) for _ in commands]
        except TimeoutError:
            raise _AgentError(f"no answer within {seconds:g} s") from None
        except OSError as error:
            raise _AgentError(error.strerror or str(error)) from None

    async def _skip_to(self, mark: int) -> None:
        """Drop what earlier clients left behind: whole replies, their marks, and halves without a line end."""
        while True:
            _stale, sentinel, reply = (await self._line()).rpartition(_SENTINEL)
            if sentinel and _decoded(reply).get("return") == mark:
                return

    async def _line(self) -> bytes:
        while b"\n" not in self._unread:
            received = await asyncio.get_running_loop().sock_recv(self._connection, 4096)
            if not received:
                raise _AgentError("the connection was closed, QEMU may be gone")
            self._unread = self._unread[-_LONGEST_LINE:] + received
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def _request(mark: int, commands: tuple[str, ...]) -> bytes:
    # The sentinel clears what half a command of an earlier client left in the agent's parser.
    messages: list[dict[str, object]] = [{"execute": "guest-sync-delimited", "arguments": {"id": mark}}]
    messages += [{"execute": command} for command in commands]
    return _SENTINEL + b"".join(json.dumps(message).encode() + b"\n" for message in messages)


def _decoded(line: bytes) -> dict[str, object]:
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return reply if isinstance(reply, dict) else {}


def _complaint(reply: dict[str, object]) -> str:
    """What an error reply says, as it may be shown: the guest chose these characters."""
    error = reply.get("error")
    words = error.get("desc") if isinstance(error, dict) else None
    if not isinstance(words, str):
        return "its answer makes no sense"
    return "".join(letter if letter.isprintable() else "?" for letter in words[:200])


async def _refuse_frozen(channel: _Channel, seconds: float) -> None:
    [reply] = await channel.ask("guest-fsfreeze-status", seconds=seconds)
    if reply.get("return") == "frozen":
        raise _AgentError("somebody else has frozen it already")
    if reply.get("return") != "thawed":
        raise _AgentError(_complaint(reply))


async def _freeze(channel: _Channel, seconds: float) -> int:
    [reply] = await channel.ask("guest-fsfreeze-freeze", seconds=seconds)
    count = reply.get("return")
    if not isinstance(count, int):
        raise _AgentError(_complaint(reply))
    return count


async def _thaw(channel: _Channel, seconds: float) -> int:
    """
    Thaw, and prove it by the status; returns how many filesystems had been frozen until now.

    A thaw that is refused by an agent whose status is thawed (both commands can be disabled) is as good as done.
    """
    thaw, status = await channel.ask("guest-fsfreeze-thaw", "guest-fsfreeze-status", seconds=seconds)
    if status.get("return") != "thawed":
        raise _AgentError(_complaint(thaw if "error" in thaw else status))
    count = thaw.get("return")
    return count if isinstance(count, int) else 0


async def _release(path: str, channel: _Channel, guardian: "_Guardian", seconds: float) -> int:
    """Thaw, or have the guardian do it; returns how many filesystems were proved to be frozen until now."""
    if not await guardian.lets_us_thaw():
        await guardian.last_word(seconds)
    try:
        held = await _thaw(channel, seconds)
    except _AgentError as error:
        reason = str(error)
    else:
        guardian.dismiss()
        return held
    if await guardian.last_word(seconds) is None:
        raise ThawUnproven(agent=path, reason=reason)
    return 0


# --- connecting ---------------------------------------------------------------------------------------------------


async def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        with _short(path) as short:
            await asyncio.get_running_loop().sock_connect(connection, short)
    except OSError as error:
        connection.close()
        raise _AgentError(_CONNECT_REASONS.get(error.errno or 0, error.strerror or str(error))) from None
    return connection


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


# --- our side of the guardian ---------------------------------------------------------------------------------------


class _Guardian:
    """
    A running guardian. Closing it without `dismiss` makes it thaw the guest.

    A plain Popen, since asyncio kills its subprocesses when the loop goes, and that is when a guardian is needed.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._said = b""

    @classmethod
    async def start(cls, connection: socket.socket, timeout: float, limit: float) -> "_Guardian":
        """Return when it is on guard; raises _AgentError when it does not get there."""
        control, theirs = socket.socketpair()
        control.setblocking(False)
        with theirs:
            try:
                guardian = cls(_spawn(theirs, connection, timeout, limit), control)
            except OSError as error:
                control.close()
                raise _AgentError(f"the guardian did not start: {error.strerror}") from None
        word = b""
        try:
            word = await guardian._word()
        finally:
            if word != _READY:
                guardian.dismiss()
        if word != _READY:
            raise _AgentError("the guardian did not start")
        return guardian

    def tell(self, word: bytes) -> None:
        """Send a word; a guardian that is gone is noticed when it is needed."""
        _send_word(self._control, word)

    async def lets_us_thaw(self) -> bool:
        """
        Ask it to leave the connection to us.

        False when its limit has passed and it has begun to thaw. True also when it is dead or stopped: then nobody
        else will.
        """
        self.tell(_MAY_WE)
        return await self._word() != _TAKEN

    async def last_word(self, seconds: float) -> int | None:
        """
        Have it thaw, if it has not yet, and wait for its end; `seconds` is what each of its tries may take.

        Returns how many filesystems it thawed, None when it could not.
        """
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            async with asyncio.timeout(THAW_TRIES * seconds + GUARDIAN_SECONDS):
                while said := await asyncio.get_running_loop().sock_recv(self._control, 64):
                    self._said += said
                self._process.wait()
        count = self._said.lstrip(_YOURS + _TAKEN)
        return int(count) if count.isdigit() else None

    def dismiss(self) -> None:
        """End it: there is nothing to thaw. Takes milliseconds, and afterwards the connection is ours alone."""
        self._process.kill()
        self._process.wait()
        self.close()

    def close(self) -> None:
        """Close our end."""
        self._control.close()

    async def _word(self) -> bytes:
        """Its next word; empty when it is gone or silent."""
        with contextlib.suppress(OSError):  # TimeoutError too
            async with asyncio.timeout(GUARDIAN_SECONDS):
                return await asyncio.get_running_loop().sock_recv(self._control, 1)
        return b""


def _spawn(control: socket.socket, connection: socket.socket, timeout: float, limit: float) -> subprocess.Popen[bytes]:
    """Its standard input is the way to us, its standard output the way to the agent."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.Popen(
        [sys.executable or "python3", "-I", "-S", "-c", _GUARDIAN, folder, str(timeout), str(limit)],
        stdin=control.fileno(),
        stdout=connection.fileno(),
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def _send_word(to: socket.socket, word: bytes) -> None:
    with contextlib.suppress(OSError):
        to.send(word)
