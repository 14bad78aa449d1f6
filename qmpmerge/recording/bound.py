"""What a recording leaves out so that it stays within its bound: first what is asked again and again while a job is at work."""

from qmpmerge.recording.entry import Entry

LARGEST = 64 * 1024 * 1024
"""Bytes of one command's recording."""

ASKS = ("query-", "x-debug-query-", "qom-")


class Bound:
    """
    Up to half of it all is kept. From there on, of each question and of its answers, the first one after each step; near the
    end no message at all, so that there is room for our own steps. A message that takes an eighth of it is never kept.

    `messages` and `bytes` are what was left out so far.
    """

    def __init__(self, largest: int = LARGEST) -> None:
        self._largest = largest
        self._written = 0
        self._seen: set[tuple[object, ...]] = set()
        self.messages = self.bytes = 0

    def keeps(self, entry: Entry, size: int) -> bool:
        """Whether the next entry is to be written, which takes so many bytes."""
        is_kept = self._has_room(entry, size)
        if is_kept:
            self._written += size
        else:
            self.messages += 1
            self.bytes += size
        return is_kept

    def _has_room(self, entry: Entry, size: int) -> bool:
        written = self._written + size
        if entry.message is None:
            self._seen.clear()
            return written <= self._largest or entry.kind in ("left-out", "end")
        if size > self._largest // 8 or written > self._largest - self._largest // 8:
            return False
        return written <= self._largest // 2 or self._is_new(entry)

    def _is_new(self, entry: Entry) -> bool:
        if entry.command is None or not entry.command.startswith(ASKS):
            return True
        question = (entry.facts.get("session"), entry.kind, entry.command)
        is_new = question not in self._seen
        self._seen.add(question)
        return is_new
