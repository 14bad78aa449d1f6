"""The line that is drawn again and again on a terminal while a job is at work."""

import unicodedata  # noqa: F401 - `width` needs it for some names, and nothing is imported once a job is at work

from qmpmerge.cli.render.page import Page
from qmpmerge.cli.render.visible import visible
from qmpmerge.cli.render.width import cut, width

LONGEST, SHORTEST = 24, 6
TO_END = "\x1b[K"
"""Erases what stands right of the cursor."""


class Bar:
    """As wide as the words leave room for; never wider than the terminal, or it could not be drawn over."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._is_drawn = False

    def draw(self, percent: float | None, words: str) -> None:
        """In the place of what was drawn before."""
        room = (self._page.columns or 0) - 1
        words = cut(visible(words), room)
        length = min(LONGEST, room - width(words) - 1)
        if length >= SHORTEST:
            done = round(length * (percent or 0) / 100)
            words = f"{'━' * done}{'─' * (length - done)} {words}"
        self._page.stream.write(f"\r{words}{TO_END}")
        self._page.stream.flush()
        self._is_drawn = True

    def erase(self) -> None:
        """Leave the line to others."""
        if self._is_drawn:
            self._page.stream.write(f"\r{TO_END}")
            self._is_drawn = False
