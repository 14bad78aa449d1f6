"""
A stream as people read it: text from outside spelled out, and on a terminal colours and a width.

There are few colours, and none that says what the words do not. `NO_COLOR` (no-color.org) and a dumb terminal get none.
"""

import os
from typing import Literal, TextIO

from qmpmerge.cli.render.visible import visible
from qmpmerge.cli.render.wrap import breaks, margin

Colour = Literal["red", "green", "yellow", "cyan"]

CODES: dict[Colour, int] = {"red": 31, "green": 32, "yellow": 33, "cyan": 36}

COLUMNS = 80
"""Where a terminal does not tell."""


class Painted(str):
    """A text in a colour, where there are any."""

    colour: Colour | None

    def __new__(cls, text: str, colour: Colour | None) -> "Painted":
        """The text is this very string."""
        painted = super().__new__(cls, text)
        painted.colour = colour
        return painted


class Page:
    """Lines to a stream, to which it can always be written."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        is_dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.can_redraw = self.is_terminal and not is_dumb
        self._has_colours = self.can_redraw and not os.environ.get("NO_COLOR")

    @property
    def columns(self) -> int | None:
        """How wide the terminal is; None for what is no terminal, and takes lines of any length."""
        if not self.is_terminal:
            return None
        told = os.environ.get("COLUMNS", "")
        try:
            return int(told) if told.isdecimal() else os.get_terminal_size(self.stream.fileno()).columns or COLUMNS
        except (OSError, ValueError):
            return COLUMNS

    def line(self, *parts: str) -> None:
        """Write these, one after the other, as a line; on a terminal that is narrower as several."""
        self.stream.write(self.wrapped(*parts))

    def whole(self, *parts: str) -> None:
        """The same of what is never broken: a row, or what is there to be copied."""
        self.stream.write("".join(self._coloured(part, visible(part)) for part in parts) + "\n")

    def wrapped(self, *parts: str) -> str:
        """As `line` writes it."""
        characters, columns = list("".join(map(visible, parts))), self.columns
        if columns is not None:
            text = "".join(characters)
            for place in breaks(text, columns):
                characters[place] = "\n" + " " * margin(text, columns)
        shown, begin = "", 0
        for part in parts:
            end = begin + len(visible(part))
            shown += self._coloured(part, "".join(characters[begin:end]))
            begin = end
        return f"{shown}\n"

    def _coloured(self, part: str, shown: str) -> str:
        if isinstance(part, Painted) and part.colour and self._has_colours:
            return f"\x1b[{CODES[part.colour]}m{shown}\x1b[0m"
        return shown
