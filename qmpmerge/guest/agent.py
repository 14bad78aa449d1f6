"""
The QEMU guest agent's protocol, on the UNIX socket of its channel on the host.

An agent serves one client at a time and answers strictly in order. What can be asked of it here is what a freeze of the
guest's filesystems takes. Everything raises AgentError; what that means for the guest is known to the caller only.
"""

import asyncio
import errno
import json
import os
import socket

from qmpmerge import sockets

# Of the agent's replies that we ask for none has 200 bytes; the guest may send what it likes.
_LONGEST_LINE = 64 * 1024

_SENTINEL = b"\xff"

_CONNECT_REASONS = {
    errno.ENOENT: "there is no such socket",
    errno.ECONNREFUSED: "nobody listens there: it is no socket, or its QEMU is gone",
    errno.EACCES: "no permission to connect",
    # The backlog is full of clients that wait for the one that is served; asyncio turns EAGAIN into EINVAL.
    errno.EAGAIN: "other clients are waiting already",
    errno.EINVAL: "other clients are waiting already",
}


class AgentError(Exception):
    """Why the agent did not do as asked, in words for AgentFailed and ThawUnproven."""


class Channel:
    """
    The agent's protocol on a connected socket.

    Reads only while a reply is awaited: what a reader kept for later would be missing in the dead man's switch.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = b""
        connection.setblocking(False)

    async def ask(self, *commands: str, seconds: float) -> list[dict[str, object]]:
        """
        Synchronise, run the commands, return their replies in order.

        All is written before anything is read: an agent that is busy, with a freeze that takes long, say, comes to
        these commands afterwards, even if nobody waits for them any more. Raises AgentError.
        """
        mark = int.from_bytes(os.urandom(4), "big")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                await loop.sock_sendall(self._connection, _request(mark, commands))
                await self._skip_to(mark)
                return [_decoded(await self._line()) for _ in commands]
        except TimeoutError:
            raise AgentError(f"no answer within {seconds:g} s") from None
        except OSError as error:
            raise AgentError(error.strerror or str(error)) from None

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
                raise AgentError("the connection was closed, QEMU may be gone")
            self._unread = self._unread[-_LONGEST_LINE:] + received
        line, _, self._unread = self._unread.partition(b"\n")
        return line


async def is_frozen(channel: Channel, seconds: float) -> bool:
    """Whether the agent holds the guest's filesystems frozen, whoever asked for it."""
    [reply] = await channel.ask("guest-fsfreeze-status", seconds=seconds)
    if reply.get("return") not in ("frozen", "thawed"):
        raise AgentError(_complaint(reply))
    return reply.get("return") == "frozen"


async def freeze(channel: Channel, seconds: float) -> int:
    """Freeze them all; returns how many were frozen, which may be 0."""
    [reply] = await channel.ask("guest-fsfreeze-freeze", seconds=seconds)
    count = _count(reply)
    if count is None:
        raise AgentError(_complaint(reply))
    return count


async def thaw(channel: Channel, seconds: float) -> int:
    """
    Thaw, and prove it by the status; returns how many filesystems had been frozen until now.

    A thaw that is refused by an agent whose status is thawed (both commands can be disabled) is as good as done.
    """
    reply, status = await channel.ask("guest-fsfreeze-thaw", "guest-fsfreeze-status", seconds=seconds)
    if status.get("return") != "thawed":
        raise AgentError(_complaint(reply if "error" in reply else status))
    return _count(reply) or 0


# --- connecting ---------------------------------------------------------------------------------------------------


async def connect(path: str) -> socket.socket:
    """Connect to the agent's channel; says nothing about whether an agent runs in the guest."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        with sockets.short(path) as short:
            await asyncio.get_running_loop().sock_connect(connection, short)
    except OSError as error:
        connection.close()
        raise AgentError(_CONNECT_REASONS.get(error.errno or 0, error.strerror or str(error))) from None
    return connection


# --- lines of JSON ------------------------------------------------------------------------------------------------


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


def _count(reply: dict[str, object]) -> int | None:
    """How many filesystems it says; None where that is no such number."""
    count = reply.get("return")
    return count if type(count) is int and 0 <= count < 2**64 else None


def _complaint(reply: dict[str, object]) -> str:
    """What an error reply says, as it may be shown: the guest chose these characters."""
    error = reply.get("error")
    words = error.get("desc") if isinstance(error, dict) else None
    if not isinstance(words, str):
        return "its answer makes no sense"
    return "".join(letter if letter.isprintable() else "?" for letter in words[:200])
