"""
Lines that are wider than a terminal, broken between words and indented under the text behind their label.

What stands between backticks is a command to be copied, and stays in one piece: a terminal that has to break it knows that
it is one line.
"""

import re
from collections.abc import Iterator

from qmpmerge.cli.render.width import width

WIDEST_LABEL = 16

_LABEL = r" *(?:[\w-]+(?: [\w-]+)?(?:: |  +))?"
"""``hint: ``, ``  space   `` or ``  not checked  ``."""

_WORD = r"[^\s`]*`[^`]*`\S*|\S+"


def margin(text: str, columns: int) -> int:
    """How far the next lines of it are indented."""
    return width(_label(text, columns)) or len(text) - len(text.lstrip()) + 2


def breaks(text: str, columns: int) -> Iterator[int]:
    """The places of the blanks at which a new line begins, none of them behind the label; none where it is no wider."""
    if width(text) <= columns:
        return
    first = len(_label(text, columns)) or 1
    used = place = 0
    for word in re.finditer(_WORD, text):
        needed = width(text[place : word.end()])
        if used + needed > columns and place >= first:
            yield place
            used, needed = margin(text, columns), width(word[0])
        used += needed
        place = word.end()


def _label(text: str, columns: int) -> str:
    found = re.match(_LABEL, text)
    label = found[0] if found is not None else ""
    return label if label.strip() and width(label) <= min(WIDEST_LABEL, columns // 2) else ""
