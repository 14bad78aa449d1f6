"""
What becomes of the files that a merge leaves over: stashed under another name, removed, or left alone.

After a pivot the old active image still opens and shows older data, so by default it loses its name. Only names that the
record lists are touched, and only while they lead to the very files that it means; nothing is overwritten.
"""

import contextlib
import errno
import os
import shlex
import time
from collections.abc import Collection, Iterator, Mapping

from qmpmerge import folder
from qmpmerge.chain.chain import Image, Inode
from qmpmerge.chain.outcome import MergedFile
from qmpmerge.folder import Folder
from qmpmerge.images import dependents, files, notes, qcow2, stashed
from qmpmerge.images.stashed import Note
from qmpmerge.journal import leads, spared
from qmpmerge.journal.record import Record, look


def take_away(record: Record, index: int) -> str:
    """
    Rename the image at `index` to its stashed name, and return that. Not durable before its folder is synced.

    Raises OSError, also when the name leads to another file by now: one that was put there at that very moment gets its
    name back.
    """
    image, (place, old) = record.chain[index], folder.split(record.own_name(index))
    new = os.path.basename(record.away[index])
    place.rename(old, new, _seen(record, image, place, old))
    try:
        _seen(record, image, place, new)
    except FileNotFoundError:
        there = place.inode_of(new)
        if there is not None:
            place.rename(new, old, there)
        raise
    return record.away[index]


def _seen(record: Record, image: Image, place: Folder, name: str) -> Inode:
    """Which file has the name: the one that the record means. Raises OSError."""
    inode = place.inode_of(name)
    if inode is None or not record.is_inode(inode, image):
        raise FileNotFoundError(errno.ENOENT, f"{os.path.join(place.path, name)} is another file now")
    return inode


def give_back(record: Record, index: int) -> bool:
    """Give a stashed image its own name again; False where it has it already. Durable. Raises OSError."""
    away, own = record.place(index), record.own_name(index)
    if away is None or away == own:
        return False
    place, name = folder.split(away)
    place.rename(name, os.path.basename(own), _seen(record, record.chain[index], place, name))
    note = os.path.basename(stashed.note_path(away))
    place.remove(note, place.inode_of(note))
    place.sync()
    return True


def finish(record: Record, search: Collection[str] = ()) -> tuple[list[MergedFile], list[str]]:
    """
    Do what the policy says with all merged files, base first, but for those that are `spared`; also what went otherwise, as
    sentences for the user.

    The merge is proved and durable by now. Done before, or in part, it goes on from there. Nothing is raised: a file
    that cannot be renamed stays, and that is said.
    """
    kept = spared.kept(record, search)
    done: list[MergedFile] = []
    hints: list[str] = []
    for index in range(record.base + 1, record.top + 1):
        image = record.chain[index]
        try:
            if index in kept:
                hints.append(f"{image.file} stays where it is: {kept[index]}")
                obstacle = kept[index] if record.policy == "delete" else None
                file = MergedFile(image.file, "keep", record.place(index) or image.file, obstacle)
            else:
                file = _dealt_with(record, index, hints)
            done += [*_data_dealt_with(record, image, file, hints), file]
        except OSError as error:
            obstacle = error.strerror or str(error) if record.policy == "delete" else None
            done.append(MergedFile(image.file, "keep", record.place(index), obstacle))
            hints.append(f"{image.file} could not be renamed and stays where it is: {error.strerror or error}")
    kept_at = {one.file: one.now for one in done if one.action == "keep" and one.now is not None}
    notes_kept = _note_pulled if record.direction == "pull" else _note_kept
    hints += [*notes_kept(record, kept_at), *_note_overlays(record, kept_at), *_note_written(record)]
    return done, hints


def _dealt_with(record: Record, index: int, hints: list[str]) -> MergedFile:
    image, own = record.chain[index], record.own_name(index)
    place = record.place(index)
    if image.slice is not None:
        hints.append(f"{image.file} stays where it is: only a part of it ({image.slice}) was merged")
    if place is None and image.has_path and (image.inode is not None or files.inode(own) is None):
        return MergedFile(image.file, "gone", None)
    if record.policy == "keep" or index not in record.away or place is None:
        return MergedFile(image.file, "keep", place or image.file)
    if place == own:
        place = take_away(record, index)
        with folder.beside(place) as (kept, _name):
            kept.sync()
    if own != image.file:
        hints.append(f"{image.file} leads nowhere now: it is a symlink to {own}, which was merged")
    reason = leads.why_not_led_on(record, index)
    reason = (reason or why_not_delete(record, index, place)) if record.policy == "delete" else "it is to be stashed"
    if reason is None:
        _remove(record, image, place)  # it took a while to find out; from here on nobody can close the gap
        return MergedFile(image.file, "delete", None)
    obstacle = reason if record.policy == "delete" else None
    if obstacle is not None:
        hints.append(f"{place} was not deleted: {obstacle}")
    _note(record, index, place, hints)
    return MergedFile(image.file, "stash", place, obstacle)


def _remove(record: Record, image: Image, path: str) -> None:
    """Take its name away from the file of this image, durably. Raises OSError."""
    with folder.beside(path) as (place, name):
        place.remove(name, _seen(record, image, place, name))
        place.sync()


def _note(record: Record, index: int, place: str, hints: list[str]) -> None:
    """Say durably what was stashed: until now the record did. Without a note `clean` has to compare."""
    image, base = record.chain[index], record.plan.receiver
    try:
        if _was_changed(record, index, place):
            raise OSError(errno.EBUSY, "it was changed since it was merged")
        status = os.stat(place)
        note = Note(
            original=record.own_name(index),
            format=image.format,
            inode=(status.st_dev, status.st_ino),
            seen=files.seen(place),
            base=base.file,
            base_inode=base.inode,
            verified=record.verified,
            since=time.time(),
            base_seen=files.seen(base.file) if files.is_regular(base.file) else None,
        )
        stashed.write(place, note)
    except OSError as error:
        hints.append(f"no note could be kept beside {place}, so `clean` has to compare it: {error.strerror or error}")


def _was_changed(record: Record, index: int, place: str) -> bool:
    known = record.seen.get(index, record.before.get(index))
    return known is not None and look(record.chain[index], place) != known


# --- notes --------------------------------------------------------------------------------------------------------


def _note_overlays(record: Record, places: Mapping[str, str]) -> Iterator[str]:
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


def _note_pulled(record: Record, places: Mapping[str, str]) -> Iterator[str]:
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


def _note_written(record: Record) -> Iterator[str]:
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


def _note_kept(record: Record, places: Mapping[str, str]) -> Iterator[str]:
    """An image that keeps its name looks like one to start from; yields why it was not noted that it is none."""
    base = record.plan.receiver
    needed, _user = spared.needed(record, merged_too=False) if places else (0, "")
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


def why_not_delete(record: Record, index: int, place: str) -> str | None:
    """Why the stashed file at `place` must not be removed; None where nothing speaks against it."""
    if not record.verified:
        return (
            "it was not compared with the base" if record.direction == "commit" else "what was copied was not compared"
        )
    if index not in (*record.seen, *record.before) or _was_changed(record, index, place):
        return "it was changed since it was merged"
    return spared.in_use(place)


# --- data files ---------------------------------------------------------------------------------------------------


def _data_dealt_with(record: Record, image: Image, done: MergedFile, hints: list[str]) -> list[MergedFile]:
    """
    The external data file of a merged image goes with it; beside a stashed one it stays, which would not open without it.

    Removed is only what QEMU had open as the data of this very image. Nothing is raised: the image has been dealt with.
    """
    data = image.data
    place = files.real(data.file) if data is not None and data.has_path else None
    if data is None or place is None or not record.is_file(place, data):
        return [] if data is None else [MergedFile(data.file, "keep" if place is None else "gone", None)]
    if record.policy == "delete" and record.verified and done.now is None:
        reason = _remove_data(record, data, place)
        if reason is None:
            return [MergedFile(data.file, "delete", None)]
        hints.append(f"{place}, which held the data of {image.file}, was not deleted: {reason}")
    elif done.now is not None:
        hints.append(f"{place} holds the data of {done.now}: neither is of use without the other")
    return [MergedFile(data.file, "keep", place)]


def _remove_data(record: Record, data: Image, place: str) -> str | None:
    """Remove a data file whose image is gone; returns why it had to stay."""
    others = [*record.chain, *(image.data for image in record.chain if image.data is not data)]
    is_shared = data.inode in {other.inode for other in others if other is not None}
    if data.slice is not None or not files.is_regular(place) or is_shared:
        return "it is not this image's alone"
    users = [found.file for found in dependents.look_now([data], record.chain).dependents] or _naming(place)
    reason = f"{users[0]} names it" if users else spared.in_use(place)
    if reason is None:
        try:
            _remove(record, data, place)
        except OSError as error:
            return error.strerror or str(error)
    return reason


def _naming(place: str) -> list[str]:
    """The images in the folder of this file whose headers name it for their data."""
    found = []
    for entry in dependents.files(os.path.dirname(place)):
        with contextlib.suppress(OSError):
            data = qcow2.data_path(dependents.image_at(entry.path))
            if data is not None and files.inode(data) == files.inode(place):
                found.append(entry.path)
    return found
