"""
Names on disk: taken away, given back, written so that a crash leaves the old or the new one and never half of it.

All of it is about the name that was given: a symlink itself is renamed or removed, never what it leads to. Everything
here raises OSError; nothing overwrites what it does not know.
"""

import contextlib
import errno
import os
import re
import stat
from dataclasses import dataclass

from qmpmerge.chain.chain import Inode

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1  # linux/fs.h
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def inode(path: str) -> Inode | None:
    """Which file a path leads to, symlinks followed; None where it leads nowhere."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class Seen:
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


def rename(old: str, new: str) -> None:
    """Give the name `old` to `new`, which must not exist: FileExistsError. Not durable before `sync_folder`."""
    import ctypes  # 6 ms, and most commands rename nothing

    libc = ctypes.CDLL(None, use_errno=True)
    rename_at: object = getattr(libc, "renameat2", None)
    if callable(rename_at):
        sources = (_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE)
        if rename_at(*sources) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), old)
    _link_and_unlink(old, new)


def _link_and_unlink(old: str, new: str) -> None:
    """For filesystems that cannot rename without replacing; killed in between, both names lead to the file."""
    try:
        os.link(old, new, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # no hard links either: a name that turns up within these microseconds would be lost
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new) from None
        os.rename(old, new)
    else:
        os.unlink(old)


def remove(path: str) -> None:
    """Take a name away; fine when it is gone already. Not durable before `sync_folder`."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def sync_folder(path: str) -> None:
    """Make the names in the folder of `path` durable."""
    _sync(os.path.dirname(path) or ".", os.O_DIRECTORY)


def sync(path: str) -> None:
    """Make the content of a file durable."""
    _sync(path, 0)


def _sync(path: str, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: str, data: bytes) -> None:
    """
    Put a file of ours, 0600, at `path` with this content, in one step: whatever dies, the old or the new one is there.

    The content is durable on return, and was read back; the name is durable after `sync_folder`. Never written through a
    symlink: the new file is made beside it, by us alone, and takes the name's place. Where that fails nothing is left.
    """
    new = f"{path}.new"
    remove(new)  # of one of us that was killed
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _write_whole(descriptor, data)
        os.rename(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(descriptor)


def _write_whole(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a full disk takes a part before it says so
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        if file.read() != data:
            raise OSError(errno.EIO, "it does not read back as it was written")


class Untrusted(ValueError):
    """Somebody else may have written this; the words say how."""


class OfAnother(Untrusted):
    """It belongs to another user, who is neither root."""


def read_own(path: str, largest: int) -> bytes:
    """
    A file of at most so many bytes that nobody but us and root can have written: not through a link of either kind.

    Raises OSError, Untrusted.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Untrusted("it is a symlink") if error.errno == errno.ELOOP else error from None
    try:
        refuse_untrusted(os.fstat(descriptor), largest)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def refuse_untrusted(status: os.stat_result, largest: int) -> None:
    """See `read_own`. Raises Untrusted."""
    if not stat.S_ISREG(status.st_mode):
        raise Untrusted("it is no regular file")
    if status.st_uid not in (os.geteuid(), 0):
        raise OfAnother(f"it belongs to another user (uid {status.st_uid})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Untrusted("others than its owner may write to it")
    if status.st_nlink > 1:
        raise Untrusted("it has another name elsewhere (a hard link)")
    if status.st_size > largest:
        raise Untrusted(f"it has {status.st_size} bytes, which is too many")


def matching(folder: str, pattern: "re.Pattern[str]") -> list[tuple[str, str]]:
    """The regular files of a folder whose whole name matches, each with the image's name in it."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except OSError:
        return []
    matches = [(name, pattern.fullmatch(name)) for name in names]
    return [(os.path.join(folder, name), match["image"]) for name, match in matches if match is not None]
