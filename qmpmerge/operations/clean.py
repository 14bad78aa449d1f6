"""
Removing what merges have stashed, once nobody uses or needs it.
"""

import contextlib
import os
import re
import shlex
import time
from collections.abc import Collection
from dataclasses import dataclass

from qmpmerge import folder
from qmpmerge.chain import backing
from qmpmerge.errors import CannotList, CannotRecover, NoSuchStash
from qmpmerge.images import dependents, files, notes, qcow2, stashed
from qmpmerge.images.stashed import Note, original_of
from qmpmerge.journal import merged_files, store
from qmpmerge.journal.store import Disbelieved

_KEPT = re.compile(rf"\.(?P<image>.+){re.escape(notes.MERGED)}", re.DOTALL)
"""Notes beside images that were merged and have kept their names."""


@dataclass(frozen=True)
class Cleaned:
    """A stashed file: `kept` says why it was not removed, None where it was, or would be. `size` is what it takes on disk."""

    file: str
    size: int
    kept: str | None


async def clean(
    paths: Collection["str | os.PathLike[str]"], *, dry_run: bool = False, older_than: float | None = None
) -> list[Cleaned]:
    """
    Remove the stashed files (``NAME.merged``, ``NAME.merged.2``) that `paths` name, or that lie in the folders among them.

    Removed is only what the merge's note, or else a comparison with the image below, proves to be merged; with `older_than`
    (seconds) only what was stashed so long ago. One that a process holds, that an image is still built on, or that an
    unfinished merge may need, stays; so does a symlink, for no merge puts one aside. Notes whose files are gone go too.

    Raises NoSuchStash, CannotList, CannotRecover.
    """
    places = [os.path.abspath(path) for path in paths]
    found = {file: os.lstat(file) for place in places for file in _stashed(place)}
    proofs = {file: await _why_not_proved(file, found) for file in found}
    proved = {file for file, reason in proofs.items() if reason is None}
    done = []
    for file in found:
        reason = why_not(file, proved) or proofs[file] or _why_not_yet(file, older_than)
        data = _data_of(file) if reason is None else []
        if reason is None and not dry_run:
            _remove(file, found[file])
        done += [Cleaned(file, found[file].st_blocks * 512, reason), *data]
    for place in filter(os.path.isdir, () if dry_run else places):
        _forget_what_is_gone(place)
    return done


def _remove(file: str, meant: os.stat_result) -> None:
    """The file first: a note without it is nothing, it without a note would have to be compared. Raises CannotRecover."""
    try:
        with folder.beside(file) as (place, name):
            place.remove(name, folder.inode_in(meant))
            note = os.path.basename(stashed.note_path(file))
            place.remove(note, place.inode_of(note))
            place.sync()
    except OSError as error:
        raise CannotRecover(file=file, reason=error.strerror or str(error)) from None


def _forget_what_is_gone(path: str) -> None:
    """Notes of ours about files that somebody else has removed, or that we had when we were killed."""
    kept = [(note, os.path.join(path, name)) for note, name in files.matching(path, _KEPT)]
    for note, file in (*stashed.noted_in(path), *kept):
        if not os.path.lexists(file):
            with contextlib.suppress(OSError, files.Untrusted), folder.beside(note) as (place, name):
                files.open_own(place, name, stashed.LARGEST).remove()


def _data_of(file: str) -> list[Cleaned]:
    """
    The external data file of an image that goes. It stays: nothing but that image says whose it is, and anybody may have
    written what that says.
    """
    try:
        data = qcow2.data_path(dependents.image_at(file))
    except OSError:
        data = None
    if data is None:
        return []
    return [
        Cleaned(data, os.stat(data).st_blocks * 512, f"it held the data of {file}: remove it if nothing else needs it")
    ]


def _stashed(path: str) -> list[str]:
    if os.path.isdir(path):
        try:
            with os.scandir(path) as entries:
                return sorted(entry.path for entry in entries if original_of(entry.name) and not entry.is_dir())
        except OSError as error:
            raise CannotList(folder=path, reason=error.strerror or str(error)) from None
    if original_of(path) is None or not os.path.lexists(path):
        raise NoSuchStash(path=path)
    return [path]


async def _why_not_proved(file: str, found: Collection[str]) -> str | None:
    """Why it is not known that a merge has put it aside, None where it is."""
    note = stashed.look(file)
    doubt = stashed.lost(note) if isinstance(note, Note) else note
    if doubt is None:
        return None
    if os.path.islink(file):
        return f"it is a symlink, and no merge puts one aside: `rm -- {shlex.quote(file)}` if nobody needs it"
    if not _is_image(file):
        return "it is no qcow2 image"
    from qmpmerge.recovery import stray

    return await stray.why_not_merged(file, [other for other in found if other != file and _is_image(other)], doubt)


def _is_image(file: str) -> bool:
    try:
        return not os.path.islink(file) and qcow2.read(file) is not None
    except OSError:
        return False


def _why_not_yet(file: str, older_than: float | None) -> str | None:
    if older_than is None:
        return None
    note = stashed.look(file)
    if not isinstance(note, Note):
        return "when it was stashed is not known"
    is_old = time.time() - note.since >= older_than
    return None if is_old else f"it was stashed at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(note.since))}"


def why_not(file: str, proved: Collection[str] = ()) -> str | None:
    """Why a stashed file must stay, as long as the `proved` ones need not; None where nothing speaks against removing it."""
    needed = _needed_by(file)
    if needed is not None or os.path.islink(file):
        return needed
    try:
        if qcow2.read(file) is None:
            return "it is no qcow2 image"
        user = _built_on(file, proved)
    except OSError as error:
        return error.strerror or str(error)
    return f"{user} is built on it" if user is not None else merged_files.in_use(file)


def _needed_by(file: str) -> str | None:
    """The merge that was not finished and may need the file; what is not known is no reason to remove it."""
    for found in store.in_folder(os.path.dirname(file)):
        if isinstance(found, Disbelieved):
            return f"{found.path} is not believed ({found.reason}), and may tell of a merge that needs it: {found.cure}"
        if file in found.away.values():
            return "a merge that was not finished may need it"
    return None


def _built_on(file: str, proved: Collection[str]) -> str | None:
    """
    An image in the folder whose header leads to the file, or to a name that only this file had and nobody has now; no stashed
    one. Raises OSError.
    """
    with os.scandir(os.path.dirname(file)) as entries:
        others = [entry.path for entry in entries if entry.path != file and entry.is_file()]
    images = [image for image in others if image not in proved and not stashed.is_stashed(image)]
    return next((image for image in images if _leads_to(image, file)), None)


def _leads_to(image: str, file: str) -> bool:
    try:
        header = qcow2.read(image)
    except OSError:
        return False
    name = backing.named_path(header.backing) if header is not None and header.backing is not None else None
    if name is None:
        return False
    path = files.real(os.path.join(os.path.dirname(image), name))
    if os.path.lexists(path):
        return files.inode(path) == files.inode(file)
    return os.path.normpath(path) == original_of(file)
