"""What a recording shows that the guest felt of a command."""

import math
from collections.abc import Iterator, Sequence

from qmpmerge.recording import phrases
from qmpmerge.recording.exchanges import Entry, Event, Exchange
from qmpmerge.value import Value


class Felt(Value):
    """
    Something that the guest felt at `at` seconds, for so many `seconds`, None where the recording does not show its end: a
    ``pause``, a ``throttle``, or that QEMU was ``busy`` with our commands, so that its I/O may have waited.
    """

    kind: str
    at: float
    seconds: float | None
    text: str


BUSY_SECONDS = 0.01
"""Answers that take as long as this may have kept a guest waiting."""


def felt(entries: Sequence[Entry]) -> tuple[Felt, ...]:
    """All of it, in its order."""
    return tuple(sorted((*_pauses(entries), *_throttles(entries), *_busy(entries)), key=lambda one: one.at))


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
    """
    Commands that were answered late, those that were sent together as one: QEMU does them in its main loop. A guest that stands
    still feels nothing of it.
    """
    together: list[Exchange] = []
    end = 0.0
    runs = _ran(entries) is not False
    for entry in entries:
        runs = runs if (now := _running(entry)) is None else now
        if runs and isinstance(entry, Exchange) and not entry.is_question and entry.answered is not None:
            if together and entry.at >= end:
                yield from _late(together, end)
                together = []
            end = max(end, entry.answered) if together else entry.answered
            together.append(entry)
    if together:
        yield from _late(together, end)


def _running(entry: Entry) -> bool | None:
    """Whether the guest runs from then on; None where this tells nothing of it."""
    if isinstance(entry, Event):
        return {"STOP": False, "RESUME": True}.get(entry.message["event"])
    if isinstance(entry, Exchange) and entry.name == "query-status":
        told = (entry.answer or {}).get("return")
        running = told.get("running") if isinstance(told, dict) else None
        return running if isinstance(running, bool) else None
    return None


def _ran(entries: Sequence[Entry]) -> bool | None:
    """Whether the guest ran at the beginning, by the first that tells of it."""
    for entry in entries:
        if (running := _running(entry)) is not None:
            return not running if isinstance(entry, Event) else running
    return None


def _late(together: Sequence[Exchange], end: float) -> Iterator[Felt]:
    seconds = end - together[0].at
    if seconds >= BUSY_SECONDS:
        names = ", ".join(exchange.name for exchange in together)
        were = "was" if len(together) == 1 else "were"
        yield Felt("busy", together[0].at, seconds, f"until {names} {were} answered")
