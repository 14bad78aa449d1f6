"""
Which records tell of an image, or of what lies in a folder: also those beside an active image that lies in another folder.
"""

import os
import re
from collections.abc import Iterator

from qmpmerge.chain.chain import Image
from qmpmerge.images import files, notes, overlays
from qmpmerge.images.formats import Found as OnDisk
from qmpmerge.journal import locks, store
from qmpmerge.journal.store import Disbelieved, Found

_LEADING_AWAY = re.compile(r"\.(?P<image>.+?)(?:\.[0-9a-f]+\.qmpmerge-overlay|\.qmpmerge-lock)", re.DOTALL)
"""What lies beside an image, and may say that a record lies elsewhere."""


def concerned(path: str) -> list[Found]:
    """
    The records of a folder, or those that tell, or may tell, of the image at `path` or of one that is built on it. Followed are
    headers, the notes about overlays, and what a lock says: as `active` does.
    """
    if not os.path.isdir(path):
        return _once(_about(path))
    images = dict.fromkeys(os.path.join(path, image) for _file, image in files.matching(path, _LEADING_AWAY))
    return _once([*store.in_folder(path), *(one for image in images for one in _about(image))])


def _about(image: str) -> list[Found]:
    above = _above(image)
    inodes = {found.inode for found in above} | {inode for inode in [files.inode(image)] if inode is not None}
    names = {image, *(found.file for found in above)}
    return [
        found
        for folder in dict.fromkeys(_folders(names))
        for found in store.in_folder(folder)
        if found.concerns(inodes) or (not isinstance(found, Disbelieved) and any(map(found.is_called, names)))
    ]


def _above(image: str) -> list[OnDisk]:
    try:
        return list(overlays.above(image, os.path.dirname(image)).images.values())
    except OSError:  # it may have lost its name
        return []


def _folders(names: set[str]) -> Iterator[str]:
    """Where the record of a merge of these images can lie. A note counts though its overlay has just lost its name."""
    for name in sorted(names):
        yield from (os.path.dirname(name), os.path.dirname(files.real(name)))
        record = locks.noted(Image(name, "raw", 0)).record
        if record is not None:
            yield os.path.dirname(record)
        try:
            yield from (os.path.dirname(note.file) for note in notes.above(name) if note.file)
        except OSError:
            continue


def _once(found: list[Found]) -> list[Found]:
    return list({one.path: one for one in found}.values())
