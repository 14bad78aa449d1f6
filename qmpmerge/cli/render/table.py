"""Tables: as wide as what is in them, and on a terminal no wider than that where paths can be shortened."""

from collections.abc import Iterator, Sequence

from qmpmerge.cli.render.page import Painted
from qmpmerge.cli.render.visible import visible
from qmpmerge.cli.render.width import padded, shortened, width

BETWEEN = 2
SHORTEST = 12


class Column:
    """`right` is for numbers; `shrinks` for paths and names, which are shortened where a terminal is too narrow."""

    def __init__(self, title: str, *, right: bool = False, shrinks: bool = False) -> None:
        self.title = title
        self.right = right
        self.shrinks = shrinks


def lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int | None) -> Iterator[list[str]]:
    """The parts of each line, the titles first; a column that no row fills is left out. Without `room` nothing is shortened."""
    used = [index for index in range(len(columns)) if any(visible(row[index]) for row in rows)]
    table = [[columns[index].title for index in used], *([row[index] for index in used] for row in rows)]
    kinds = [columns[index] for index in used]
    widths = [max(width(visible(row[place])) for row in table) for place in range(len(used))]
    if room is not None:
        _shrink(widths, kinds, room)
    for row in table:
        yield list(_line(row, kinds, widths))


def _shrink(widths: list[int], kinds: Sequence[Column], room: int) -> None:
    """The widest first, down to what can still be read."""
    while sum(widths) + BETWEEN * (len(widths) - 1) > room:
        able = [
            place for place, kind in enumerate(kinds) if kind.shrinks and widths[place] > max(SHORTEST, len(kind.title))
        ]
        if not able:
            return
        widths[max(able, key=lambda place: widths[place])] -= 1


def _line(row: Sequence[str], kinds: Sequence[Column], widths: Sequence[int]) -> Iterator[str]:
    last = max(place for place, cell in enumerate(row) if visible(cell) or place == 0)
    for place, (cell, kind, columns) in enumerate(zip(row[: last + 1], kinds, widths, strict=False)):
        text = shortened(visible(cell), columns)
        if place < last or kind.right:
            text = padded(text, columns, right=kind.right)
        yield Painted(text, cell.colour) if isinstance(cell, Painted) else text
        if place < last:
            yield " " * BETWEEN
