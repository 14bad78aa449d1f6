"""
What a caller gives, looked at before anything is done: a mistake in a program is a ValueError, and does nothing.

A `str` is a collection of `str` to Python and to type checkers, so `allow="/images"` would allow ``/``, which is every file.
"""

import os
from collections.abc import Collection
from typing import Any, get_args

from qmpmerge.errors import FORCEABLE

Paths = Collection[str | os.PathLike[str]] | str | os.PathLike[str]
"""Files and folders; one alone stands for itself."""


def paths(given: Paths) -> list[str]:
    """Each of them; a single path is that one."""
    return [os.fspath(given)] if isinstance(given, str | os.PathLike) else [os.fspath(path) for path in given]


def forced(names: Collection[str]) -> frozenset[str]:
    """The refusals to be overridden, by the names of `FORCEABLE`. Raises ValueError."""
    given = frozenset([names] if isinstance(names, str) else names)
    for name in given:
        see(name, FORCEABLE, "force")
    return given


def see(value: object, known: Any, what: str) -> None:
    """Raise ValueError where `value` is none of `known`, a collection or a Literal."""
    allowed = get_args(known) or tuple(known)
    if value not in allowed:
        raise ValueError(f"{what} is one of {', '.join(map(repr, allowed))}, and not {value!r}")


def see_amount(value: object, what: str, *, least: float = 0) -> None:
    """Raise ValueError where `value` is neither None nor a number from `least` up."""
    if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and value >= least):
        raise ValueError(f"{what} is a number from {least} up, and not {value!r}")


def see_count(value: object, what: str, *, least: int = 0) -> None:
    """Raise ValueError where `value`, bytes or how many, is neither None nor a whole number from `least` up."""
    see_amount(value, what, least=least)
    if isinstance(value, float):
        raise ValueError(f"{what} is a whole number, and not {value!r}")
