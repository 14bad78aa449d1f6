"""
Names on disk: what they lead to, and what that looks like. What is done to them is `folder`'s.
"""

import os
import re
import stat

from qmpmerge import folder, users
from qmpmerge.chain.chain import Image, Inode
from qmpmerge.folder import File, Folder, Planted
from qmpmerge.value import Value


def inode(path: str) -> Inode | None:
    """Which file a path leads to, symlinks followed; None where it leads nowhere."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def unread(path: str) -> list[tuple[str, bool]]:
    """The file at `path`, or those in the folder but for hidden ones, each with whether we may not read it."""
    try:
        found = sorted(entry.path for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith("."))
    except NotADirectoryError:
        found = [path]
    except OSError:
        found = []
    return [(file, not os.access(file, os.R_OK, effective_ids=True)) for file in found]


class Seen(Value):
    """What a file looked like at a moment when nobody wrote: any write since then shows."""

    size: int
    changed: int
    """st_mtime_ns"""


def seen(path: str) -> Seen:
    """What a file looks like now."""
    status = os.stat(path)
    return Seen(status.st_size, status.st_mtime_ns)


def plain(path: str) -> str:
    """The path without ``..``, where the folder is the same without: not behind a symlinked folder."""
    shorter = os.path.normpath(path)
    if ".." not in path.split("/"):
        return shorter
    before, after = inode(os.path.dirname(path)), inode(os.path.dirname(shorter))
    return shorter if before is not None and before == after else path


def real(path: str) -> str:
    """The name of what a symlink leads to, there or not; any other path as it is."""
    return os.path.realpath(path) if os.path.islink(path) else path


def is_regular(path: str) -> bool:
    """Whether `path` leads to a regular file: no device, no folder."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_device(path: str) -> bool:
    """Whether `path` leads to a block device."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def of_image(image: Image, pid: int | None) -> File | None:
    """The image's own file, open to be read: by its path, here or as process `pid` sees it. None where it is not there."""
    for path in (image.file, f"/proc/{pid}/root{image.file}") if image.has_path else ():
        try:
            file = folder.reading(path)
        except OSError:
            continue
        if image.inode == file.inode:
            return file
        file.close()
    return None


def sync(path: str) -> None:
    """Make the content of a file durable."""
    with folder.reading(path) as file:
        file.sync()


class Untrusted(ValueError):
    """Somebody else may have written this; the words say how."""


class OfAnother(Untrusted):
    """It belongs to another user, who is neither root."""


def read_own(path: str, largest: int) -> bytes:
    """
    A file of at most so many bytes that nobody but us and root can have written: not through a link of either kind.

    Raises OSError, Untrusted.
    """
    with folder.beside(path) as (place, name), open_own(place, name, largest) as file:
        return file.read(largest)


def open_own(place: Folder, name: str, largest: int) -> File:
    """The same, open. Raises OSError, Untrusted."""
    try:
        file = place.open(name)
    except Planted as error:
        raise Untrusted(error.strerror) from None
    refuse_untrusted(file.status, largest)
    return file


def refuse_untrusted(status: os.stat_result, largest: int) -> None:
    """See `read_own`. Raises Untrusted."""
    if status.st_uid not in (os.geteuid(), 0):
        raise OfAnother(f"it belongs to another user ({users.name(status.st_uid)})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Untrusted("others than its owner may write to it")
    if status.st_nlink > 1:
        raise Untrusted("it has another name elsewhere (a hard link)")
    if status.st_size > largest:
        raise Untrusted(f"it has {status.st_size} bytes, which is too many")


def matching(place: str, pattern: "re.Pattern[str]") -> list[tuple[str, str]]:
    """The regular files of a folder whose whole name matches, each with the image's name in it."""
    try:
        with Folder(place) as found:
            names = found.files()
    except OSError:
        return []
    matches = [(name, pattern.fullmatch(name)) for name in names]
    return [(os.path.join(place, name), match["image"]) for name, match in matches if match is not None]
