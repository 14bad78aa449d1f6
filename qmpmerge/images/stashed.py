"""
Which files are images that a merge has put aside: `look` alone tells them from what is only called like one.

A name proves nothing: somebody's image may be called so, and be in use tomorrow. So a note lies beside a stashed file, from
before the merge's record goes until the file does. It is believed by the rules for a record, and only of the very file that
it was written about, unchanged since.
"""

import errno
import itertools
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qmpmerge import folder
from qmpmerge.chain.chain import Inode
from qmpmerge.folder import Folder
from qmpmerge.images import files
from qmpmerge.images.files import Seen
from qmpmerge.value import Value

STASHED = ".merged"
SCHEMA = 1
_START, _END = ".", ".qmpmerge-stashed"
LARGEST = 64 * 1024
NO_NOTE = "nothing but its name says that a merge has stashed it"


class Note(Value):
    """
    What a merge has said of a file that it has stashed: its name before, which file it is and what it looked like, the base
    that holds its data since, whether both were compared, and when that was, in seconds since 1970.
    """

    original: str
    format: str
    inode: Inode
    seen: Seen
    base: str
    base_inode: Inode | None
    verified: bool
    since: float
    base_seen: Seen | None = None
    """What the base looked like when the note was written; None where it is no regular file."""


def original_of(name: str) -> str | None:
    """What a stashed file was called; None for a name that is not one of a stashed file."""
    stem, dot, number = name.rpartition(".")
    if dot and number.isdigit():
        name = stem
    return name.removesuffix(STASHED) if name.endswith(STASHED) else None


def names(file: str) -> Iterator[str]:
    """The names under which a file can be stashed, there or not: ``NAME.merged``, ``NAME.merged.2``, and so on."""
    yield f"{file}{STASHED}"
    yield from (f"{file}{STASHED}.{number}" for number in itertools.count(2))


def names_of(file: str) -> Iterator[str]:
    """The names under which a file of this name may have been stashed."""
    return itertools.takewhile(os.path.lexists, names(file))


def note_path(path: str) -> str:
    """Where the note about a stashed file lies."""
    place, name = os.path.split(path)
    return os.path.join(place, f"{_START}{name}{_END}")


def noted_in(place: str) -> Iterator[tuple[str, str]]:
    """The notes in a folder, each with the file that it is about, there or not. Raises OSError."""
    for name in sorted(os.listdir(place)):
        if name.startswith(_START) and name.endswith(_END):
            yield os.path.join(place, name), os.path.join(place, name[len(_START) : -len(_END)])


def write(path: str, note: Note) -> None:
    """`put`, durable on return. Raises OSError."""
    put(path, note).sync()


def put(path: str, note: Note) -> Folder:
    """
    Put a note beside the stashed file at `path`; durable after the `sync` of the folder that is returned. Raises OSError, also
    where it would not be believed.
    """
    place, name = folder.split(note_path(path))
    file = place.put(name, encode(note), folder.NOTE)
    known = look(path)
    if not isinstance(known, Note):
        file.remove()
        raise OSError(errno.EPERM, known, path)
    return place


def lead_on(place: str, gone: str, inode: int, into: str, into_inode: Inode, into_seen: Seen | None) -> None:
    """
    Have the notes in a folder that name for their base the image `gone`, which goes itself, name the one that has its data.
    Raises OSError.
    """
    for _path, file in noted_in(place):
        note = look(file)
        is_led = isinstance(note, Note) and note.base_inode is not None and note.base_inode[1] == inode
        if isinstance(note, Note) and is_led and files.real(note.base) == gone:
            write(file, replace(note, base=into, base_inode=into_inode, base_seen=into_seen))


def encode(note: Note) -> bytes:
    """A note as it is written."""
    entry = {"schema": SCHEMA, **vars(note), "seen": _encoded(note.seen), "base_seen": _encoded(note.base_seen)}
    return json.dumps(entry).encode()


def _encoded(seen: Seen | None) -> tuple[int, int] | None:
    return None if seen is None else (seen.size, seen.changed)


def look(path: str) -> Note | str:
    """What is known of a file that a merge has put aside; of any other why it is taken for somebody's."""
    original = original_of(os.path.basename(path))
    if not original:
        return "it is not called like a stashed file"
    try:
        note = _note(files.read_own(note_path(path), LARGEST))
        status = os.lstat(path)
    except FileNotFoundError:
        return NO_NOTE
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, files.Untrusted | OSError) else "it makes no sense"
        return f"{note_path(path)} is not believed ({reason})"
    # Device numbers can change with a reboot.
    is_it = (
        stat.S_ISREG(status.st_mode) and status.st_ino == note.inode[1] and os.path.basename(note.original) == original
    )
    if not is_it:
        return f"{note_path(path)} is about another file"
    return note if files.seen(path) == note.seen else "it was written to since a merge stashed it"


def lost(note: Note) -> str | None:
    """
    Why it is not known that the base has what the stashed file held; None where it is there, or was merged itself into one that
    is. A base may have been written to since, but it grows no smaller, and its time does not go back.
    """
    seen: set[str] = set()
    while True:
        reason = _base_lost(note)
        seen.add(note.base)
        told = [] if reason is None else [look(path) for path in names_of(note.base)]
        aside = [
            one
            for one in told
            if isinstance(one, Note) and note.base_inode is not None and one.inode[1] == note.base_inode[1]
        ]
        if not aside or aside[0].base in seen:
            return reason
        note = aside[0]


def _base_lost(note: Note) -> str | None:
    merged = f"{note.base}, which has its data since,"
    try:
        status = os.stat(note.base)
    except (OSError, ValueError) as error:
        return f"{merged} cannot be looked at ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISBLK(status.st_mode) and note.base_seen is None:
        return None  # known by its name alone: the inode of a device is another after a reboot
    if note.base_inode is None or status.st_ino != note.base_inode[1]:
        return f"{merged} is another file now"
    if note.base_seen is not None and status.st_size < note.base_seen.size:
        return f"{merged} has become smaller since"
    if note.base_seen is not None and status.st_mtime_ns < note.base_seen.changed:
        return f"{merged} is older than the merge"
    return None


def is_stashed(path: str) -> bool:
    """Whether a merge has put this very file aside, and nobody has written to it since."""
    return isinstance(look(path), Note)


def of(file: str) -> str | None:
    """Where the file is that a merge has stashed, and that had this name."""
    return next(filter(is_stashed, names_of(file)), None)


def _note(data: bytes) -> Note:
    entry = json.loads(data)
    if entry["schema"] != SCHEMA:
        raise files.Untrusted(f"it is of schema {entry['schema']!r}, this qmpmerge reads schema {SCHEMA}")
    base_inode, base_seen = entry["base_inode"], entry.get("base_seen")
    return Note(
        original=str(entry["original"]),
        format=str(entry["format"]),
        inode=_pair(entry["inode"]),
        seen=Seen(*_pair(entry["seen"])),
        base=str(entry["base"]),
        base_inode=None if base_inode is None else _pair(base_inode),
        verified=bool(entry["verified"]),
        since=float(entry["since"]),
        base_seen=None if base_seen is None else Seen(*_pair(base_seen)),
    )


def _pair(entry: Any) -> tuple[int, int]:
    return int(entry[0]), int(entry[1])
