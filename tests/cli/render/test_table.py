"""Tables at the width of a terminal, and elsewhere."""

import pytest

from qmpmerge.cli.render.page import Painted
from qmpmerge.cli.render.table import Column, lines
from qmpmerge.cli.render.width import width

COLUMNS = (Column("NAME"), Column("SIZE", right=True), Column("FILE", shrinks=True), Column("NODE", shrinks=True))
LONG = "/a/folder/whose/name/goes/on/and/on/base.raw"
ROWS = [("vda", "8 MiB", LONG, "#block1"), ("虚拟", "192 KiB", "/vm/c.qcow2", "a-node-of-somebodys-own-choice")]


def drawn(room: int | None) -> list[str]:
    return ["".join(str(part) for part in line) for line in lines(COLUMNS, ROWS, room)]


def test_elsewhere_nothing_is_shortened() -> None:
    assert drawn(None) == [
        "NAME     SIZE  FILE                                          NODE",
        "vda     8 MiB  /a/folder/whose/name/goes/on/and/on/base.raw  #block1",
        "虚拟  192 KiB  /vm/c.qcow2                                   a-node-of-somebodys-own-choice",
    ]


@pytest.mark.parametrize("room", [45, 60, 80, 90])
def test_on_a_terminal_the_widest_columns_give_way(room: int) -> None:
    shown = drawn(room)
    assert all(width(line) <= room for line in shown)
    assert "/base.raw" in shown[1] and "…" in shown[1] and "192 KiB" in shown[2]


def test_what_cannot_be_shortened_any_more_is_left_to_the_terminal() -> None:
    assert drawn(10) == drawn(30)


def test_a_colour_takes_no_room() -> None:
    rows: list[tuple[str, str]] = [(Painted("ready", "green"), "x"), ("concluded", "y")]
    line = list(lines((Column("STATUS"), Column("B")), rows, 80))[1]
    assert line == ["ready    ", "  ", "x"] and isinstance(line[0], Painted) and line[0].colour == "green"
