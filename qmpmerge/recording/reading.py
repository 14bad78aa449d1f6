"""
A recording as it is read: the lines of each command that stands in the file.

What was cut off by a crash, or by a bound, is no error: what cannot be read is counted, and all else is there. Lines of a kind
that is not known here are kept as they are.
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from qmpmerge.errors import RecordingUnreadable
from qmpmerge.value import Value

SCHEMA = 1
"""The schema that is understood."""

LARGEST = 512 * 1024 * 1024
"""Bytes of a file that is read: several recordings can stand in one."""

LONGEST_LINE = 64 * 1024 * 1024
"""Bytes; see `monitor.LARGEST_REPLY`."""

LONGEST_SECONDS = 1e9
"""No command takes thirty years."""

DEEPEST = 128
"""Values in values of a message; QEMU's have ten."""

_SHAPES: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "start": {"schema": int},
    "session": {"session": int, "name": str, "greeting": dict},
    "sent": {"session": int, "message": dict},
    "received": {"session": int, "message": dict},
    "step": {"name": str, "text": str},
    "header": {"when": str, "file": str, "header": dict},
    "closed": {"session": int, "reason": str},
    "left-out": {"messages": int, "bytes": int},
    "end": {"verdict": (str, type(None)), "code": (int, type(None))},
}
"""What must stand in a line of each kind, besides others."""


class Line(Value):
    """`seconds` since its recording began; `facts` is all that stands in it."""

    seconds: float
    kind: str
    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]


class Run(Value):
    """
    The lines of one command, in their order. `start` and `end` are the facts of those lines, empty where the file has been cut
    off before the end, or has none of the beginning.
    """

    lines: tuple[Line, ...]

    @property
    def start(self) -> Mapping[str, Any]:
        """What the recording says of itself."""
        return next((line.facts for line in self.lines if line.kind == "start"), {})

    @property
    def end(self) -> Mapping[str, Any]:
        """What the command came to."""
        return next((line.facts for line in reversed(self.lines) if line.kind == "end"), {})

    @property
    def seconds(self) -> float:
        """How long it took, as far as that was recorded."""
        return self.lines[-1].seconds


class Recording(Value):
    """A file of recordings. `unread` counts the lines that are none, or not whole."""

    file: str
    runs: tuple[Run, ...]
    unread: int


def read(file: str) -> Recording:
    """The recordings in a file, in the order in which they began. Raises RecordingUnreadable."""
    try:
        with _opened(file) as stream:
            if (size := os.fstat(stream.fileno()).st_size) > LARGEST:
                raise RecordingUnreadable(file=file, reason=f"it has {size} bytes, more than any recording")
            return _gathered(file, _lines(stream))
    except OSError as error:
        raise RecordingUnreadable(file=file, reason=error.strerror or str(error)) from None
    except ValueError:  # a name with a zero in it
        raise RecordingUnreadable(file=file, reason="that is no file name") from None


def _opened(file: str) -> BinaryIO:
    """A pipe or a device may have no end, and keep us waiting."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise RecordingUnreadable(file=file, reason="it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")
    return os.fdopen(descriptor, "rb")


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """No more than `LARGEST` in all, should the file grow meanwhile."""
    left = LARGEST
    while left > 0 and (line := stream.readline(LONGEST_LINE)):
        left -= len(line)
        yield line


def _gathered(file: str, lines: Iterable[bytes]) -> Recording:
    runs: dict[str, list[Line]] = {}
    unread = 0
    for text in lines:
        facts = _facts(text)
        if facts is None:
            unread += bool(text.strip())
            continue
        line = Line(float(facts["t"]), facts["kind"], facts)
        if line.kind == "start" and line["schema"] != SCHEMA:
            raise RecordingUnreadable(file=file, reason=f"it has schema {line['schema']}, and {SCHEMA} is understood")
        runs.setdefault(str(facts.get("run", "")), []).append(line)
    if not runs:
        raise RecordingUnreadable(file=file, reason="it is no recording" if unread else "it is empty")
    return Recording(file, tuple(Run(tuple(lines)) for lines in runs.values()), unread)


def _facts(text: bytes) -> Mapping[str, Any] | None:
    """None for what is no line of a recording."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if is_deep(facts):
        return None
    if not (isinstance(facts, dict) and _is_moment(facts.get("t")) and isinstance(facts.get("kind"), str)):
        return None
    shape = _SHAPES.get(facts["kind"], {})
    if not all(isinstance(facts.get(name), kind) for name, kind in shape.items()):
        return None
    return facts if facts["kind"] not in ("sent", "received") or _is_message(facts["kind"], facts["message"]) else None


def is_deep(value: Any) -> bool:
    """Whether it is nested deeper than any message is, and than is looked through here."""
    level = [value]
    for _ in range(DEEPEST):
        if not level:
            return False
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return bool(level)


def _is_moment(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LONGEST_SECONDS


def _is_message(kind: str, message: Mapping[str, Any]) -> bool:
    if kind == "sent":
        is_named = isinstance(message.get("execute", message.get("exec-oob")), str)
        return is_named and isinstance(message.get("arguments", {}), dict)
    if "event" in message:
        return isinstance(message["event"], str) and isinstance(message.get("data", {}), dict)
    return "return" in message or isinstance(message.get("error"), dict)
