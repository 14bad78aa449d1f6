"""
The guardian: a process that thaws the guest when we die, or when we are stopped for longer than a limit. Both its sides.

A small process of its own session, started before the freeze, which inherits the connection (an agent serves one client
at a time). Two processes that read one socket would take each other's replies, so before we thaw we ask the guardian,
which decides.

Nothing helps when both are killed at once, as ``systemctl kill --signal=KILL`` or the end of a container does.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys

from qmpmerge.guest import agent

GUARDIAN_SECONDS = 10.0
"""How long we wait for a word of the guardian before we go on without it."""

THAW_TRIES = 3
"""How often the guardian tries."""

# One-byte words. Ours to the guardian:
_FROZEN = b"f"  # the guest is frozen, the limit counts from now
_MAY_WE = b"?"  # the block is over: may we thaw?
# The guardian's to us, followed by the number of filesystems that it thawed if it did:
_READY = b"r"  # it holds the connection and ignores signals
_YOURS = b"y"  # thaw
_TAKEN = b"g"  # leave the connection alone: it is thawing

# Run without site-packages, to be small and quick: neither this module nor what it imports needs them.
_GUARDIAN = """\
# qmpmerge: thaws the guest if qmpmerge dies
import asyncio, sys
sys.path.append(sys.argv[1])
from qmpmerge.guest import freeze_child
asyncio.run(freeze_child.guard(0, 1, float(sys.argv[2]), float(sys.argv[3])))
"""


# --- our side -----------------------------------------------------------------------------------------------------


class Guardian:
    """
    A running guardian. Closing it without `dismiss` makes it thaw the guest.

    A plain Popen, since asyncio kills its subprocesses when the loop goes, and that is when a guardian is needed.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._said = b""

    @classmethod
    async def start(cls, connection: socket.socket, timeout: float, limit: float) -> "Guardian":
        """Return when it is on guard; raises AgentError when it does not get there."""
        control, theirs = socket.socketpair()
        control.setblocking(False)
        with theirs:
            try:
                guardian = cls(_spawn(theirs, connection, timeout, limit), control)
            except OSError as error:
                control.close()
                raise agent.AgentError(f"the guardian did not start: {error.strerror}") from None
        word = b""
        try:
            word = await guardian._word()
        finally:
            if word != _READY:
                guardian.dismiss()
        if word != _READY:
            raise agent.AgentError("the guardian did not start")
        return guardian

    def guest_is_frozen(self) -> None:
        """Tell it that the limit counts from now; a guardian that is gone is noticed when it is needed."""
        _send_word(self._control, _FROZEN)

    async def lets_us_thaw(self) -> bool:
        """
        Ask it to leave the connection to us.

        False when its limit has passed and it has begun to thaw. True also when it is dead or stopped: then nobody
        else will.
        """
        _send_word(self._control, _MAY_WE)
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
    folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return subprocess.Popen(
        [sys.executable or "python3", "-I", "-S", "-c", _GUARDIAN, folder, str(timeout), str(limit)],
        stdin=control.fileno(),
        stdout=connection.fileno(),
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


# --- its side -----------------------------------------------------------------------------------------------------


async def guard(control: int, connection: int, timeout: float, limit: float) -> None:
    """
    Be the guardian, in a process of its own: see this module's docstring.

    `control` and `connection` are descriptors of sockets: to the process that is guarded, and to the guest agent.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=control) as guarded, socket.socket(fileno=connection) as to_agent:
        guarded.setblocking(False)
        _send_word(guarded, _READY)
        await _until_needed(guarded, timeout, limit)
        _send_word(guarded, _TAKEN)
        for _ in range(THAW_TRIES):
            with contextlib.suppress(agent.AgentError):
                thawed = await agent.thaw(agent.Channel(to_agent), timeout)
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


# --- between them -------------------------------------------------------------------------------------------------


def _send_word(to: socket.socket, word: bytes) -> None:
    with contextlib.suppress(OSError):
        to.send(word)
