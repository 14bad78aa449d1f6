"""
Which files are images that a merge has put aside: told by a name, and by a mark that such a file was given with it.

A name alone proves nothing: somebody's image may be called so, and be in use tomorrow. The mark is an extended attribute;
where the filesystem has none, a stashed file is taken for anybody's.
"""

import contextlib
import os

STASHED = ".merged"
_MARK = "user.qmpmerge.stashed"


def original_of(name: str) -> str | None:
    """What a stashed file was called; None for a name that is not one of a stashed file."""
    stem, dot, number = name.rpartition(".")
    if dot and number.isdigit():
        name = stem
    return name.removesuffix(STASHED) if name.endswith(STASHED) else None


def mark(file: str, name: str) -> None:
    """Mark a file that is about to get this `name` of a stashed one."""
    with contextlib.suppress(OSError):
        os.setxattr(file, _MARK, os.fsencode(original_of(os.path.basename(name)) or ""))


def is_stashed(path: str) -> bool:
    """Whether a merge has put the file aside under this very name, or one with another number."""
    original = original_of(os.path.basename(path))
    if not original:
        return False
    try:
        return os.getxattr(path, _MARK) == os.fsencode(original)
    except OSError:
        return False
