"""
A private qemu-storage-daemon: the engine of offline merges.

It speaks QMP over a socket pair that it inherits, so there is nothing to poll and nothing that another user could reach.
The kernel ends it when we die. Where it is not installed, a QEMU without a machine does the same.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from qmpmerge.errors import SessionLost, ToolMissing
from qmpmerge.qemu import connect
from qmpmerge.qemu.monitor import Monitor, Trace

DAEMON = "qemu-storage-daemon"
END_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


@contextlib.asynccontextmanager
async def started() -> AsyncIterator["Daemon"]:
    """
    A storage daemon of our own, before it can be spoken to: there are some milliseconds for other work while it starts. At
    the end of the block it flushes, closes its images and is gone. Raises ToolMissing.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = _start(theirs.fileno())
        theirs.close()
        try:
            yield Daemon(process.pid, ours)
        finally:
            await _end(process)


@dataclass
class Daemon:
    """A daemon that has been started, and our end of the connection to it."""

    pid: int
    connection: socket.socket

    @contextlib.asynccontextmanager
    async def session(self, *, trace: Trace | None = None) -> AsyncIterator[Monitor]:
        """The session, once it answers."""
        async with connect.opened(self.connection, name=DAEMON, pid=self.pid, trace=trace) as session:
            yield session
            with contextlib.suppress(SessionLost):  # it closes the session as it goes
                await session.execute("quit")


def _start(descriptor: int) -> "subprocess.Popen[bytes]":
    libc = ctypes.CDLL(None, use_errno=True)

    def die_with_us() -> None:
        # A daemon that hangs would not hear SIGTERM, and SIGKILL leaves the chain as right as it was.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    for command in _commands(descriptor):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            return subprocess.Popen(  # a session of its own: Ctrl-C is for us
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[descriptor],
                start_new_session=True,
                preexec_fn=die_with_us,
            )
    raise ToolMissing(program=DAEMON, package="qemu-system-common")


def _commands(descriptor: int) -> Iterator[list[str]]:
    """What does, best first."""
    chardev = f"socket,id=m,fd={descriptor},server=off"
    yield [DAEMON, "--chardev", chardev, "--monitor", "m"]
    machine = ["-M", "none", "-S", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    for system in dict.fromkeys((f"qemu-system-{os.uname().machine}", "qemu-system-x86_64")):
        yield [system, *machine, "-chardev", chardev, "-mon", "m,mode=control"]


async def _end(process: "subprocess.Popen[bytes]") -> None:
    """Wait until it is gone; it is told to go by then, or its session ended. SIGKILL loses nothing that was promised."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.to_thread(process.wait, END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
