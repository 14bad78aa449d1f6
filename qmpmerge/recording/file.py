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
from qmpmerge.recording.bound import LARGEST, Bound
from qmpmerge.recording.entry import Entry

BEGINS = b'{"run": "'
"""How each line of a recording begins: a file that does not is not ours to write to."""

MOST_WAITING = 16 * 1024 * 1024
"""Bytes of messages that may wait for a slow disk; of what comes then the messages are left out."""

SMALL, PAUSE_SECONDS = 16 * 1024, 1.0
"""While a guest is paused no larger message is looked through, unless it is for so long: that would keep us from going on."""

END_SECONDS = 5.0
"""How long a command waits at its end for a disk that does not take what is left."""


class Recording:
    """An open one. `problem` says why it has ended early, None while it has not."""

    def __init__(self, path: str, largest: int = LARGEST) -> None:
        self.path = path
        self.problem: str | None = None
        self._descriptor = _opened(path)
        self._bound = Bound(largest)
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._is_over = False
        self._taken = self._written = 0
        self._dropped = (0, 0)
        self._told = (0, 0)
        self._calm = threading.Event()
        self._calm.set()
        self._writer = threading.Thread(target=self._write_all, name="recording", daemon=True)
        self._writer.start()

    def take(self, entry: Entry) -> None:
        """See `recorder.Taker`."""
        size = len(entry.message or b"")
        if size and self._taken - self._written + size > MOST_WAITING:
            self._dropped = self._dropped[0] + 1, self._dropped[1] + size
            return
        if size:  # so it is counted by one thread alone
            self._taken += size
        self._entries.put(entry)

    def hurry(self, is_on: bool) -> None:
        """See `recorder.Taker`."""
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
                if not self._is_over:
                    self._add(entry)
                self._written += len(entry.message or b"")
        finally:
            os.close(self._descriptor)

    def _add(self, entry: Entry) -> None:
        if entry.message is None:
            self._tell_what_was_left_out(entry)
        elif len(entry.message) > SMALL:
            self._calm.wait(PAUSE_SECONDS)
        line = entry.line
        if self._bound.keeps(entry, len(line)):
            self._write(line)

    def _tell_what_was_left_out(self, entry: Entry) -> None:
        """Before our next own line."""
        messages, size = self._dropped
        left_out = self._bound.messages + messages, self._bound.bytes + size
        if left_out != self._told:
            known, self._told = self._told, left_out
            facts = {"messages": left_out[0] - known[0], "bytes": left_out[1] - known[1]}
            self._write(Entry(entry.run, entry.seconds, "left-out", facts).line)

    def _write(self, line: bytes) -> None:
        try:
            while line:  # a full disk takes a part before it says so
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            self._is_over, self.problem = True, error.strerror or str(error)


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
