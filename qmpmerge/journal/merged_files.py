"""
What becomes of the files that a merge leaves over: stashed under another name, removed, or left alone.

After a pivot the old active image still opens and shows older data, so by default it loses its name. Only names that the
record lists are touched, and only while they lead to the very files that it means; nothing is overwritten.
"""

import contextlib
import errno
import os
from collections.abc import Collection, Mapping

from qmpmerge import folder
from qmpmerge.chain.chain import Image, Inode
from qmpmerge.chain.outcome import MergedFile
from qmpmerge.folder import Folder
from qmpmerge.images import dependents, files, qcow2, stashed
from qmpmerge.journal import leads, merged_notes, spared
from qmpmerge.journal.record import Record


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


def finish(
    record: Record, doubtful: Mapping[int, str], search: Collection[str] = ()
) -> tuple[list[MergedFile], list[str]]:
    """
    Do what the policy says with all merged files, base first, but for those that are `spared`, as for these `spared.doubts`;
    also what went otherwise, as sentences for the user.

    The merge is proved and durable by now. Done before, or in part, it goes on from there. Nothing is raised: a file
    that cannot be renamed stays, and that is said.
    """
    kept = spared.kept(record, doubtful, search)
    refused = _names_taken_away(record, kept)
    done: list[MergedFile] = []
    hints: list[str] = []
    aside: dict[int, str] = {}
    for index in range(record.base + 1, record.top + 1):
        image = record.chain[index]
        try:
            if index in kept:
                hints.append(f"{image.file} stays where it is: {kept[index]}")
                obstacle = kept[index] if record.policy == "delete" else None
                file = MergedFile(image.file, "keep", record.place(index) or image.file, obstacle)
            else:
                if index in refused:
                    raise refused[index]
                file = _dealt_with(record, index, aside, hints)
            done += [*_data_dealt_with(record, image, file, hints), file]
        except OSError as error:
            obstacle = error.strerror or str(error) if record.policy == "delete" else None
            done.append(MergedFile(image.file, "keep", record.place(index), obstacle))
            hints.append(f"{image.file} could not be renamed and stays where it is: {error.strerror or error}")
    hints += merged_notes.aside(record, aside)
    kept_at = {one.file: one.now for one in done if one.action == "keep" and one.now is not None}
    notes_kept = merged_notes.pulled if record.direction == "pull" else merged_notes.kept
    hints += [*notes_kept(record, kept_at), *merged_notes.overlays(record, kept_at), *merged_notes.written(record)]
    return done, hints


def _names_taken_away(record: Record, kept: Collection[int]) -> dict[int, OSError]:
    """All that are to lose their names, durably: each folder is synced once. Returns by their indexes why some have not."""
    refused, moved = dict[int, OSError](), dict[str, list[int]]()
    away = {} if record.policy == "keep" else record.away
    for index in range(record.base + 1, record.top + 1):
        if index in away and index not in kept and record.place(index) == record.own_name(index):
            try:
                moved.setdefault(os.path.dirname(take_away(record, index)), []).append(index)
            except OSError as error:
                refused[index] = error
    for place, indexes in moved.items():
        try:
            folder.sync(place)
        except OSError as error:
            refused |= dict.fromkeys(indexes, error)
    return refused


def _dealt_with(record: Record, index: int, aside: dict[int, str], hints: list[str]) -> MergedFile:
    """What became of an image that could lose its name; where it stays under another one that is noted in `aside`."""
    image, own = record.chain[index], record.own_name(index)
    place = record.place(index)
    if image.slice is not None:
        hints.append(f"{image.file} stays where it is: only a part of it ({image.slice}) was merged")
    if place is None and image.has_path and (image.inode is not None or files.inode(own) is None):
        return MergedFile(image.file, "gone", None)
    if record.policy == "keep" or index not in record.away or place is None:
        return MergedFile(image.file, "keep", place or image.file)
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
    aside[index] = place
    return MergedFile(image.file, "stash", place, obstacle)


def _remove(record: Record, image: Image, path: str) -> None:
    """Take its name away from the file of this image, durably. Raises OSError."""
    with folder.beside(path) as (place, name):
        place.remove(name, _seen(record, image, place, name))
        place.sync()


def why_not_delete(record: Record, index: int, place: str) -> str | None:
    """Why the stashed file at `place` must not be removed; None where nothing speaks against it."""
    if not record.verified:
        return spared.NOT_ALL_COMPARED if record.direction == "commit" else spared.NOT_COMPARED
    if index not in (*record.seen, *record.before) or merged_notes.was_changed(record, index, place):
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
