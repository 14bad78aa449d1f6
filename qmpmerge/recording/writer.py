"""
Writes lines to a file by a process of its own, `writer_child`.

Whoever is in a system call of a disk that hangs can neither go on nor be killed, and keeps all that he has open: so that is not
us, and nothing of ours is open there.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time

from qmpmerge.errors import RecordingUnwritable
from qmpmerge.recording import writer_child

MOMENT_SECONDS = 0.2
"""How long its end is waited for once it has done all, or hangs."""


class Writer:
    """One that has opened its file; to be ended with `leave`."""

    def __init__(self, path: str, seconds: float) -> None:
        """Raises RecordingUnwritable where the file is not taken, or not open after so many seconds."""
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = _spawn(theirs, path)
        except (OSError, ValueError) as error:
            self._socket.close()
            raise RecordingUnwritable(file=path, reason=getattr(error, "strerror", None) or str(error)) from None
        problem = self._reply(time.monotonic() + seconds, late=f"it could not be opened within {seconds:g} s")
        if problem:
            self._close()
            raise RecordingUnwritable(file=path, reason=problem)
        self._socket.setblocking(True)

    def write(self, line: bytes) -> None:
        """Hand it over; waits while the disk takes nothing. Raises OSError where nothing is taken any more."""
        self._socket.sendall(line, socket.MSG_NOSIGNAL)

    def end(self) -> None:
        """Nothing more will be written."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def leave(self, deadline: float, *, late: str) -> str:
        """
        Wait until all is written, until `deadline` by the monotonic clock at the most; then it is alone, and whoever waits in
        `write` goes on. Returns what went wrong, `late` where not all is written by then, "" for nothing.
        """
        problem = self._reply(deadline, late=late)
        self._close()
        return problem

    def _reply(self, deadline: float, *, late: str) -> str:
        reply = b""
        try:
            while not reply.endswith(b"\n"):
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
                if not (part := self._socket.recv(4096)):
                    return "the process that writes it has ended"
                reply += part
        except OSError as error:
            return late if isinstance(error, TimeoutError) else str(error)
        return reply.decode().strip()

    def _close(self) -> None:
        """It ends within a moment, unless it hangs."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(MOMENT_SECONDS)


def _spawn(theirs: socket.socket, path: str) -> "subprocess.Popen[bytes]":
    script = os.path.abspath(writer_child.__file__)
    return subprocess.Popen(
        [sys.executable or "python3", "-I", "-S", script, path],
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us
    )
