"""The commands of a recording with what QEMU answered, and its events, in the order of the wire."""

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qmpmerge.recording.reading import Line
from qmpmerge.value import Value

QUESTIONS = ("query-", "x-debug-query-", "qom-list", "qom-get")
"""How commands begin that change nothing."""


@dataclass
class Exchange:
    """
    A command of one session, sent at `at` seconds. `answer` is None where the recording has none, as are when and in which line
    it came. Lines are counted from 0 in what was `paired`.
    """

    session: int
    name: str
    arguments: Mapping[str, Any]
    at: float
    answer: Mapping[str, Any] | None = None
    answered: float | None = None
    line: int = 0
    answer_line: int | None = None

    @property
    def is_question(self) -> bool:
        """Whether nothing was changed by it; of other clients' `info` of the human monitor neither."""
        line = str(self.arguments.get("command-line", "")) if self.name == "human-monitor-command" else ""
        return self.name.startswith(QUESTIONS) or line.startswith("info ")

    @property
    def seconds(self) -> float | None:
        """How long its answer took."""
        return None if self.answered is None else max(0.0, self.answered - self.at)

    @property
    def error(self) -> str | None:
        """Why QEMU refused it."""
        error = (self.answer or {}).get("error")
        return None if error is None else str(error.get("desc", error))


class Event(Value):
    """One of QEMU's, as it came; `line` is counted as there."""

    session: int
    at: float
    line: int
    message: Mapping[str, Any]


Entry = Exchange | Event | Line


def paired(lines: Iterable[Line]) -> list[Entry]:
    """
    Messages as exchanges, at the place of the command, and as events; all other lines as they are.

    A command without an id is answered in its turn.
    """
    told: list[Entry] = []
    waiting: dict[tuple[int, str], deque[Exchange]] = {}
    for number, line in enumerate(lines):
        if line.kind not in ("sent", "received"):
            told.append(line)
            continue
        message = line["message"]
        key = (line["session"], json.dumps(message.get("id")))
        if line.kind == "sent":
            name = message.get("execute", message.get("exec-oob"))
            sent = Exchange(line["session"], name, message.get("arguments", {}), line.seconds, line=number)
            waiting.setdefault(key, deque()).append(sent)
            told.append(sent)
        elif "event" in message:
            told.append(Event(line["session"], line.seconds, number, message))
        elif waiting.get(key):
            exchange = waiting[key].popleft()
            exchange.answer = {name: value for name, value in message.items() if name != "id"}
            exchange.answered, exchange.answer_line = line.seconds, number
    return told
