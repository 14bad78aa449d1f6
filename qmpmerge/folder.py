"""
Folders and files by their descriptors: a name can be given to another file at any moment, by anybody who may write to the
folder; a descriptor stays what it is.

Whatever of ours is created, renamed, marked, changed in owner or mode, or removed goes through here, and whatever is opened
to be read: relative to a folder's descriptor, and which file a name leads to is compared right before it is taken away.
What is planted under a name is never waited for (a FIFO) and never woken up (a device). Everything here raises OSError.
"""

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, Self

Inode = tuple[int, int]
"""(st_dev, st_ino): which file it is, whatever it is called."""

NOTE = 0o644
"""The mode of a file that tells of the images beside it: for all who may look at those, as who starts a VM."""

_RENAME_NOREPLACE = 1  # linux/fs.h
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_LOOK = os.O_PATH | os.O_CLOEXEC  # opens nothing: neither is a device woken up, nor a FIFO's other end


_allowed: set[str] = set()
"""Where alone files may be changed; empty for anywhere."""


class Planted(OSError):
    """What has the name is nothing that is opened: a symlink, a FIFO, a device, a folder. `strerror` says which."""


class NotReplayed(OSError):
    """See `change_only_below`."""


def before(operation: str, path: str) -> None:
    """
    Called right before each ``open``, ``create``, ``rename`` and ``remove`` of a name. It does nothing: tests put what gives
    the name to another file at that very moment in its place.
    """


def change_only_below(path: str) -> None:
    """
    From now on this process changes files below such folders alone, whatever it is told: `NotReplayed` for all others. For who
    speaks to a replay, where nothing is what it is called.
    """
    _allowed.add(os.path.join(path, ""))


def _see_that_we_may(place: "_Open") -> None:
    """Change this file, or names in this folder."""
    if not _allowed or not place.status.st_nlink:  # without a name it is nobody's
        return
    real = place.real
    if not any(f"{real}/".startswith(folder) for folder in _allowed):
        words = "this process speaks to a replay, and changes nothing outside of that one's folder"
        raise NotReplayed(errno.ECANCELED, words, real)  # what is only not permitted is done without, by some


class _Open:
    """Something that is open, until the end of the block or of its last user."""

    descriptor = -1

    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor = descriptor
        self.path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Fine when it is closed already."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)

    @property
    def status(self) -> os.stat_result:
        """What it is."""
        return os.fstat(self.descriptor)

    @property
    def is_special(self) -> bool:
        """Whether it is neither a regular file nor a block device: nothing that is to be opened."""
        mode = self.status.st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISBLK(mode))

    @property
    def inode(self) -> Inode:
        """Which file it is."""
        return inode_in(self.status)

    @property
    def link(self) -> str:
        """A path to it, whatever has its name by now: for us, and for a program that inherits the descriptor (`pass_fds`)."""
        return f"/proc/self/fd/{self.descriptor}"

    @property
    def real(self) -> str:
        """The path that the kernel has for it now, without symlinks."""
        return os.readlink(self.link)


class File(_Open):
    """A regular file, or a block device. `folder` is the one that it was opened in, where it was."""

    def __init__(self, descriptor: int, path: str, folder: "Folder | None" = None) -> None:
        super().__init__(descriptor, path)
        self.folder = folder

    @property
    def place(self) -> "Folder":
        """The folder that it was opened in."""
        assert self.folder is not None, "it was opened by its path"
        return self.folder

    def sync(self) -> None:
        """Make its content durable."""
        os.fsync(self.descriptor)

    def sync_data(self) -> None:
        """The same without its times, which takes no commit of the filesystem's journal where its size stays."""
        os.fdatasync(self.descriptor)

    def read(self, size: int, offset: int = 0) -> bytes:
        """So many bytes from there, or what there is."""
        return os.pread(self.descriptor, size, offset)

    def write(self, data: bytes) -> None:
        """Put this in place of all that is in it, whole, and read back. Not durable before `sync`."""
        _see_that_we_may(self)
        rest = memoryview(data)
        while rest:  # a full disk takes a part before it says so
            rest = rest[os.pwrite(self.descriptor, rest, len(data) - len(rest)) :]
        os.ftruncate(self.descriptor, len(data))
        if self.read(len(data) + 1) != data:
            raise OSError(errno.EIO, "it does not read back as it was written", self.path)

    def overwrite(self, data: bytes) -> None:
        """Put this in place of its first bytes, however it was opened. Not durable before `sync`."""
        _see_that_we_may(self)
        descriptor = os.open(self.link, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, data, 0)
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Take its name in its folder away from it, where it still has it. Not durable before the folder's `sync`."""
        self.place.remove(os.path.basename(self.path), self.inode)

    def mark(self, attribute: str, value: bytes) -> None:
        """Give it an extended attribute."""
        _see_that_we_may(self)
        os.setxattr(self.descriptor, attribute, value)

    def belong(self, like: os.stat_result) -> None:
        """Give it the owner and group that another file has, as far as we may."""
        _see_that_we_may(self)
        for owner in (like.st_uid, -1):
            with contextlib.suppress(OSError):
                os.fchown(self.descriptor, owner, like.st_gid)
                return

    def allow(self, mode: int) -> None:
        """Set its permissions."""
        _see_that_we_may(self)
        os.fchmod(self.descriptor, mode)


class Folder(_Open):
    """A folder, whatever symlinks lead to it; it stays the same one whatever they lead to later. Names are in it."""

    def __init__(self, path: str) -> None:
        before("open", path)
        super().__init__(os.open(path or ".", _LOOK | os.O_DIRECTORY), path)

    def sync(self) -> None:
        """Make its names durable."""
        with self._listed() as listed:
            os.fsync(listed.descriptor)

    def _listed(self) -> _Open:
        """Open for what needs more than the right to enter it."""
        return _Open(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.descriptor), self.path)

    def create(self, name: str, mode: int = 0o600) -> File:
        """Make an empty file, for us to write to and read. FileExistsError where anything has the name."""
        before("create", self._path(name))
        _see_that_we_may(self)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return File(os.open(name, flags, mode, dir_fd=self.descriptor), self._path(name), self)

    def open(self, name: str, *, write: bool = False) -> File:
        """Open a regular file; what else has the name is an error with words about it."""
        before("open", self._path(name))
        with File(os.open(name, _LOOK | os.O_NOFOLLOW, dir_fd=self.descriptor), self._path(name), self) as seen:
            mode = seen.status.st_mode
            if not stat.S_ISREG(mode):
                words = "it is a symlink" if stat.S_ISLNK(mode) else "it is no regular file"
                raise Planted(errno.EINVAL, words, seen.path)
            return opened(seen, os.O_RDWR if write else os.O_RDONLY)

    def inode_of(self, name: str) -> Inode | None:
        """Which file has the name, a symlink being one of its own; None where none has."""
        try:
            return inode_in(os.stat(name, dir_fd=self.descriptor, follow_symlinks=False))
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """All, in order."""
        with self._listed() as listed:
            return sorted(os.listdir(listed.descriptor))

    def files(self) -> list[str]:
        """The names of the regular files, in order."""
        with self._listed() as listed, os.scandir(listed.descriptor) as entries:
            return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))

    def rename(self, old: str, new: str, inode: Inode) -> None:
        """Give this file a name that nobody has: FileExistsError. Not durable before `sync`."""
        rename_at = renaming()
        _see_that_we_may(self)
        self._see(old, inode, "rename")
        code = rename_at(self.descriptor, os.fsencode(old), os.fsencode(new))
        if code in _UNSUPPORTED:
            self._link_and_unlink(old, new)
        elif code:
            raise OSError(code, os.strerror(code), self._path(old))

    def _link_and_unlink(self, old: str, new: str) -> None:
        """For filesystems that cannot rename without replacing; killed in between, both names lead to the file."""
        here = {"src_dir_fd": self.descriptor, "dst_dir_fd": self.descriptor}
        try:
            os.link(old, new, **here, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:  # no hard links either: a name that turns up within these microseconds would be lost
            if self.inode_of(new) is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._path(new)) from None
            os.rename(old, new, **here)
        else:
            os.unlink(old, dir_fd=self.descriptor)

    def put(self, name: str, data: bytes, mode: int = 0o600) -> File:
        """
        Put a file of ours under `name` with this content, in one step: whatever dies, the old or the new one is there.

        The content is durable on return, and was read back; the name is durable after `sync`. Never written through a
        symlink: the new file is made beside it, by us alone, and takes the name's place. Where that fails nothing is left.
        """
        new = f"{name}.new"
        self.remove(new, self.inode_of(new))  # of one of us that was killed
        file = self.create(new, mode)
        try:
            file.write(data)
            file.sync()
            self._see(new, file.inode, "rename")
            os.rename(new, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            self._see(name, file.inode)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.remove(new, file.inode)
            raise OSError(error.errno, error.strerror, self._path(name)) from None
        file.path = self._path(name)
        return file

    def remove(self, name: str, inode: Inode | None) -> None:
        """Take the name away from this file; fine when nobody has it. Not durable before `sync`."""
        if self.inode_of(name) is None:
            return
        _see_that_we_may(self)
        self._see(name, inode, "remove")
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path(name)) from None

    def _see(self, name: str, inode: Inode | None, operation: str | None = None) -> None:
        """That the name still is this file's."""
        if operation is not None:
            before(operation, self._path(name))
        if self.inode_of(name) != inode:
            raise FileNotFoundError(errno.ENOENT, f"{self._path(name)} is another file now", self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self.path, name)


@functools.cache
def renaming() -> Callable[[int, bytes, bytes], int]:
    """
    renameat2(2) within a folder, without replacing: returns 0 or the error's number. Loaded when it is called for the first
    time, which takes 6 ms, and most commands rename nothing.
    """
    import ctypes

    rename_at: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)

    def rename(folder: int, old: bytes, new: bytes) -> int:
        if rename_at is None:
            return errno.ENOSYS
        return 0 if rename_at(folder, old, folder, new, _RENAME_NOREPLACE) == 0 else ctypes.get_errno()

    return rename


def looked_at(path: str) -> File:
    """What a path leads to, symlinks followed, without opening it: `opened` does, once it is known what it is."""
    before("open", path)
    return File(os.open(path, _LOOK), path)


def opened(seen: File, flags: int = os.O_RDONLY) -> File:
    """Open what was looked at, whatever has its name by now; only a regular file or a block device is."""
    if seen.is_special:
        is_folder = stat.S_ISDIR(seen.status.st_mode)
        words = os.strerror(errno.EISDIR) if is_folder else "it is neither a regular file nor a block device"
        raise Planted(errno.EINVAL, words, seen.path)
    if flags & os.O_ACCMODE != os.O_RDONLY:
        _see_that_we_may(seen)
    try:
        return File(os.open(seen.link, flags | os.O_NONBLOCK | os.O_CLOEXEC), seen.path, seen.folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, seen.path) from None


def reading(path: str, flags: int = os.O_RDONLY) -> File:
    """Look, and open, to read it or as `flags` of open(2) say."""
    with looked_at(path) as seen:
        return opened(seen, flags)


def in_memory() -> File:
    """A file that has no name and lies nowhere, and is gone with the last who has it open."""
    return File(os.memfd_create("qmpmerge"), "a file in memory")


def split(path: str) -> tuple[Folder, str]:
    """The folder of a path, and the name in it."""
    folder, name = os.path.split(path)
    return Folder(folder), name


def sync(path: str) -> None:
    """Make the names in this folder durable."""
    with Folder(path) as place:
        place.sync()


def inode_in(status: os.stat_result) -> Inode:
    """Which file this is about."""
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def beside(path: str) -> Iterator[tuple[Folder, str]]:
    """`split` for the length of a block."""
    folder, name = split(path)
    with folder:
        yield folder, name
