"""docs/speed.md's tables, from what `scripts/bench --json docs/data/bench.json` has kept."""

import functools
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speed.figures import BARE, OURS, VIRSH

from pages.tables import table

DATA = Path(__file__).parents[2] / "docs/data/bench.json"
PEERS = (OURS, VIRSH, BARE)
"""In this order; others come after them."""

Case = dict[str, Any]

LIVE = re.compile(r"(.+ MiB) in \d+ layers")
GAPS = re.compile(r"(.+): longest gap")
OFFLINE = re.compile(r"(.+ \d+ MiB in \d+ layers)")


@functools.cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DATA.read_text())
    return document


def cases(section: str, names: re.Pattern[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Those of a section of the bench whose names are of this kind: the name as it is shown, and each peer's median."""
    for case in _document()["cases"]:
        named = names.fullmatch(case["case"])
        if case["section"] == section and named:
            yield named[1], {peer: figures["median"] for peer, figures in case["peers"].items()}


def live() -> str:
    """Merges of a VM's images."""
    return _table("live merge", LIVE, "live merge, 3 layers")


def gaps() -> str:
    """How long the guest's writes stand still meanwhile."""
    return _table("guest", GAPS, "longest gap between a guest's writes")


def offline() -> str:
    """Merges of images that no VM uses."""
    return _table("offline merge", OFFLINE, "images not in use")


def machine() -> str:
    """Where it was measured, and how."""
    told = _document()["machine"]
    parts = [f"{told['processors']} processors", f"QEMU {told['qemu']}", f"Python {told['python']}", told["filesystem"]]
    return f"Medians in milliseconds, from `{told['command']}`: {', '.join(parts)}."


def summary() -> str:
    """What the figures come to."""
    rows = [medians for _, medians in cases("live merge", LIVE)]
    more = statistics.median(medians[OURS] - medians[BARE] for medians in rows)
    faster = sum(medians[OURS] < medians[VIRSH] for medians in rows)
    return (
        f"So a merge by qmpmerge takes some {round(more, -1):.0f} ms more than the bare conversation, and is faster than virsh "
        f"in {faster} of {len(rows)} cases."
    )


def _table(section: str, names: re.Pattern[str], title: str) -> str:
    found = [*cases(section, names)]
    assert found, f"{DATA} has no case of {section} that is called like this: {names.pattern}"
    there = dict.fromkeys(peer for _, medians in found for peer in medians)
    peers = sorted(there, key=lambda peer: (*PEERS, *there).index(peer))
    rows = [[name, *(f"{medians[peer]:.0f}" if peer in medians else "" for peer in peers)] for name, medians in found]
    return table(title, *peers, rows=rows)
