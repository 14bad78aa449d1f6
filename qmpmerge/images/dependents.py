"""
Who else is built on an image: the headers of all images in some folders, and of those that processes have open, read once.

QEMU knows nothing about it: an overlay that nobody has open at the moment is ruined without a word when an image below
it is merged away or written to.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.images import backing_names

STASHED = ".merged"
"""
How the names of merged files end that were stashed: no VM starts from them any more, so what they show may change.
One that a process has open counts all the same.
"""


@dataclass(frozen=True)
class Dependent:
    """`file` is an image outside the chain whose header names `image` as its backing file."""

    file: str
    image: str


def find(
    images: Sequence[Image], chain: Chain, search: Collection[str] = (), opened: Iterable[str] = ()
) -> tuple[Dependent, ...]:
    """
    The images outside `chain` that are built directly on one of `images`.

    Looked through are the folders of the chain's files, under their names and their real ones, and `search`; not what is
    below them. `opened` are more files to look at. Folders and files that cannot be read are passed over: nobody can
    promise more than what was seen.
    """
    wanted = {image.inode: image.file for image in images if image.inode is not None}
    members = {image.inode for image in chain}
    found: dict[str, Dependent] = {}
    for path in dict.fromkeys([*_scanned(chain, search), *opened]):
        status = _status(path)
        if status is None or (status.st_dev, status.st_ino) in members:
            continue
        for inode in _backing(path) & wanted.keys():
            found.setdefault(os.path.realpath(path), Dependent(path, wanted[inode]))
    return tuple(sorted(found.values(), key=lambda dependent: dependent.file))


def _scanned(chain: Chain, search: Collection[str]) -> Iterator[str]:
    for folder in _folders(chain, search):
        for entry in files(folder):
            if not entry.name.endswith(STASHED):
                yield entry.path


def _folders(chain: Chain, search: Collection[str]) -> list[str]:
    files = [image.file for image in chain if image.has_path]
    folders = [*map(os.path.dirname, files), *(os.path.dirname(os.path.realpath(file)) for file in files), *search]
    return list(dict.fromkeys(map(os.path.realpath, folders)))


def files(folder: str) -> list["os.DirEntry[str]"]:
    """The regular files of a folder, symlinks to some included; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if _is_file(entry)]
    except OSError:
        return []


def unlisted(chain: Chain, search: Collection[str] = ()) -> list[str]:
    """The folders that `find` looks through and that are there, but may not be listed: who is built on what is not known."""
    return [folder for folder in _folders(chain, search) if _is_unlisted(folder)]


def _is_unlisted(folder: str) -> bool:
    try:
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return False


def unread(chain: Chain, search: Collection[str] = ()) -> list[str]:
    """The files that `find` looks at and that we may not read: they can be images that are built on ours."""
    members = {image.inode for image in chain}
    closed = [path for path in _scanned(chain, search) if not os.access(path, os.R_OK, effective_ids=True)]
    return [path for path in closed if (status := _status(path)) and (status.st_dev, status.st_ino) not in members]


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def _backing(path: str) -> set[tuple[int, int]]:
    """The inodes that the backing name in a file's header leads to: QEMU resolves it from the name that it was given."""
    try:
        written = backing_names.read(path)
    except OSError:
        return set()
    name = backing.named_path(written) if written is not None else None
    if name is None:
        return set()
    folders = {os.path.dirname(path), os.path.dirname(os.path.realpath(path))}
    found = [status for folder in folders if (status := _status(os.path.join(folder, name))) is not None]
    return {(status.st_dev, status.st_ino) for status in found}


def folders(chain: Chain, search: Collection[str] = ()) -> list[str]:
    """The folders in which the chain's files are, under their names and their real ones."""
    files = [image.file for image in chain if image.has_path]
    names = [*map(os.path.dirname, files), *(os.path.dirname(os.path.realpath(file)) for file in files), *search]
    return list(dict.fromkeys(map(os.path.realpath, names)))


def image_at(file: str) -> Image:
    """A file by its identity alone."""
    try:
        status = os.stat(file)
    except OSError:
        return Image(file, "qcow2", 0)
    return Image(file, "qcow2", 0, inode=(status.st_dev, status.st_ino))
