"""
Removing what merges have stashed, once nobody uses or needs it.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass

from qmpmerge.chain import backing
from qmpmerge.errors import CannotRecover, NoSuchStash
from qmpmerge.images import dependents, files, qcow2, stashed
from qmpmerge.images.stashed import original_of
from qmpmerge.journal import merged_files, store
from qmpmerge.journal.store import Disbelieved


@dataclass(frozen=True)
class Cleaned:
    """A stashed file: `kept` says why it was not removed, None where it was, or would be. `size` is what it takes on disk."""

    file: str
    size: int
    kept: str | None


def clean(paths: Collection["str | os.PathLike[str]"], *, dry_run: bool = False) -> list[Cleaned]:
    """
    Remove the stashed files (``NAME.merged``, ``NAME.merged.2``) that `paths` name, or that lie in the folders among them.

    One that a process holds, that an image is still built on, or that an unfinished merge may need, stays; so does a
    symlink that leads anywhere, for what it leads to was not put aside, and one in a folder of which only the name says that
    a merge has stashed it. Raises NoSuchStash, CannotRecover.
    """
    done = []
    named = {os.path.abspath(path) for path in paths}
    for file in [file for path in paths for file in _stashed(os.path.abspath(path))]:
        reason = why_not(file) or (None if file in named else _why_not_by_its_name(file))
        data = _data_of(file) if reason is None else []
        size = os.lstat(file).st_blocks * 512
        if reason is None and not dry_run:
            try:
                files.remove(file)
                files.sync_folder(file)
            except OSError as error:
                raise CannotRecover(file=file, reason=error.strerror or str(error)) from None
        done += [Cleaned(file, size, reason), *data]
    return done


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
        with os.scandir(path) as entries:
            return sorted(entry.path for entry in entries if original_of(entry.name) and not entry.is_dir())
    if original_of(path) is None or not os.path.lexists(path):
        raise NoSuchStash(path=path)
    return [path]


def _why_not_by_its_name(file: str) -> str | None:
    if stashed.is_stashed(file) or os.path.islink(file):  # that leads nowhere, see above
        return None
    return "nothing but its name says that a merge has stashed it: name the file itself"


def why_not(file: str) -> str | None:
    """Why a stashed file must stay; None where nothing speaks against removing it."""
    needed = _needed_by(file)
    if needed is None and os.path.islink(file):
        return f"it is a symlink, and {files.real(file)} was not put aside" if os.path.exists(file) else None
    if needed is not None:
        return needed
    try:
        if qcow2.read(file) is None:
            return "it is no qcow2 image"
    except OSError as error:
        return error.strerror or str(error)
    user = _built_on(file)
    return f"{user} is built on it" if user is not None else merged_files.in_use(file)


def _needed_by(file: str) -> str | None:
    """The merge that was not finished and may need the file; what is not known is no reason to remove it."""
    for found in store.in_folder(os.path.dirname(file)):
        if isinstance(found, Disbelieved):
            return f"{found.path} is not believed ({found.reason}), and may tell of a merge that needs it: {found.cure}"
        if file in found.away.values():
            return "a merge that was not finished may need it"
    return None


def _built_on(file: str) -> str | None:
    """An image in the folder whose header leads to the file, or to a name that only this file had and nobody has now."""
    with os.scandir(os.path.dirname(file)) as entries:
        others = [entry.path for entry in entries if entry.path != file and entry.is_file()]
    images = [image for image in others if not stashed.is_stashed(image)]
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
