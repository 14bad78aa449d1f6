"""
The file of a recording: who may have it, how lines get into it, and how large it may be.

Lines are written by a thread, one system call each: a slow, full or dead disk harms no merge, and no guest waits for it.
What was handed over is written within a moment, so a crash of ours loses a line or two at the most.
"""

import errno
import os
import queue
import stat
import threading

from qmpmerge.errors import RecordingUnwritable
from qmpmerge.recording.entry import Entry

BEGINS = b'{"run": "'
"""How each line of a recording begins: a file that does not is not ours to write to."""

LARGEST = 64 * 1024 * 1024
"""Bytes of one recording."""

END_SECONDS = 5.0
"""How long a command waits at its end for a disk that does not take what is left."""


class Recording:
    """An open one. `problem` says why it has ended early, None while it has not."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problem: str | None = None
        self._descriptor = _opened(path)
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._calm = threading.Event()
        self._calm.set()
        self._writer = threading.Thread(target=self._write_all, name="recording", daemon=True)
        self._writer.start()

    def take(self, entry: Entry) -> None:
        """See `recorder.Taker`."""
        self._entries.put(entry)

    def hurry(self, is_on: bool) -> None:
        """While a guest waits the thread does nothing that keeps us from going on."""
        (self._calm.clear if is_on else self._calm.set)()

    def close(self) -> None:
        """Write what is left, as far as the disk takes it in time."""
        self._entries.put(None)
        self._writer.join(END_SECONDS)
        if self._writer.is_alive():
            self.problem = f"not all of it was written within {END_SECONDS:g} s"

    def _write_all(self) -> None:
        try:
            while (entry := self._entries.get()) is not None:
                if self.problem is None:
                    self._write(entry.line)
        finally:
            os.close(self._descriptor)

    def _write(self, line: bytes) -> None:
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.problem = error.strerror or str(error)


def _opened(path: str) -> int:
    """To add to what is there. Raises RecordingUnwritable."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        reason = "it is a symlink" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise RecordingUnwritable(file=path, reason=reason) from None
    try:
        obstacle = _obstacle(descriptor)
    except OSError as error:
        obstacle = error.strerror or str(error)
    if obstacle is not None:
        os.close(descriptor)
        raise RecordingUnwritable(file=path, reason=obstacle)
    return descriptor


def _obstacle(descriptor: int) -> str | None:
    """What speaks against adding to this file. Raises OSError."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    if status.st_uid != os.geteuid():
        return "it belongs to another user"
    if not status.st_size:
        return None
    if os.pread(descriptor, len(BEGINS), 0) != BEGINS:
        return "it is no recording"
    if os.pread(descriptor, 1, status.st_size - 1) != b"\n":  # of a crash
        os.write(descriptor, b"\n")
    return None
