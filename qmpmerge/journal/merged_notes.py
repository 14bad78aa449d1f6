"""
What is noted beside images once a merge is proved: of those that were put aside, and for whoever looks for the image to start
a VM from.

A note that cannot be written is no reason to fail: each function yields, as sentences for the user, what was not noted.
"""

import errno
import os
import shlex
import time
from collections.abc import Iterator, Mapping

from qmpmerge import folder
from qmpmerge.chain.chain import Image, Inode
from qmpmerge.images import files, notes, stashed
from qmpmerge.images.stashed import Note
from qmpmerge.journal import spared
from qmpmerge.journal.record import Record, look


def was_changed(record: Record, index: int, place: str) -> bool:
    """Whether the image at `index`, whose file is at `place` now, looks otherwise than when it was merged."""
    known = record.seen.get(index, record.before.get(index))
    return known is not None and look(record.chain[index], place) != known


def aside(record: Record, places: Mapping[int, str]) -> Iterator[str]:
    """
    Say durably what was stashed, by its indexes: until now the record did. Without a note `clean` has to compare: yields why
    there is none.
    """
    written: dict[str, list[str]] = {}
    for index, place in places.items():
        try:
            if was_changed(record, index, place):
                raise OSError(errno.EBUSY, "it was changed since it was merged")
            stashed.put(place, _note_of(record, index, place))
            written.setdefault(os.path.dirname(place), []).append(place)
        except OSError as error:
            yield _not_noted(place, error)
    for home, there in written.items():
        try:
            folder.sync(home)
        except OSError as error:
            yield from (_not_noted(place, error) for place in there)


def _note_of(record: Record, index: int, place: str) -> Note:
    base, status = record.plan.receiver, os.stat(place)
    return Note(
        original=record.own_name(index),
        format=record.chain[index].format,
        inode=(status.st_dev, status.st_ino),
        seen=files.seen(place),
        base=base.file,
        base_inode=base.inode,
        verified=record.verified,
        since=time.time(),
        base_seen=files.seen(base.file) if files.is_regular(base.file) else None,
    )


def _not_noted(place: str, error: OSError) -> str:
    return f"no note could be kept beside {place}, so `clean` has to compare it: {error.strerror or error}"


def overlays(record: Record, places: Mapping[str, str]) -> Iterator[str]:
    """
    What lies beside an image tells which overlay in another folder is built on it now; yields why it does not. Those that a
    pull has left at their `places` are built on one another as before.
    """
    base, above = record.plan.base, record.chain.images[record.top :]
    if base is not None and above and base.has_path and above[0].has_path:
        try:
            if notes.is_needed(base.file, above[0].file):
                notes.put_on(base.file, _meant(record, base.file, base), above[0].file)
        except OSError as error:
            yield (
                f"it could not be noted beside {base.file} that {above[0].file} is built on it ({error.strerror or error}): "
                f"`qmpmerge active` finds that only from {above[0].file}"
            )
            return
    stays = places if record.direction == "pull" else {}
    merged = {image.inode[1] for image in record.plan.merged if image.inode is not None and image.file not in stays}
    higher = {image.inode[1] for image in above if image.inode is not None}
    try:
        if base is not None:
            notes.take_away(base.file, merged)
        for index in range(record.base + 1, record.top + 1):
            notes.take_away(record.own_name(index), merged | higher)
    except OSError as error:
        yield f"a note about a merged image could not be removed: {error.strerror or error}"


def _meant(record: Record, name: str, image: Image) -> Inode | None:
    """The file that has this name, where it is the one that the record means."""
    found = files.inode(name)
    return found if found is not None and record.is_inode(found, image) else None


def pulled(record: Record, places: Mapping[str, str]) -> Iterator[str]:
    """
    From which of the images that a pull leaves one came to what it was pulled into, by the folder or a note beside: that stays
    so. Yields why it was not noted. They are not stale: each shows what it always did, and may be anybody's.
    """
    receiver = record.plan.receiver
    for index in range(record.top, record.base, -1):
        image, above = record.chain[index], record.chain[index + 1]
        own = record.own_name(index)
        try:
            if not (image.has_path and above.has_path and _leads_up(own, above)):
                return
            place = places.get(image.file)
            if place is not None and image.slice is None and files.is_regular(place):
                notes.pulled(place, _meant(record, place, image), receiver.file)
        except OSError as error:
            yield (
                f"it could not be noted beside {image.file} that {receiver.file} was built on it ({error.strerror or error}): "
                "to `qmpmerge active` it looks like an image to start from"
            )


def written(record: Record) -> Iterator[str]:
    """
    What notes of earlier pulls beside the receiver say from now on: that one was pulled off it is no answer any more for who
    goes on from there. Yields that, and why it was not written down.
    """
    receiver = record.plan.receiver
    if not (receiver.has_path and files.is_regular(receiver.file)):
        return
    meant = _meant(record, receiver.file, receiver)
    try:
        if record.direction == "pull":
            notes.renew_left(receiver.file, meant, record.before.get(record.top + 1))
            return
        left = notes.end_left(receiver.file, meant)
    except OSError as error:
        yield f"the notes of earlier pulls beside {receiver.file} could not be written anew: {error.strerror or error}"
        return
    if left:
        yield (
            f"others were pulled off {receiver.file}, so `qmpmerge active` does not tell which image goes on from it: once no "
            f"start script names it for them, `rm -f -- {shlex.join(left)}`"
        )


def _leads_up(image: str, above: Image) -> bool:
    """Whether who looks at `image` finds the one above it, which may have lost its name by now."""
    told = {(note.file, note.overlay) for note in notes.above(image)}
    number = above.inode[1] if above.inode is not None else None
    return not notes.is_needed(image, above.file) or any(above.file == file or number == own for file, own in told)


def kept(record: Record, places: Mapping[str, str]) -> Iterator[str]:
    """An image that keeps its name looks like one to start from; yields why it was not noted that it is none."""
    base = record.plan.receiver
    needed, _user = spared.needed(record.plan, merged_too=False) if places else (0, "")
    for index in range(max(record.base, needed) + 1, record.top + 1):
        image = record.chain[index]
        place = places.get(image.file)
        if place is None or image.slice is not None or not files.is_regular(place):
            continue
        try:
            notes.merged(place, _meant(record, place, image), base.file)
        except OSError as error:
            yield (
                f"it could not be noted beside {place} that it was merged ({error.strerror or error}): to `qmpmerge active` "
                "it looks like an image to start from"
            )
