"""
QEMU's part of a recording: what it answers to whom.

What changes something, an act, must come as it came when it was recorded, in the same order and with the same arguments.
Questions may be asked in any order, and however often: each is answered as it was between these two acts, one answer after the
other, whoever asks, the last of them again and again; where there is none, as it was earlier, else as it was later. So a client
that looks more often than the one that was recorded, or less often, or by a new connection each time, comes to the same end.

The turns that merges of ours take (`qemu.mutex`) have other names each time: they are given out here.
"""

import contextlib
import itertools
import json
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from qmpmerge.recording import phrases
from qmpmerge.recording.exchanges import Event, Exchange, paired
from qmpmerge.recording.reading import Run
from qmpmerge.recording.secrets import without
from qmpmerge.value import Value

Arguments = Mapping[str, Any]

_OF_OUR_PROCESS = re.compile(r"(?<=qmpmerge-throttle-)\d+")
_OF_SESSIONS = frozenset({"session", "sent", "received"})

CAPABILITIES = "qmp_capabilities"


class Answer(Value):
    """What goes over the wire: events, `message`, events. None for a command that QEMU has not answered any more."""

    before: tuple[Mapping[str, Any], ...]
    message: Mapping[str, Any] | None
    after: tuple[Mapping[str, Any], ...]


class Divergence(Value):
    """A command that the recording does not have where it came, and what it has there: None for nothing any more."""

    sent: str
    expected: str | None

    def __str__(self) -> str:
        has = f"the recording has `{self.expected}`" if self.expected else "the recording has nothing more"
        return f"`{self.sent}` was sent where {has}"


class Script:
    """
    The sessions with the QEMU that is called `name`, of all these commands. `greeting` is what it says first, `acts` are the
    commands that change something, of which `played` have come; `diverged` is the first that came out of turn. `unknown` are
    questions that the recording does not answer, `elsewhere` those that it answers in another act alone.
    """

    def __init__(self, runs: Iterable[Run], name: str) -> None:
        self.greeting: Mapping[str, Any] = {}
        self.acts: list[Exchange] = []
        self.played = 0
        self.diverged: Divergence | None = None
        self.unknown: dict[str, None] = {}
        self.elsewhere: dict[str, None] = {}
        self._questions: list[dict[str, list[Exchange]]] = [{}]
        self._events: deque[Event] = deque()
        self._answers: list[int] = []
        self._given: dict[str, int] = {}
        self._turns: dict[str, Any] = {}
        self._asked: set[tuple[int, str]] = set()
        self._gather(runs, name)

    def _gather(self, runs: Iterable[Run], name: str) -> None:
        """Lines of several commands are counted one after the other."""
        begin = 0
        for run in runs:
            sessions = {line["session"] for line in run.lines if line.kind == "session" and line["name"] == name}
            lines = [line for line in run.lines if line.kind in _OF_SESSIONS and line["session"] in sessions]
            for entry in paired(lines):
                if isinstance(entry, Event):
                    self._events.append(replace(entry, line=begin + entry.line))
                elif isinstance(entry, Exchange):
                    self._add(entry, begin)
                elif entry.kind == "session":
                    self.greeting = self.greeting or entry["greeting"]
            begin += len(lines)
        self._answers.sort()

    def _add(self, exchange: Exchange, begin: int) -> None:
        exchange.line += begin
        if exchange.answer_line is not None:
            exchange.answer_line += begin
            self._answers.append(exchange.answer_line)
        if exchange.name == CAPABILITIES or _is_turn(exchange.name, exchange.arguments):
            return
        if not exchange.is_question:
            self.acts.append(exchange)
            self._questions.append({})
        elif exchange.answer is not None:
            self._questions[-1].setdefault(_key(exchange.name, exchange.arguments), []).append(exchange)

    def answer(self, command: str, arguments: Arguments) -> Answer:
        """What QEMU says to it."""
        if command == CAPABILITIES:
            return Answer((), {"return": {}}, ())
        if _is_turn(command, arguments):
            return Answer((), self._turn(command, arguments), ())
        if Exchange(0, command, arguments, 0.0).is_question:
            return self._told(command, arguments)
        return self._act(command, arguments)

    def event(self) -> Mapping[str, Any] | None:
        """The next one that came before anything else was done: for a client that says nothing, and waits."""
        acts = self.acts[self.played : self.played + 1]
        if self._events and all(self._events[0].line < act.line for act in acts):
            return self._events.popleft().message
        return None

    def told(self, command: str) -> Iterator[Any]:
        """What QEMU has answered to a question, of the acts from now on, the first answer first."""
        for keys in self._questions[self.played :]:
            asked = [one for key, exchanges in keys.items() if json.loads(key)[0] == command for one in exchanges]
            for exchange in sorted(asked, key=lambda one: one.line):
                yield (exchange.answer or {}).get("return")

    @property
    def unplayed(self) -> list[str]:
        """The acts that have not come yet."""
        return [shown(exchange.name, exchange.arguments) for exchange in self.acts[self.played :]]

    @property
    def unasked(self) -> list[str]:
        """Questions that nobody has asked in the act in which they were asked when it was recorded."""
        keys = [key for act, keys in enumerate(self._questions) for key in keys if (act, key) not in self._asked]
        return list(dict.fromkeys(str(json.loads(key)[0]) for key in keys))

    def _act(self, command: str, arguments: Arguments) -> Answer:
        expected = self.acts[self.played] if self.played < len(self.acts) else None
        if expected is not None and _is_same(expected, command, arguments):
            self.played += 1
            self._given.clear()
            return self._as_recorded(expected)
        if phrases.is_of_flush(arguments):
            return Answer((), self._flush(command, arguments), ())
        divergence = Divergence(shown(command, arguments), next(iter(self.unplayed), None))
        self.diverged = self.diverged or divergence
        return Answer((), _refusal(f"replay: {divergence}"), ())

    def _flush(self, command: str, arguments: Arguments) -> Mapping[str, Any]:
        """Whether a flush can be asked for is tried by some commands only, and leaves all as it was."""
        for exchange in self.acts:
            if exchange.answer is not None and _is_same(exchange, command, arguments):
                return exchange.answer
        return self._unknown(command)

    def _told(self, command: str, arguments: Arguments) -> Answer:
        key = _key(command, arguments)
        told = self._questions[self.played].get(key)
        if told is None:
            return Answer((), self._told_elsewhere(key, command), ())
        self._asked.add((self.played, key))
        number = self._given.get(key, 0)
        self._given[key] = number + 1
        if number >= len(told):
            return Answer((), told[-1].answer, ())
        return self._as_recorded(told[number])

    def _told_elsewhere(self, key: str, command: str) -> Mapping[str, Any] | None:
        earlier = (keys[key][-1] for keys in reversed(self._questions[: self.played]) if key in keys)
        later = (keys[key][0] for keys in self._questions[self.played + 1 :] if key in keys)
        found = next(itertools.chain(earlier, later), None)
        if found is None:
            return self._unknown(command)
        self.elsewhere[command] = None
        return found.answer

    def _unknown(self, command: str) -> Mapping[str, Any]:
        self.unknown[command] = None
        return _refusal(f"replay: the recording has no answer to {command}")

    def _as_recorded(self, exchange: Exchange) -> Answer:
        """With the events that came before it, and those that came after it, but before the next answer or act."""
        if exchange.answer_line is None:
            return Answer((), None, ())
        before = self._events_until(exchange.answer_line)
        following = bisect_right(self._answers, exchange.answer_line)
        ends = [
            *self._answers[following : following + 1],
            *(act.line for act in self.acts[self.played : self.played + 1]),
        ]
        return Answer(before, exchange.answer, self._events_until(min(ends, default=None)))

    def _events_until(self, line: int | None) -> tuple[Mapping[str, Any], ...]:
        told = []
        while self._events and (line is None or self._events[0].line < line):
            told.append(self._events.popleft().message)
        return tuple(told)

    def _turn(self, command: str, arguments: Arguments) -> Mapping[str, Any]:
        """QEMU's objects, as far as turns are concerned."""
        name = str(arguments.get("id"))
        match command:
            case "object-add" if name not in self._turns:
                self._turns[name] = arguments.get("data")
                return {"return": {}}
            case "object-del" if name in self._turns:
                del self._turns[name]
                return {"return": {}}
            case "qom-list":
                return {"return": [{"name": turn, "type": "child<secret>"} for turn in self._turns]}
            case "qom-get" if (name := str(arguments["path"]).removeprefix("/objects/")) in self._turns:
                return {"return": self._turns[name]}
        return _refusal(f"object '{name}' is not as it must be for {command}")


def shown(command: str, arguments: Arguments) -> str:
    """In one line."""
    given = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in arguments.items())
    return " ".join([command, *given])


def _is_same(exchange: Exchange, command: str, arguments: Arguments) -> bool:
    return _key(exchange.name, exchange.arguments) == _key(command, arguments)


def _is_turn(command: str, arguments: Arguments) -> bool:
    if command == "qom-list":
        return arguments.get("path") == "/objects"
    name = str(arguments.get("path" if command == "qom-get" else "id", ""))
    return name.removeprefix("/objects/").startswith(phrases.TURN)


def _key(command: str, arguments: Arguments) -> str:
    """The same for what is the same to QEMU, whoever sends it."""
    with contextlib.suppress(RecursionError):  # a json: name that is nested too deeply is no QEMU's
        return _OF_OUR_PROCESS.sub("", json.dumps([command, without(arguments)], sort_keys=True))
    return json.dumps([command])


def _refusal(reason: str) -> Mapping[str, Any]:
    return {"error": {"class": "GenericError", "desc": reason}}
