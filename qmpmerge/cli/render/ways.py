"""The two ways to a shorter chain, in two columns."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qmpmerge.chain.chain import draw
from qmpmerge.cli.render import humanize
from qmpmerge.cli.render.table import Column

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Estimate
    from qmpmerge.operations.plan import Way, Ways

COLUMNS = (Column("WAY"), Column("COMMIT", shrinks=True), Column("PULL", shrinks=True))


def rows(ways: "Sequence[Way]") -> Iterator[Sequence[str]]:
    """A line for each thing in which they can differ."""
    yield ["after", *(draw(way.after.images) for way in ways)]
    yield ["copies", *(_copies(way.estimate) for way in ways)]
    yield ["takes", *(_takes(way.estimate) for way in ways)]
    yield ["grows", *(_grows(way.estimate) for way in ways)]
    yield ["free", *(_free(way.estimate) for way in ways)]
    yield ["guest", *("paused for milliseconds" if way.pauses_guest else "not paused" for way in ways)]
    yield ["start from", *(_start(way) for way in ways)]
    yield ["refused", *(", ".join(error.name for error in way.refusals) or "no" for way in ways)]


def notes(found: "Ways") -> Iterator[str]:
    """At what rate, who needs the images, and what is not known."""
    estimate = found.ways[0].estimate
    yield f"time        at {humanize.size(estimate.rate)}/s ({'as given' if estimate.rate_given else 'assumed'})"
    for one in found.shared:
        by = "" if one.kind == "process" else "what is built on it: "
        yield f"shared      {one.file} is needed by {by}{one.name}"
    for reason in found.not_seen:
        yield f"not seen    whether others need the images: {reason}"
    for way in found.ways:
        if way.estimate.reason:
            yield f"not known   what a {way.direction} copies: {way.estimate.reason}"
        unchecked = [check.name for check in way.checks if check.result == "not checked"]
        if unchecked:
            yield f"not checked for a {way.direction}: {', '.join(unchecked)}"


def answer(found: "Ways") -> Iterator[str]:
    """Which to take, and both commands."""
    yield f"take        {found.choice or 'neither'}: {found.reason}"
    for way in found.ways:
        yield f"{way.direction.ljust(10)}  {way.run}"


def _copies(value: "Estimate") -> str:
    return f"{'at least ' if value.at_least and value.copy is not None else ''}{humanize.size(value.copy)}"


def _takes(value: "Estimate") -> str:
    if value.seconds is None:
        return "-"
    return humanize.duration(value.seconds) if value.seconds >= 1 else "less than 1 s"


def _grows(value: "Estimate") -> str:
    by = "" if value.growth is None else f" by up to {humanize.size(value.growth)}"
    return f"{os.path.basename(value.file) or value.file}{by}"


def _free(value: "Estimate") -> str:
    where = f" in {os.path.dirname(value.file)}" if value.file.startswith("/") else ""
    return "-" if value.free is None else f"{humanize.size(value.free)}{where}"


def _start(way: "Way") -> str:
    name = way.after.active.name
    return f"{name}, as before" if way.keeps_launch_path else f"{name} from then on"
