"""A recording as people read it: when, what, and under it why it was done and what does the same elsewhere."""

import shlex
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmpmerge.cli.render.page import Painted
from qmpmerge.cli.render.table import Column
from qmpmerge.cli.render.visible import visible

if TYPE_CHECKING:
    from qmpmerge.recording.explained import Explained, Item, Spent
    from qmpmerge.recording.felt import Felt

FELT = (Column("AT", right=True), Column("FOR", right=True), Column("WHAT THE GUEST FELT"))
SPENT = (
    Column("STATE"),
    Column("SECONDS", right=True),
    Column("SHARE", right=True),
    Column("IN QEMU", right=True),
    Column("COMMANDS", right=True),
)

NARROWEST = 60
"""Columns: below that a text has no place beside the times."""

_INDENT = " " * 13
_JOINED = "\0"
"""In the place of a blank at which no line is broken."""
_MARKS = {"asked": "?", "command": "→", "event": "!", "step": "·"}


def head(one: "Explained") -> Iterator[str]:
    """What was recorded, and what it came to."""
    yield shlex.join(one.words) if one.words else "a program that uses the library"
    made = ", ".join(
        [
            *([f"recorded {one.wall}"] if one.wall else []),
            *([f"qmpmerge {one.version}"] if one.version else []),
            *([f"QEMU {one.qemu}"] if one.qemu else []),
        ]
    )
    if made:
        yield f"  {made}"
    if one.is_cut:
        yield f"  what it came to was not recorded: the last line is of {one.seconds:.3f} s"
    else:
        code = f" (exit code {one.code})" if one.code is not None else ""
        why = f": {one.reason}" if one.reason else ""
        yield f"  {one.verdict or 'ended'}{code} after {one.seconds:.3f} s{why}"


def lines(item: "Item", columns: int | None) -> Iterator[tuple[str, ...]]:
    """The parts of each line of an item."""
    took = "" if item.took is None or item.kind != "command" else f" ({_milliseconds(item.took)})"
    counted = f" ({item.count} questions)" if item.count > 1 else ""
    mark = _MARKS.get(item.kind, "-")
    first, *others = _broken(f"{item.text}{took or counted}", columns)
    shown = Painted(first, "cyan") if item.kind == "step" else first
    yield f"{item.at:10.6f} {mark} ", shown
    for text in others:
        yield _INDENT, text
    for label, told in (("refused: ", item.reason), ("", item.why), ("= ", item.twin)):
        for text in _broken(f"{label}{told}", columns) if told else ():
            yield f"{_INDENT}  ", Painted(text, "red" if label == "refused: " else None)


def _broken(text: str, columns: int | None) -> list[str]:
    """A command that is to be copied may be broken as well: it stands here to be read."""
    shown = visible(text)
    if columns is None:
        return [shown]
    width = max(columns, NARROWEST) - len(_INDENT) - 2
    whole = shown.replace(" ms)", f"{_JOINED}ms)")
    lines = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_JOINED, " ") for line in lines] or [""]


def felt(one: "Felt") -> tuple[str, ...]:
    """A row of the table."""
    return f"{one.at:.6f}", "?" if one.seconds is None else _milliseconds(one.seconds), f"{one.kind}: {one.text}"


def spent(one: "Spent", whole: float) -> tuple[str, ...]:
    """A row of the table; the share is of all of it."""
    share = f"{100 * one.seconds / whole:.0f} %" if whole else ""
    return one.state, f"{one.seconds:.3f}", share, f"{one.in_qemu:.3f}", str(one.commands)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
