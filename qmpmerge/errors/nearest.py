"""
Which of the names that are there a mistyped one was meant to be.

Small and our own: some of these errors are made, and caught, while a job is at work, when nothing new is imported, and Python's
`difflib` is too large to be there at every start.
"""

import re
import shlex
from collections.abc import Iterable

LONGEST = 64
"""Characters of a name whose spelling is compared: the time grows with the square."""

LETTERS = 3
"""Of so many one may be wrong."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """
    The one that differs in case alone, else the one of the fewest slips; None where none is near, or where two are.

    Names with different numbers are those of different things, however alike they are; a number can be forgotten. What files
    end with is left out, since they are alike in it.
    """
    names = list(dict.fromkeys(known))
    alike = [name for name in names if name.casefold() == word.casefold()] or _fewest_slips(word, names)
    return alike[0] if len(alike) == 1 else None


def question(name: str | None) -> str:
    """What an error asks before all else it says, "" where nothing was near."""
    return "" if name is None else f"did you mean `{shlex.quote(name)}`? "


def _fewest_slips(word: str, names: list[str]) -> list[str]:
    wanted = _stem(word)
    if len(wanted) > LONGEST:
        return []
    allowed = len(wanted) // LETTERS
    stems = {name: _stem(name) for name in names}
    found = {
        name: slips(wanted, stem)
        for name, stem in stems.items()
        if abs(len(stem) - len(wanted)) <= allowed and _numbers(wanted) in ([], _numbers(stem))
    }
    fewest = min(found.values(), default=allowed + 1)
    return [name for name, count in found.items() if count == fewest <= allowed]


def slips(one: str, other: str) -> int:
    """How many letters are missing, too many, wrong, or in each other's place."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for column, its in enumerate(other, 1):
            count = min(last[column] + 1, line[-1] + 1, last[column - 1] + (letter != its))
            if before and column > 1 and (letter, one[row - 2]) == (other[column - 2], its):
                count = min(count, before[column - 2] + 1)
            line.append(count)
        before, last = last, line
    return last[-1]


def _stem(name: str) -> str:
    return re.sub(r"\.[a-z]\w*\Z", "", name.casefold())


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name)
