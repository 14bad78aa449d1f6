"""A recording as a time line: what was asked and done and why, what the guest felt of it, and where the time went."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from qmpmerge.recording import felt, phrases
from qmpmerge.recording.exchanges import Entry, Event, Exchange, paired
from qmpmerge.recording.felt import Felt
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


Owner = tuple[str, str]
"""Whose step it is: the target, and what it is about there. Targets have jobs of the same name."""

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
        tuple(_items(entries, _several(run))),
        felt.felt(entries),
        tuple(_spent(entries, run)),
    )


def _owner(step: Line) -> Owner:
    return str(step.facts.get("target", "")), str(step.facts.get("about", ""))


def _several(run: Run) -> bool:
    """Whether there are steps in several targets, or states of several jobs."""
    steps = [line for line in run.lines if line.kind == "step"]
    targets = {target for target, _ in map(_owner, steps) if target}
    return len(targets) > 1 or len({_owner(line) for line in steps if line["name"] == "state"}) > 1


def _named(owner: Owner, text: str) -> str:
    return ": ".join(filter(None, (*owner, text)))


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


def _items(entries: Sequence[Entry], is_of_several: bool) -> Iterator[Item]:
    """
    Questions in a row are one, however often they were asked; what each is for is said once. `is_of_several` says that each
    step has to tell whose it is.
    """
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
            item = _line(entry, names)
            is_to_tell = is_of_several and entry.kind == "step"
            yield replace(item, text=_named(_owner(entry), item.text)) if is_to_tell else item
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
    absent = phrases.refused(exchange.name, exchange.arguments, exchange.error)
    why = absent or phrases.of(exchange.name, exchange.arguments).why
    text = f"{exchange.name} {given}".rstrip()
    return Item(exchange.at, "command", text, why or None, names.twin(exchange), 1, exchange.seconds, exchange.error)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _event(event: Event) -> str:
    data = event.message.get("data", {})
    return " ".join([event.message["event"], *(f"{name}={_value(value)}" for name, value in data.items())])


def _line(line: Line, names: Names) -> Item:
    """A line that is no message, in words."""
    match line.kind:
        case "session":
            return Item(line.seconds, line.kind, f"connected to {line['name']}")
        case "step":
            return Item(line.seconds, line.kind, line["text"])
        case "header":
            header = line["header"]
            backing = header.get("backing")
            text = f"{line['when']}: {names.short(line['file'])} is {header.get('format')}"
            on = f" on {names.short(str(backing))} ({header.get('backing_format')})" if backing else ""
            return Item(line.seconds, line.kind, text + on)
        case "closed":
            return Item(line.seconds, line.kind, f"session closed {line['reason']}")
        case "left-out":
            return Item(
                line.seconds, line.kind, f"{line['messages']} messages ({line['bytes']} bytes) were left out here"
            )
        case _:
            facts = {name: value for name, value in line.facts.items() if name not in _FACTS}
            return Item(line.seconds, line.kind, json.dumps(facts))


# --- where the time went ---------------------------------------------------------------------------------------------


def _spent(entries: Sequence[Entry], run: Run) -> Iterator[Spent]:
    """
    Of each state in turn, what comes before any was entered first; of several jobs one after the other, each with whose it is.
    Commands are those to all targets meanwhile.
    """
    exchanges = [entry for entry in entries if isinstance(entry, Exchange)]
    marks = [line for line in run.lines if line.kind == "step" and line["name"] == "state"]
    owners = list(dict.fromkeys(map(_owner, marks)))
    for owner in owners or [("", "")]:
        own = [line for line in marks if _owner(line) == owner]
        names = [own[0].facts.get("was", "before") if own else "all", *(line.facts.get("state") for line in own)]
        begins = [run.lines[0].seconds, *(line.seconds for line in own)]
        for name, begin, end in zip(names, begins, [*begins[1:], run.seconds], strict=True):
            sent = sum(begin <= exchange.at < end for exchange in exchanges)
            state = _named(owner, str(name)) if len(owners) > 1 else str(name)
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
