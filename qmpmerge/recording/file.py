"""
The file of a recording: how lines get into it, and how large it may be.

Lines are made by a thread, and written by a process: a slow, full or dead disk harms no merge, and no guest waits for it.
What was handed over is with that process within a moment, so a crash of ours loses a line or two at the most.
"""

import queue
import threading
import time

from qmpmerge.recording.bound import LARGEST, Bound
from qmpmerge.recording.entry import Entry
from qmpmerge.recording.writer import Writer

MOST_WAITING = 16 * 1024 * 1024
"""Bytes of messages that may wait for a slow disk; of what comes then the messages are left out."""

SMALL, PAUSE_SECONDS = 16 * 1024, 1.0
"""While a guest is paused no larger message is looked through, unless it is for so long: that would keep us from going on."""

END_SECONDS = 5.0
"""How long a command waits for a disk: at its beginning to open the file, at its end to take what is left."""


class Recording:
    """An open one. `problem` says at the end why that came early, None where it did not."""

    def __init__(self, path: str, largest: int = LARGEST) -> None:
        self.path = path
        self.problem: str | None = None
        self._writer = Writer(path, END_SECONDS)
        self._bound = Bound(largest)
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._is_over = False
        self._taken = self._written = 0
        self._dropped = (0, 0)
        self._told = (0, 0)
        self._calm = threading.Event()
        self._calm.set()
        self._thread = threading.Thread(target=self._write_all, name="recording", daemon=True)
        self._thread.start()

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
        deadline = time.monotonic() + END_SECONDS
        self._entries.put(None)
        self._thread.join(END_SECONDS)
        self.problem = self._writer.leave(deadline, late=f"not all of it was written within {END_SECONDS:g} s") or None

    def _write_all(self) -> None:
        try:
            while (entry := self._entries.get()) is not None:
                if not self._is_over:
                    self._add(entry)
                self._written += len(entry.message or b"")
        finally:
            self._writer.end()

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
            self._writer.write(line)
        except OSError:
            self._is_over = True
