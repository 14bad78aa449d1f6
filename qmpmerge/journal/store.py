"""
Where records lie, and the one way in which they are written and read.

What lies under a record's name and is not believed is there all the same: what it was to tell is *unknown*, never nothing.

Most disks have none, and need not wait for what a record is made of: `encoding` is imported where there is one.
"""

import contextlib
import errno
import os
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from qmpmerge import folder
from qmpmerge.chain.chain import Chain, Inode
from qmpmerge.errors import Overtaken, RecordNotBelieved
from qmpmerge.folder import File, Folder
from qmpmerge.images import files
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.journal.record import Record

_START, _END = ".", ".qmpmerge-record"
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # the last for a TARGET that is no file
LARGEST = 64 * 1024 * 1024
"""Bytes. A chain of 1000 images with the longest names makes a record of some 10 MiB."""


class Disbelieved(Value):
    """What lies at `path` under the name of a record of `image`, why it is not believed, and what to do: `cure`."""

    path: str
    image: str
    reason: str
    cure: str

    def concerns(self, inodes: set[Inode]) -> bool:
        """Whether it may: not where the image that it lies beside is there, and is none of these files."""
        found = files.inode(self.image)
        return found is None or found in inodes


class Unlisted(Disbelieved):
    """A folder in which there may be records of any image, for we may not look."""

    def concerns(self, inodes: set[Inode]) -> bool:
        """Always."""
        return True


Found: TypeAlias = "Record | Disbelieved"


def path_of(image: str) -> str:
    """``.NAME.qmpmerge-record`` beside the image's file, whichever symlinks lead there."""
    place, name = os.path.split(files.real(image))
    return os.path.join(place, f"{_START}{name}{_END}")


def place_of(chain: Chain, base: int) -> str:
    """
    Where a record about this chain can lie: beside the active image, else beside base (by its index, 0 for none)
    or the lowest image above it; empty where none of them is a regular file.
    """
    candidates = [chain.active, *chain.images[max(0, base - 1) :]]
    return next((path_of(image.file) for image in candidates if image.has_path and files.is_regular(image.file)), "")


# --- written ------------------------------------------------------------------------------------------------------


def write(record: "Record") -> "Record":
    """
    `put`, durable on return.

    Raises OSError: nobody can be promised anything then. What was there is there still, or nothing is where nothing was.
    """
    is_first = not os.path.lexists(record.path)
    written = put(record)
    try:
        sync(written)
    except OSError:
        if is_first:
            with contextlib.suppress(OSError):
                _file(written).remove()
        raise
    return written


def put(record: "Record") -> "Record":
    """
    Put it in place of what was there, whole. What is in it is durable before it gets its name: after a power cut before `sync`
    it is there whole, or what was there is. Raises OSError as `write` does.
    """
    from qmpmerge.journal import encoding

    data = encoding.encode(record)
    if len(data) > LARGEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), record.path)
    encoding.decode(record.path, data)  # what we would not believe is not written: a bug of ours, if ever
    place, name = folder.split(record.path)
    is_first = place.inode_of(name) is None
    file = place.put(name, data)
    try:
        _refuse_what_anybody_writes(file)
    except OSError:
        if is_first:
            with contextlib.suppress(OSError):
                file.remove()
        raise
    return replace(record, file=file)


def _refuse_what_anybody_writes(file: File) -> None:
    """A filesystem that knows no owners or modes: nothing that lies there could be believed. Raises PermissionError."""
    try:
        files.refuse_untrusted(file.status, LARGEST)
    except ValueError as error:
        raise PermissionError(errno.EPERM, str(error), file.path) from None


def mark(record: "Record") -> "Record":
    """Write the state and what goes with it over those in the file. Durable after `sync`. Raises OSError."""
    from qmpmerge.journal import encoding

    file = _file(record)
    file.overwrite(encoding.state_line(record))
    return replace(record, file=file)


def sync(record: "Record") -> None:
    """Make it durable, and with it all names in its folder. Raises OSError."""
    file = _file(record)
    file.sync_data()
    file.place.sync()


def sync_content(record: "Record") -> None:
    """Make it durable, where nobody has touched a name. Raises OSError."""
    _file(record).sync_data()


def remove(record: "Record") -> None:
    """The work is done, or taken back. Raises OSError, also where another file has its name."""
    try:
        file = _file(record)
    except FileNotFoundError:
        return
    file.remove()
    file.place.sync()


def _file(record: "Record") -> File:
    if record.file is not None:
        return record.file
    place, name = folder.split(record.path)
    return place.open(name)


# --- read ---------------------------------------------------------------------------------------------------------


def read(path: str) -> "Found | None":
    """What lies at `path`; None where nothing does."""
    try:
        place, name = folder.split(path)
    except OSError as error:
        return None if error.errno in _NOTHING else _disbelieved(path, error)
    return _read(place, name)


def _read(place: Folder, name: str) -> "Found | None":
    path = os.path.join(place.path, name)
    try:
        file = files.open_own(place, name, LARGEST)
        from qmpmerge.journal import encoding

        return replace(encoding.decode(path, file.read(file.status.st_size)), file=file)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _NOTHING:
            return None
        return _disbelieved(path, error)


def _disbelieved(path: str, error: OSError | ValueError) -> Disbelieved:
    image = os.path.join(os.path.dirname(path), os.path.basename(path)[len(_START) : -len(_END)])
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Disbelieved(path, image, reason, _cure(path, image, error))


def _cure(path: str, image: str, error: OSError | ValueError) -> str:
    """What to do about it, by why it is not believed; nothing is ever lost by it."""
    from qmpmerge.journal import encoding

    recover = shlex.join(["qmpmerge", "recover", image])
    aside = shlex.join(["mv", "-nT", "--", path, f"{path}.not-believed"])
    if isinstance(error, PermissionError):
        return f"run `{recover}` as root, or as who wrote it"
    if isinstance(error, OSError):
        return "see that its storage can be read, then run the same command again"
    first = f"find out who wrote it, and which image is right (`qmpmerge doctor {shlex.quote(os.path.dirname(path))}`)"
    if isinstance(error, files.OfAnother):
        first = f"run `{recover}` as that user, if you trust whoever that is"
    elif isinstance(error, encoding.OtherSchema):
        first = f"run `{recover}` of the qmpmerge that wrote it"
    return f"{first}; once that is settled, or where no merge was under way: `{aside}`"


def beside(image: str) -> "Found | None":
    """The record of the disk whose active image has, or had, this name."""
    return read(path_of(os.path.abspath(image)))


def in_folder(path: str) -> list[Found]:
    """All that lie in a folder, by name; one Unlisted where we may not look."""
    try:
        place = Folder(path)
        names = place.names()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        cure = "run the same command as somebody who may list it, as root does"
        return [Unlisted(path, path, f"it cannot be listed: {error.strerror}", cure)]
    found = [_read(place, name) for name in names if name.startswith(_START) and name.endswith(_END)]
    return [one for one in found if one is not None]


def about(chain: Chain) -> list[Found]:
    """
    Those in the chain's folders that tell, or may tell, of a merge of one of its images. Where a folder cannot be listed, those
    that lie beside the images: others are of images that the chain has no more.
    """
    inodes = {image.inode for image in chain if image.inode is not None}
    names = [name for image in chain if image.has_path for name in (image.file, files.real(image.file))]
    folders = dict.fromkeys(map(os.path.dirname, names))
    listed = {folder: in_folder(folder) for folder in folders}
    blind = {folder for folder, found in listed.items() if any(isinstance(one, Unlisted) for one in found)}
    paths = dict.fromkeys(map(path_of, names)) if blind else ()
    beside_them = [read(path) for path in paths if os.path.dirname(path) in blind]
    seen = [one for folder in folders if folder not in blind for one in listed[folder]]
    return [found for found in (*seen, *beside_them) if found is not None and found.concerns(inodes)]


def believed(found: "Iterable[Found]") -> "list[Record]":
    """The records, where all of them are believed. Raises RecordNotBelieved."""
    records = []
    for one in found:
        if isinstance(one, Disbelieved):
            raise RecordNotBelieved(image=one.image, path=one.path, reason=one.reason, cure=one.cure)
        records.append(one)
    return records


def again(record: "Record") -> "Record | None":
    """
    The record as it is now that its lock is held, None where it is gone: who had the lock while a session was waited for may
    have gone on with the merge, or ended it. Raises RecordNotBelieved, and Overtaken where it tells of another merge.
    """
    found = read(record.path)
    for now in believed([] if found is None else [found]):
        if not now.is_same_merge(record):
            raise Overtaken(image=record.chain.active.file)
        return now
    return None
