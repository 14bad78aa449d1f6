"""
A private qemu-storage-daemon: the engine of offline merges.

It speaks QMP over a socket pair that it inherits, so there is nothing to poll and nothing that another user could reach.
The kernel ends it when we die. Where it is not installed, a QEMU without a machine does the same.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator

from qmpmerge import monitor
from qmpmerge.errors import SessionLost, ToolMissing
from qmpmerge.monitor import Monitor, Trace

END_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


@contextlib.asynccontextmanager
async def running(*, trace: Trace | None = None) -> AsyncIterator[Monitor]:
    """
    A session with a storage daemon of our own; at the end of the block it flushes, closes its images and is gone.

    Raises ToolMissing.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = _start(theirs)
        except BaseException:
            ours.close()
            raise
    try:
        async with monitor.opened(ours, name="qemu-storage-daemon", pid=process.pid, trace=trace) as session:
            yield session
            with contextlib.suppress(SessionLost):  # it closes the session as it goes
                await session.execute("quit")
    finally:
        await _end(process)


def _start(connection: socket.socket) -> "subprocess.Popen[bytes]":
    libc = ctypes.CDLL(None, use_errno=True)

    def die_with_us() -> None:
        # A daemon that hangs would not hear SIGTERM, and SIGKILL leaves the chain as right as it was.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(  # a session of its own: Ctrl-C is for us
        _command(connection.fileno()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[connection.fileno()],
        start_new_session=True,
        preexec_fn=die_with_us,
    )


def _command(descriptor: int) -> list[str]:
    chardev = f"socket,id=m,fd={descriptor},server=off"
    daemon = shutil.which("qemu-storage-daemon")
    if daemon is not None:
        return [daemon, "--chardev", chardev, "--monitor", "m"]
    system = shutil.which(f"qemu-system-{os.uname().machine}") or shutil.which("qemu-system-x86_64")
    if system is None:
        raise ToolMissing(program="qemu-storage-daemon", package="qemu-system-common")
    machine = ["-M", "none", "-S", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    return [system, *machine, "-chardev", chardev, "-mon", "m,mode=control"]


async def _end(process: "subprocess.Popen[bytes]") -> None:
    """Wait until it is gone; it is told to go by then, or its session ended. SIGKILL loses nothing that was promised."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.to_thread(process.wait, END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
