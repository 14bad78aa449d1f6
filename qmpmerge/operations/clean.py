"""
Removing what merges have stashed, once nobody uses or needs it.
"""

import contextlib
import os
import re
import shlex
import time
from collections.abc import Collection
from typing import Literal

from qmpmerge import folder, given
from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain
from qmpmerge.engine import log
from qmpmerge.errors import CannotList, CannotRecover, NoSuchStash
from qmpmerge.given import Paths
from qmpmerge.images import backing_names, dependents, files, notes, qcow2, stashed
from qmpmerge.images.stashed import Note, original_of
from qmpmerge.journal import leads, spared, store
from qmpmerge.journal.store import Disbelieved
from qmpmerge.value import Value

_KEPT = re.compile(rf"\.(?P<image>.+){re.escape(notes.MERGED)}", re.DOTALL)
"""Notes beside images that were merged and have kept their names."""


class Cleaned(Value):
    """
    A stashed file: `obstacle` says why it was not removed, None where it was, or would be. `allocated` is what it takes on its
    filesystem, in bytes.
    """

    file: str
    allocated: int
    obstacle: str | None

    @property
    def action(self) -> Literal["delete", "keep"]:
        """What was done with it, or would be."""
        return "delete" if self.obstacle is None else "keep"


async def clean(paths: Paths, *, dry_run: bool = False, older_than: float | None = None) -> list[Cleaned]:
    """
    Remove the stashed files (``NAME.merged``, ``NAME.merged.2``) that `paths` name, or that lie in the folders among them.

    Removed is only what the merge's note, or else a comparison with the image below, proves to be merged; with `older_than`
    (seconds) only what was stashed so long ago. One that a process holds, that an image is still built on, or that an
    unfinished merge may need, stays; so does a symlink, for no merge puts one aside. Notes whose files are gone go too.

    Raises NoSuchStash, CannotList, CannotRecover.
    """
    places = [os.path.abspath(path) for path in given.paths(paths)]
    found = {file: os.lstat(file) for place in places for file in _stashed(place)}
    proofs = {file: await _why_not_proved(file, found) for file in found}
    staying = {file: proofs[file] or _why_not_yet(file, older_than) for file in found}
    needed = _needed(found, {file for file, reason in staying.items() if reason is None})
    done = []
    for file in found:
        reason = needed.get(file) or staying[file] or spared.in_use(file)
        data = _data_of(file) if reason is None else []
        if reason is None and not dry_run:
            reason = _remove(file, found[file])
        log.step("clean", "{file} is {fate}", file=file, fate="of no more use" if reason is None else f"kept: {reason}")
        done += [Cleaned(file, found[file].st_blocks * 512, reason), *data]
    for place in filter(os.path.isdir, () if dry_run else places):
        _forget_what_is_gone(place)
    return done


def _remove(file: str, meant: os.stat_result) -> str | None:
    """
    The file first: a note without it is nothing, it without a note would have to be compared. Returns why it stays: whoever has
    written to it meanwhile has shown that it is needed. Raises CannotRecover.
    """
    try:
        with folder.beside(file) as (place, name):
            now = os.lstat(file)
            if (now.st_size, now.st_mtime_ns) != (meant.st_size, meant.st_mtime_ns):
                return "it has been written to meanwhile"
            leads.lead_on_from_stashed(file)
            place.remove(name, folder.inode_in(meant))
            note = os.path.basename(stashed.note_path(file))
            place.remove(note, place.inode_of(note))
            place.sync()
    except OSError as error:
        raise CannotRecover(file=file, reason=error.strerror or str(error)) from None
    return None


def _forget_what_is_gone(path: str) -> None:
    """Notes of ours about files that somebody else has removed, or that we had when we were killed."""
    with contextlib.suppress(OSError):
        notes.forget_left(path)
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
    if os.path.islink(file):
        return f"it is a symlink, and no merge puts one aside: `rm -- {shlex.quote(file)}` if nobody needs it"
    if not _is_image(file):
        return "it is no qcow2 image"
    doubt = _doubt(file)
    if doubt is None:
        return None
    from qmpmerge.recovery import stray

    return await stray.why_not_merged(file, [other for other in found if other != file and _is_image(other)], doubt)


def _doubt(file: str) -> str | None:
    """Why its note does not prove that a merge has put it aside, and that the base has its data; None where it does."""
    note = stashed.look(file)
    return stashed.lost(note) if isinstance(note, Note) else note


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


def _needed(found: Collection[str], free: set[str]) -> dict[str, str]:
    """
    What needs these files: an unfinished merge, or an image that is built on one and stays. All stay but the `free` ones, and
    stashed files that were not named, which nobody starts from.
    """
    users = {
        file: told for place in {os.path.dirname(file) for file in found} for file, told in _users(place, found).items()
    }
    needed = {file: reason for file in users if (reason := _needed_by(file)) is not None}
    going = (free | (users.keys() - found)) - needed.keys()
    while True:
        more = {
            file: told
            for file in users.keys() - needed.keys()
            for user, told in users[file].items()
            if user not in going
        }
        if not more:
            return needed
        needed |= more
        going -= more.keys()


def _users(place: str, found: Collection[str]) -> dict[str, dict[str, str]]:
    """
    What is built on each stashed file of a folder, in that, below it, or where a note beside it leads, and of what QEMUs have
    open: the image, and a sentence. Stashed are those `found`, and what a note proves to be.
    """
    named = [file for file in found if os.path.dirname(file) == place]
    try:
        os.listdir(place)  # `dependents.files` says nothing where it cannot be
        beside = sorted(entry.path for entry in dependents.files(place))
        aside = [image for image in beside if original_of(image) and image not in found and _doubt(image) is None]
        told = {file: _noted(file) for file in [*named, *aside]}
    except OSError as error:
        return {file: {place: f"{place} cannot be listed: {error.strerror or error}"} for file in named}
    images = dict.fromkeys([*beside, *_further(named[0])])
    names = {image: name for image in images if (name := _backing(image)) is not None}
    for file, users in told.items():
        built = {image: _built_on(file, image, name) for image, name in names.items() if image != file}
        users.update((image, reason) for image, reason in built.items() if reason is not None)
    return told


def _further(file: str) -> list[str]:
    """The files below a stashed file's folder, and those that QEMUs have open: who needs what was renamed names it still."""
    from qmpmerge.processes import holders

    place = os.path.realpath(os.path.dirname(file))
    image = dependents.image_at(file)
    look = dependents.look_now([image], Chain((image,)), [place])
    below = [folder for folder in look.folders if folder != place]
    return [*(entry.path for folder in below for entry in dependents.files(folder)), *holders.qemu_files()]


def _backing(image: str) -> str | None:
    try:
        return backing_names.read(image)
    except OSError:
        return None


def _built_on(file: str, image: str, name: str) -> str | None:
    """
    That an image, by the name in its header, is built on the file, or on a name that only this file had and nobody has now; or
    that it may be.
    """
    if backing.is_riddle(name):
        return f"what {image} is built on cannot be read in its header"
    for path in (files.real(os.path.join(os.path.dirname(image), path)) for path in backing.named_paths(name)):
        is_it = (
            files.inode(path) == files.inode(file)
            if os.path.lexists(path)
            else os.path.normpath(path) == original_of(file)
        )
        if is_it:
            return f"{image} is built on it"
    return None


def _noted(file: str) -> dict[str, str]:
    """
    The overlays in other folders that were put on an image of the name that the file had, as notes beside that tell. Raises
    OSError.
    """
    original = original_of(file) or file
    told: dict[str, str] = {}
    for note in notes.above(original):
        if not note.is_true:
            reason, cure = dependents.doubt(note, original)
            told[note.path] = f"{note.path} is not believed: {reason}; {cure}"
        elif (built_on := _built_on(file, note.file, _backing(note.file) or "")) is not None:
            told[note.file] = built_on
    return told


def _needed_by(file: str) -> str | None:
    """The merge that was not finished and may need the file; what is not known is no reason to remove it."""
    for found in store.in_folder(os.path.dirname(file)):
        if isinstance(found, Disbelieved):
            return f"{found.path} is not believed ({found.reason}), and may tell of a merge that needs it: {found.cure}"
        if file in found.away.values():
            return "a merge that was not finished may need it"
    return None
