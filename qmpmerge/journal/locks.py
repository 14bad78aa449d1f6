"""
A lock of our own beside the base, so that two qmpmerge never meet on it, and the note in it for who comes next.

QEMU's image locks keep other processes from writing; they do not keep two of us from checking at the same time.

The kernel drops the lock with its holder, the file stays: what a holder that was killed, or that left on purpose, wrote
into it is found by the next one. A note is believed only as far as QEMU's graph and the headers bear it out.
"""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from typing import Any

from qmpmerge.chain.chain import Image
from qmpmerge.errors import Locked

_LARGEST_NOTE = 1024 * 1024

LONGEST_NOTE = 4 * 1024 * 1024


def lock_path(base: Image) -> str:
    """``.NAME.qmpmerge-lock`` in the folder of the real file."""
    folder, name = os.path.split(os.path.realpath(base.file))
    return os.path.join(folder, f".{name}.qmpmerge-lock")


class Lock:
    """A lock that is held. Without a file (see `held`) nothing can be noted."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        # What an earlier holder left is not ours to drop before its work is done.
        self.is_noted = descriptor is not None and os.fstat(descriptor).st_size > 0

    def note(self, told: dict[str, Any]) -> None:
        """Leave this for who comes next, until `clear`; a note that cannot be written is none."""
        if self._descriptor is None:
            return
        self.is_noted = True
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(told).encode(), 0)
            os.fsync(self._descriptor)

    def clear(self) -> None:
        """There is nothing to be told any more: the file goes with the lock."""
        self.is_noted = False


@contextlib.contextmanager
def held(base: Image) -> Iterator[Lock]:
    """
    Hold the lock of `base` during the block; the kernel drops it with our process.

    A base without a path, or in a folder where we may not write, has no lock: then QEMU alone keeps others away.
    Raises Locked.
    """
    path = lock_path(base)
    descriptor = _take(path, base) if base.has_path else None
    lock = Lock(descriptor)
    try:
        yield lock
    finally:
        if descriptor is not None:
            if not lock.is_noted:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(descriptor)


def noted(base: Image) -> dict[str, Any] | None:
    """
    What the last holder of the lock of `base` left or, where it is held, has to say; None where that is nothing, or
    where it was written by somebody who is neither we, nor root, nor the owner of the base.
    """
    if not base.has_path:
        return None
    try:
        descriptor = os.open(lock_path(base), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_uid not in (0, os.geteuid(), _owner(base.file)):
            return None
        try:
            told = json.loads(file.read(LONGEST_NOTE))
        except (OSError, ValueError, RecursionError):
            return None
    return told if isinstance(told, dict) else None


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except OSError:
        return None


def _take(path: str, base: Image) -> int | None:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Locked(base=base.file, lock=path) from None
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last holder has just removed it: take the next one


def _is_still(path: str, descriptor: int) -> bool:
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(status, os.fstat(descriptor))


def read_note(path: str) -> dict[str, object]:
    """The JSON object in a file of ours; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        told = json.loads(_read(path))
        return told if isinstance(told, dict) else {}
    return {}


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        return file.read(_LARGEST_NOTE) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""


def is_held(lock: str) -> bool:
    """Whether somebody holds this lock file: by its inode in /proc/locks, since trying it would get in others' way."""
    try:
        inode = os.stat(lock, follow_symlinks=False).st_ino
        with open("/proc/locks", encoding="ascii", errors="replace") as file:
            rows = [line.split() for line in file]
    except OSError:
        return True  # nothing is said about what cannot be seen
    return any("FLOCK" in row and any(word.endswith(f":{inode}") for word in row) for row in rows)
