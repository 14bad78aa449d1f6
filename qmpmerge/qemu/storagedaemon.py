"""
A private qemu-storage-daemon: the engine of offline merges.

It speaks QMP over a socket pair that it inherits, so there is nothing to poll and nothing that another user could reach.
The kernel ends it when we die. Where it is not installed, a QEMU without a machine does the same.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from qmpmerge.errors import ImageUnreadable, SessionLost, ToolMissing
from qmpmerge.qemu import connect
from qmpmerge.qemu.monitor import Monitor

DAEMON = "qemu-storage-daemon"
END_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


@contextlib.asynccontextmanager
async def started(folder: str = "/") -> AsyncIterator["Daemon"]:
    """
    A storage daemon of our own, before it can be spoken to: there are some milliseconds for other work while it starts. At
    the end of the block it flushes, closes its images and is gone. In `folder` relative names begin. Raises ToolMissing,
    ImageUnreadable where there is no such folder.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = _start(theirs.fileno(), folder)
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
    async def session(self) -> AsyncIterator[Monitor]:
        """The session, once it answers."""
        async with connect.opened(self.connection, name=DAEMON, pid=self.pid) as session:
            yield session
            with contextlib.suppress(SessionLost):  # it closes the session as it goes
                await session.execute("quit")


def _start(descriptor: int, folder: str) -> "subprocess.Popen[bytes]":
    import ctypes  # 2 ms, and who only looks at a chain starts no daemon

    libc = ctypes.CDLL(None, use_errno=True)

    def die_with_us() -> None:
        # A daemon that hangs would not hear SIGTERM, and SIGKILL leaves the chain as right as it was.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    for program, *arguments in _commands(descriptor):
        found = _found(program)
        if found is None:
            continue
        try:
            return subprocess.Popen(  # a session of its own: Ctrl-C is for us
                [found, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[descriptor],
                start_new_session=True,
                preexec_fn=die_with_us,
            )
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            if error.filename == folder:
                raise ImageUnreadable(file=folder, reason=error.strerror or str(error)) from None
    raise ToolMissing(program=DAEMON, package="qemu-system-common")


def _found(program: str) -> str | None:
    """Its path: as execvp finds it, but from our own folder, not from that of the images, wherever PATH leads."""
    paths = [os.path.abspath(os.path.join(place, program)) for place in os.get_exec_path()]
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)


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
