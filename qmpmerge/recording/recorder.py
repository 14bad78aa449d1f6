"""The watcher that makes entries of what it sees, and hands each to whoever takes them."""

import itertools
import os
import platform
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol

from qmpmerge import __version__
from qmpmerge.errors import Error
from qmpmerge.processes import proc
from qmpmerge.recording.entry import Entry

SCHEMA = 1


class Taker(Protocol):
    """Takes entries. That takes no time, and raises nothing."""

    def take(self, entry: Entry) -> None:
        """The next one."""

    def hurry(self, is_on: bool) -> None:
        """See `watch.Watcher`."""


class Recorder:
    """See `watch.Watcher`."""

    def __init__(self, takers: Sequence[Taker]) -> None:
        self._takers = takers
        self._run = os.urandom(4).hex()
        self._begun = time.monotonic()
        self._sessions = itertools.count(1)
        self._pauses = 0

    def start(self, command: Sequence[str] | None) -> None:
        """The first entry; `command` is the line that was typed, None where a program uses the library."""
        wall = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        system = os.uname()
        facts = {
            "wall": wall,
            "schema": SCHEMA,
            "qmpmerge": __version__,
            "python": platform.python_version(),
            "system": f"{system.sysname} {system.release} {system.machine}",
            "command": command,
            "pid": os.getpid(),
        }
        self.enter("start", facts)

    def end(self, verdict: str | None, code: int | None, **facts: object) -> None:
        """The last one."""
        self.enter("end", {"verdict": verdict, "code": code, **facts})

    def end_with(self, error: BaseException, verdict: str | None = None, code: int | None = None) -> None:
        """The same of what was raised; the two are those of what is no `Error`."""
        if isinstance(error, Error):
            self.end(error.verdict, error.exit_code, error=error.document)
        else:
            lines = "".join(traceback.format_exception(error)).splitlines()
            self.end(verdict, code, error={"name": type(error).__name__, "message": str(error), "traceback": lines})

    def hurry(self, is_on: bool) -> None:
        """As there; of several guests until the last one runs again."""
        was, self._pauses = self._pauses, self._pauses + (1 if is_on else -1)
        if not was or not self._pauses:
            for taker in self._takers:
                taker.hurry(is_on)

    def connected(self, name: str, pid: int | None) -> "Wire":
        """As there."""
        return Wire(self, next(self._sessions), name, pid)

    def step(self, name: str, text: str, facts: Mapping[str, object]) -> None:
        """As there."""
        self.enter("step", {"name": name, "text": text, **facts})

    def header(self, when: str, file: str, header: Mapping[str, object]) -> None:
        """As there."""
        self.enter("header", {"when": when, "file": file, "header": header})

    def enter(
        self, kind: str, facts: Mapping[str, object], message: bytes | None = None, command: str | None = None
    ) -> None:
        """Hand on an entry of now."""
        entry = Entry(self._run, time.monotonic() - self._begun, kind, facts, message, command)
        for taker in self._takers:
            taker.take(entry)


class Wire:
    """See `watch.Wire`."""

    def __init__(self, recorder: Recorder, number: int, name: str, pid: int | None) -> None:
        self._recorder = recorder
        self._number = number
        self._name = name
        self._pid = pid
        self._asked: dict[str | None, str] = {}
        self._has_begun = self._is_closed = False

    def sent(self, message: bytes, command: str, id: str | None) -> None:
        """As there."""
        self._asked[id] = command
        self._recorder.enter("sent", {"session": self._number}, message, command)

    def received(self, message: bytes, id: str | None) -> None:
        """As there."""
        if self._has_begun:
            self._recorder.enter("received", {"session": self._number}, message, self._asked.pop(id, None))
            return
        self._has_begun = True
        line = proc.read_text(f"/proc/{self._pid}/cmdline").split("\0")[:-1] if self._pid is not None else []
        facts = {"session": self._number, "name": self._name, "pid": self._pid, "command_line": line or None}
        self._recorder.enter("session", facts, message)

    def closed(self, reason: str) -> None:
        """As there; once."""
        if self._has_begun and not self._is_closed:
            self._is_closed = True
            self._recorder.enter("closed", {"session": self._number, "reason": reason})
