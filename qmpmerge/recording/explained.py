"""A recording as a time line: what was asked and done and why, what the guest felt of it, and where the time went."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from qmpmerge.recording import phrases
from qmpmerge.recording.exchanges import Entry, Event, Exchange, paired
from qmpmerge.recording.reading import Line, Recording, Run
from qmpmerge.recording.twins import Names
from qmpmerge.value import Value


class Item(Value):
    """
    Something that happened at `at` seconds. `kind` is that of the line in the recording, or ``asked``, ``command``, ``event``.

    `took` is how long QEMU's answer took, in seconds, of several questions until the last of them; None where there is none.
    `count` is how many questions one item stands for. `reason` is why QEMU refused a command.
    """

    at: float
    kind: str
    text: str
    why: str | None = None
    twin: str | None = None
    count: int = 1
    took: float | None = None
    reason: str | None = None


class Felt(Value):
    """
    Something that the guest felt at `at` seconds, for so many `seconds`, None where the recording does not show its end: a
    ``pause``, a ``throttle``, or that QEMU was ``busy`` with our commands, so that its I/O may have waited.
    """

    kind: str
    at: float
    seconds: float | None
    text: str


class Spent(Value):
    """Seconds in one state of a merge, how many of them QEMU was waited for, and commands sent in it."""

    state: str
    seconds: float
    in_qemu: float
    commands: int


class Explained(Value):
    """One command of a recording, as the `words` that were typed. `is_cut` says that its end was not recorded."""

    words: tuple[str, ...]
    wall: str | None
    version: str | None
    qemu: str | None
    verdict: str | None
    code: int | None
    reason: str | None
    seconds: float
    is_cut: bool
    items: tuple[Item, ...]
    felt: tuple[Felt, ...]
    spent: tuple[Spent, ...]


BUSY_SECONDS = 0.01
"""Answers that take as long as this may have kept a guest waiting."""

_FACTS = {"run", "t", "kind", "about"}


def explain(recording: Recording) -> tuple[Explained, ...]:
    """Each command in it, in the order in which they began."""
    return tuple(map(_explained, recording.runs))


def _explained(run: Run) -> Explained:
    entries = paired(run.lines)
    start, end = run.start, run.end
    command, error = start.get("command"), end.get("error")
    return Explained(
        tuple(map(str, command)) if isinstance(command, list) else (),
        _text(start.get("wall")),
        _text(start.get("qmpmerge")),
        next((_qemu(line) for line in run.lines if line.kind == "session"), None),
        end.get("verdict"),
        end.get("code"),
        _text(error.get("message")) if isinstance(error, dict) else None,
        run.seconds,
        not end,
        tuple(_items(entries)),
        tuple(sorted((*_pauses(entries), *_throttles(entries), *_busy(entries)), key=lambda one: one.at)),
        tuple(_spent(entries, run)),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _qemu(line: Line) -> str | None:
    """Its version; None where the greeting is none of a QEMU."""
    try:
        numbers = line["greeting"]["QMP"]["version"]["qemu"]
        return f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}"
    except (KeyError, TypeError):
        return None


# --- the time line ---------------------------------------------------------------------------------------------------


def _items(entries: Sequence[Entry]) -> Iterator[Item]:
    """Questions in a row are one, however often they were asked; what each is for is said once."""
    names, known, asked = Names(), set[str](), list[Exchange]()
    for entry in entries:
        names.see(entry)
        if isinstance(entry, Exchange) and entry.is_question and entry.error is None:
            asked.append(entry)
            continue
        if asked:
            yield _asked(asked, names, known)
            asked = []
        if isinstance(entry, Exchange):
            yield _command(entry, names)
        elif isinstance(entry, Event):
            yield Item(entry.at, "event", _event(entry))
        elif entry.kind not in ("start", "end"):
            yield _line(entry)
    if asked:
        yield _asked(asked, names, known)


def _asked(asked: Sequence[Exchange], names: Names, known: set[str]) -> Item:
    often = Counter(exchange.name for exchange in asked)
    text = ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in often.items())
    new = {exchange.name: exchange for exchange in reversed(asked) if exchange.name not in known}
    known.update(new)
    why = "; ".join(dict.fromkeys(phrase for name in reversed(new) if (phrase := phrases.of(name, {}).why)))
    twins = dict.fromkeys(twin for exchange in reversed(new.values()) if (twin := names.twin(exchange)))
    ends = [exchange.answered for exchange in asked if exchange.answered is not None]
    took = max(ends) - asked[0].at if ends else None
    return Item(asked[0].at, "asked", text, why or None, "; ".join(twins) or None, len(asked), took)


def _command(exchange: Exchange, names: Names) -> Item:
    given = " ".join(f"{name}={_value(value)}" for name, value in exchange.arguments.items())
    why = phrases.of(exchange.name, exchange.arguments).why
    text = f"{exchange.name} {given}".rstrip()
    return Item(exchange.at, "command", text, why or None, names.twin(exchange), 1, exchange.seconds, exchange.error)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _event(event: Event) -> str:
    data = event.message.get("data", {})
    return " ".join([event.message["event"], *(f"{name}={_value(value)}" for name, value in data.items())])


def _line(line: Line) -> Item:
    """A line that is no message, in words."""
    match line.kind:
        case "session":
            return Item(line.seconds, line.kind, f"connected to {line['name']}")
        case "step":
            return Item(line.seconds, line.kind, line["text"])
        case "header":
            header = line["header"]
            backing = header.get("backing")
            on = f" on {backing} ({header.get('backing_format')})" if backing else ""
            return Item(line.seconds, line.kind, f"{line['when']}: {line['file']} is {header.get('format')}{on}")
        case "closed":
            return Item(line.seconds, line.kind, f"session closed {line['reason']}")
        case "left-out":
            return Item(
                line.seconds, line.kind, f"{line['messages']} messages ({line['bytes']} bytes) were left out here"
            )
        case _:
            facts = {name: value for name, value in line.facts.items() if name not in _FACTS}
            return Item(line.seconds, line.kind, json.dumps(facts))


# --- what the guest felt ---------------------------------------------------------------------------------------------


def _pauses(entries: Sequence[Entry]) -> Iterator[Felt]:
    """By QEMU's own clock: from its STOP to its RESUME."""
    stopped: Event | None = None
    for event in entries:
        if not isinstance(event, Event):
            continue
        if event.message["event"] == "STOP" and stopped is None:
            stopped = event
        elif event.message["event"] == "RESUME" and stopped is not None:
            seconds = _moment(event) - _moment(stopped)
            yield Felt("pause", stopped.at, seconds, "the guest stood still")
            stopped = None
    if stopped is not None:
        yield Felt(
            "pause", stopped.at, None, "the guest stood still, and the recording does not show that it ran again"
        )


def _moment(event: Event) -> float:
    """As QEMU has it."""
    try:
        stamp = event.message["timestamp"]
        moment = float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
    except (KeyError, TypeError, ValueError, OverflowError):
        return event.at
    return moment if math.isfinite(moment) else event.at


def _throttles(entries: Sequence[Entry]) -> Iterator[Felt]:
    """From each limit to the next, or to none."""
    since: Exchange | None = None
    for entry in entries:
        if isinstance(entry, Exchange) and entry.name == "block_set_io_throttle" and entry.error is None:
            if since is not None:
                yield Felt("throttle", since.at, entry.at - since.at, _limits(since))
            since = entry if phrases.limits(entry.arguments) else None
    if since is not None:
        yield Felt(
            "throttle", since.at, None, f"{_limits(since)}, and the recording does not show that they were lifted"
        )


def _limits(exchange: Exchange) -> str:
    return "limits " + ", ".join(f"{name}={value}" for name, value in phrases.limits(exchange.arguments).items())


def _busy(entries: Sequence[Entry]) -> Iterator[Felt]:
    """Commands that were answered late, those that were sent together as one: QEMU does them in its main loop."""
    together: list[Exchange] = []
    end = 0.0
    for entry in entries:
        if isinstance(entry, Exchange) and not entry.is_question and entry.answered is not None:
            if together and entry.at >= end:
                yield from _late(together, end)
                together = []
            end = max(end, entry.answered) if together else entry.answered
            together.append(entry)
    if together:
        yield from _late(together, end)


def _late(together: Sequence[Exchange], end: float) -> Iterator[Felt]:
    seconds = end - together[0].at
    if seconds >= BUSY_SECONDS:
        names = ", ".join(exchange.name for exchange in together)
        were = "was" if len(together) == 1 else "were"
        yield Felt("busy", together[0].at, seconds, f"until {names} {were} answered")


# --- where the time went ---------------------------------------------------------------------------------------------


def _spent(entries: Sequence[Entry], run: Run) -> Iterator[Spent]:
    """Of each state in turn, what comes before any was entered first; of several jobs one after the other."""
    exchanges = [entry for entry in entries if isinstance(entry, Exchange)]
    marks = [line for line in run.lines if line.kind == "step" and line["name"] == "state"]
    jobs = list(dict.fromkeys(str(line.facts.get("about", "")) for line in marks))
    for job in jobs or [""]:
        own = [line for line in marks if str(line.facts.get("about", "")) == job]
        names = [own[0].facts.get("was", "before") if own else "all", *(line.facts.get("state") for line in own)]
        begins = [run.lines[0].seconds, *(line.seconds for line in own)]
        for name, begin, end in zip(names, begins, [*begins[1:], run.seconds], strict=True):
            sent = sum(begin <= exchange.at < end for exchange in exchanges)
            state = f"{job}: {name}" if len(jobs) > 1 else str(name)
            yield Spent(state, end - begin, _waited(exchanges, begin, end), sent)


def _waited(exchanges: Sequence[Exchange], begin: float, end: float) -> float:
    """Seconds in which at least one answer was waited for."""
    waited, reached = 0.0, begin
    for exchange in exchanges:  # in the order in which they were sent
        if exchange.answered is not None:
            since, until = max(exchange.at, reached), min(exchange.answered, end)
            waited += max(0.0, until - since)
            reached = max(reached, until)
    return waited
