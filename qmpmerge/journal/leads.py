"""
Where the data of an image has gone that goes itself: the notes that lead to it are led on first, or they would lead nowhere.

Nobody could tell then from which image a VM must be started, nor whether what an earlier merge has stashed may go.
"""

import os
from collections.abc import Iterable

from qmpmerge.images import files, notes, stashed
from qmpmerge.images.stashed import Note
from qmpmerge.journal.record import Record


def why_not_led_on(record: Record, index: int) -> str | None:
    """
    Lead on what leads to the merged image at `index`, whose data the receiver has, proved and durable; returns why notes still
    lead to it, which only stashed leads on from there.
    """
    try:
        _lead_on(record, index)
    except OSError as error:
        return f"a note that leads to it could not be written anew: {error.strerror or error}"
    return None


def _lead_on(record: Record, index: int) -> None:
    gone, receiver = record.chain[index], record.plan.receiver
    if gone.inode is None or receiver.inode is None:
        return
    seen = files.seen(receiver.file) if files.is_regular(receiver.file) else None
    own = [record.own_name(number) for number, image in enumerate(record.chain, 1) if image.has_path]
    for place in _folders(own):
        notes.lead_on(place, record.own_name(index), gone.inode[1], [(receiver.file, receiver.inode[1])])
        stashed.lead_on(place, record.own_name(index), gone.inode[1], receiver.file, receiver.inode, seen)


def lead_on_from_stashed(file: str) -> None:
    """Before a stashed file goes: to where its own note leads. Raises OSError."""
    note = stashed.look(file)
    if not isinstance(note, Note) or note.base_inode is None:
        return
    for place in _folders([file, note.base]):
        notes.lead_on(place, note.original, note.inode[1], [(note.base, note.base_inode[1])])
        stashed.lead_on(place, note.original, note.inode[1], note.base, note.base_inode, note.base_seen)


def _folders(images: Iterable[str]) -> list[str]:
    """Those of regular files; where one is no more, no note is either."""
    places = dict.fromkeys(os.path.dirname(files.real(file)) for file in images if not files.is_device(file))
    return [place for place in places if os.path.isdir(place)]
