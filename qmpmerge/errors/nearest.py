"""Which of the names that are there a mistyped one was meant to be. Imported where an error is told, and never before."""

import difflib
import re
import shlex
from collections.abc import Iterable

LONGEST = 255
"""Characters of a name that is compared: the time grows with the square."""

CLOSE = 0.6
"""As `difflib` measures it, where 1 is the same."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """
    The one that differs in case alone, else the most similar; None where none is, or where two are so alike.

    Names that differ in a number are names of two things, however alike; and what files are called alike for is their ending.
    """
    names = list(dict.fromkeys(name for name in known if len(name) <= LONGEST))
    if len(word) > LONGEST:
        return None
    alike = [name for name in names if name.casefold() == word.casefold()]
    return _only(alike) if alike else _only(_most_similar(word, names))


def question(name: str | None) -> str:
    """What an error asks before all else it says, "" where nothing was near."""
    return "" if name is None else f"did you mean `{shlex.quote(name)}`? "


def _most_similar(word: str, names: list[str]) -> list[str]:
    wanted = _stem(word)
    similar = {
        name: difflib.SequenceMatcher(None, _stem(name), wanted).ratio()
        for name in names
        if _numbers(name) == _numbers(word)
    }
    best = max(similar.values(), default=0.0)
    return [name for name, ratio in similar.items() if ratio == best >= CLOSE]


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _stem(name: str) -> str:
    return re.sub(r"\.[a-z]\w*\Z", "", name.casefold())


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", _stem(name))
