"""
A lock of our own beside every image that is written, so that two qmpmerge never meet on one.

QEMU's image locks keep other processes from writing; they do not keep two of us from checking at the same time. The kernel
drops the lock with its holder, the file stays: what a holder that was killed, or that left on purpose, noted in it is found
by the next one. It says where the record of the merge lies, and whether base is suspect.
"""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qmpmerge.chain.chain import Image
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.errors import Locked

_LARGEST = 64 * 1024


@dataclass(frozen=True)
class Note:
    """
    What a lock file says: the path of a record, and the error of an earlier merge into this base after which what it
    shows must be compared (QEMU's cache may believe what the storage has lost).
    """

    record: str | None = None
    suspect: str | None = None


UNREADABLE = Note(suspect="what an earlier merge noted beside it cannot be read")
"""What nobody can read may have said just that."""


def lock_path(image: Image) -> str:
    """``.NAME.qmpmerge-lock`` in the folder of the real file."""
    folder, name = os.path.split(os.path.realpath(image.file))
    return os.path.join(folder, f".{name}.qmpmerge-lock")


class Lock:
    """A lock that is held, and the `note` in it. Without a file (see `held`) nothing can be noted."""

    def __init__(self, descriptor: int | None, note: Note) -> None:
        self._descriptor = descriptor
        # What an earlier holder left is not ours to drop before its work is done.
        self.note = note

    def point_to(self, record: str) -> None:
        """Say where the record lies, until `conclude`."""
        self._write(replace(self.note, record=record))

    def suspect(self, reason: str) -> None:
        """Say that base is suspect, until `conclude`."""
        self._write(replace(self.note, suspect=reason))

    def conclude(self, suspect: str | None) -> None:
        """The record is gone. Without a suspicion there is nothing to be told any more: the file goes with the lock."""
        self.note = Note()
        if suspect is not None:
            self.suspect(suspect)

    def _write(self, note: Note) -> None:
        """What there is no room for is not said: base's own filesystem may be full, and its job waits for that."""
        self.note = note
        if self._descriptor is not None:
            data = json.dumps({"record": note.record, "suspect": note.suspect}).encode()
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, data, 0)
                os.ftruncate(self._descriptor, len(data))
                os.fsync(self._descriptor)


@contextlib.contextmanager
def held(image: Image, *others: Image) -> Iterator[Lock]:
    """
    Hold the locks of these images during the block; yields that of the first. The kernel drops them with our process.

    An image without a path, or in a folder where we may not write, has no lock: then QEMU alone keeps others away.
    Raises Locked.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_held(image))
        for other in others:
            stack.enter_context(_held(other))
        yield lock


def taken_for(plan: CommitPlan) -> contextlib.AbstractContextManager[Lock]:
    """
    Hold the locks of the images that this plan writes; yields base's, or that of the lowest merged image where base has no
    path. Raises Locked.
    """
    first = next((image for image in (plan.base, *plan.merged) if image.has_path), plan.base)
    return held(first, *(image for image in plan.written if image is not plan.base))


@contextlib.contextmanager
def _held(image: Image) -> Iterator[Lock]:
    path = lock_path(image)
    descriptor = _take(path, image) if image.has_path else None
    lock = Lock(descriptor, Note() if descriptor is None else _note(descriptor, image.file))
    try:
        yield lock
    finally:
        if descriptor is not None:
            if lock.note == Note():
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(descriptor)


def read(path: str) -> Note | None:
    """What a lock file says, whoever holds it; None where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        return UNREADABLE
    try:
        return _note(descriptor, _locked_by(path))
    finally:
        os.close(descriptor)


def noted(image: Image) -> Note:
    """What the lock of an image says, whoever holds it."""
    return (read(lock_path(image)) if image.has_path else None) or Note()


def is_held(lock: str) -> bool:
    """Whether somebody holds this lock file: by its inode in /proc/locks, since trying it would get in others' way."""
    try:
        inode = os.stat(lock, follow_symlinks=False).st_ino
        with open("/proc/locks", encoding="ascii", errors="replace") as file:
            rows = [line.split() for line in file]
    except OSError:
        return True  # nothing is said about what cannot be seen
    return any("FLOCK" in row and any(word.endswith(f":{inode}") for word in row) for row in rows)


def _locked_by(path: str) -> str:
    """The image that the lock file at `path` is of."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.removeprefix(".").removesuffix(".qmpmerge-lock"))


def _note(descriptor: int, image: str) -> Note:
    """Believed where it is ours, root's or of the image's owner."""
    try:
        status = os.fstat(descriptor)
        data = os.pread(descriptor, _LARGEST + 1, 0)
        if not data:
            return Note()
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid(), _owner(image)):
            return UNREADABLE
        entry = json.loads(data)
        return Note(_text(entry["record"]), _text(entry["suspect"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return UNREADABLE


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError(value)


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except OSError:
        return None


def _take(path: str, image: Image) -> int | None:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Locked(base=image.file, lock=path) from None
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last holder has just removed it: take the next one


def _is_still(path: str, descriptor: int) -> bool:
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(status, os.fstat(descriptor))
