"""
Figures: every run of every case, by peer; medians and ratios are made when they are shown.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

OURS = "qmpmerge"
BARE = "bare QMP"
VIRSH = "virsh"
QEMU_IMG = "qemu-img"

T = TypeVar("T")


@dataclass
class Case:
    """One line of the table. `runs` are by peer, in the order in which they were made."""

    section: str
    name: str
    unit: str
    runs: dict[str, list[float]] = field(default_factory=dict)

    def median(self, peer: str) -> float:
        return statistics.median(self.runs[peer])

    def ratio(self, peer: str) -> float | None:
        """Ours to the peer's: below 1 we are faster, or smaller."""
        if OURS not in self.runs or peer == OURS or not self.median(peer):
            return None
        return self.median(OURS) / self.median(peer)

    def document(self) -> dict[str, Any]:
        peers = {
            peer: {"median": self.median(peer), "best": min(runs), "worst": max(runs), "runs": runs}
            for peer, runs in self.runs.items()
        }
        ratios = {peer: ratio for peer in self.runs if (ratio := self.ratio(peer)) is not None}
        return {"section": self.section, "case": self.name, "unit": self.unit, "peers": peers, "ratios": ratios}


class Figures:
    """All cases, in the order in which they were first measured."""

    def __init__(self) -> None:
        self.cases: dict[tuple[str, str], Case] = {}

    def add(self, section: str, name: str, peer: str, value: float, unit: str = "ms") -> None:
        """Keep one run's figure."""
        case = self.cases.setdefault((section, name), Case(section, name, unit))
        case.runs.setdefault(peer, []).append(round(value, 3))

    def document(self) -> list[dict[str, Any]]:
        """All of it, for JSON."""
        return [case.document() for case in self.cases.values()]

    def table(self) -> Iterator[str]:
        """A table a section: medians, and in brackets ours to the peer's."""
        for section in dict.fromkeys(case.section for case in self.cases.values()):
            yield from _table(section, [case for case in self.cases.values() if case.section == section])


def _table(section: str, cases: list[Case]) -> Iterator[str]:
    peers = list(dict.fromkeys(peer for case in cases for peer in case.runs))
    rows = [[section, "", *(f"{peer}" for peer in peers)]]
    rows += [[case.name, case.unit, *(_cell(case, peer) for peer in peers)] for case in cases]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield ""
    for row in rows:
        left = row[0].ljust(widths[0])
        yield "  ".join([left, row[1].ljust(widths[1]), *map(str.rjust, row[2:], widths[2:])]).rstrip()


def _cell(case: Case, peer: str) -> str:
    if peer not in case.runs:
        return ""
    ratio = case.ratio(peer)
    shown = f"{case.median(peer):.{0 if case.median(peer) >= 100 else 1}f}"
    return shown if ratio is None else f"{shown} ({ratio:.2f})"


def percentile(values: Sequence[float], of_hundred: int) -> float:
    """So many of a hundred values are no larger."""
    return sorted(values)[max(0, -(-len(values) * of_hundred // 100) - 1)]


def alternating(runs: int, peers: Iterable[T]) -> Iterator[T]:
    """Each peer so many times, in turn, another one first each time: what else goes on here hits all alike."""
    order = list(peers)
    for number in range(runs):
        first = number % len(order)
        yield from order[first:] + order[:first]
