"""
What can go wrong, sorted by what the caller does next.

Names are handed on from the files of this wing when they are first used; `qmpmerge.errors.base` draws the tree.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpmerge.errors.base import *  # noqa: F403
    from qmpmerge.errors.ended import *  # noqa: F403
    from qmpmerge.errors.left import *  # noqa: F403
    from qmpmerge.errors.refused import *  # noqa: F403
    from qmpmerge.errors.request import *  # noqa: F403
    from qmpmerge.errors.unreachable import *  # noqa: F403

_FILES = ("base", "request", "refused", "unreachable", "left", "ended")


if not TYPE_CHECKING:  # a checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name == "__all__":
            return [public for public in dir(importlib.import_module(__name__)) if not public.startswith("_")]
        if not name.startswith("_"):
            for file in _FILES:
                value = vars(importlib.import_module(f"{__name__}.{file}")).get(name)
                if value is not None:
                    globals()[name] = value
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    known = [vars(importlib.import_module(f"{__name__}.{file}")) for file in _FILES]
    errors = {name for names in known for name, value in names.items() if hasattr(value, "verdict")}
    return [
        *sorted(errors),
        "EXIT_CODES",
        "EXIT_MEANINGS",
        "FORCEABLE",
        *(name for name, value in globals().items() if name.startswith("__") and not callable(value)),
    ]
