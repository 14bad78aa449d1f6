"""
A lock of our own beside every image that is written, so that two qmpmerge never meet on one.

QEMU's image locks keep other processes from writing; they do not keep two of us from checking at the same time. The kernel
drops the lock with its holder, the file stays: what a holder that was killed, or that left on purpose, noted in it is found
by the next one. It says where the record of the merge lies, whether base is suspect, and whether what it holds is damaged, or
was not all compared.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import replace

from qmpmerge import folder, users
from qmpmerge.chain.chain import Image
from qmpmerge.chain.plan import Plan
from qmpmerge.errors import CannotLock, Locked
from qmpmerge.folder import File, Folder
from qmpmerge.value import Value

_LARGEST = 64 * 1024
_ROOM = 8192
"""Bytes of a note: a path has 4096 at the most, and a block is written at once or not at all."""
_REASON = 1000
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class Note(Value):
    """
    What a lock file says: the path of a record, and the error of an earlier merge into this base after which what it
    shows must be compared (QEMU's cache may believe what the storage has lost). `damaged` is the inode number of the image
    where a pull has found that what it holds may be wrong, `partial` that of one into which a job that was taken back has
    copied what lies below it (a pull, or a commit that fills larger clusters), or such copies have come since: as long as
    anything lies below it, it holds what nobody has compared, and what looks like its own data.
    """

    record: str | None = None
    suspect: str | None = None
    damaged: int | None = None
    partial: int | None = None


UNREADABLE = Note(suspect="what an earlier merge noted beside it cannot be read")
"""What nobody can read may have said just that."""


def lock_path(image: Image) -> str:
    """``.NAME.qmpmerge-lock`` in the folder of the real file."""
    place, name = os.path.split(os.path.realpath(image.file))
    return os.path.join(place, f".{name}.qmpmerge-lock")


class Lock:
    """
    A lock that is held, and the `note` in it. Without a file (see `held`) nothing can be noted.

    Every note takes the same room: what there was room for before the job was started there is room for after it.
    """

    def __init__(self, file: File | None, note: Note) -> None:
        self._file = file
        # What an earlier holder left is not ours to drop before its work is done.
        self.note = note

    @property
    def path(self) -> str:
        """The lock file; "" where there is none."""
        return self._file.path if self._file is not None else ""

    def point_to(self, record: str | None) -> None:
        """
        Say where the record lies, until `conclude`; or take the room for what may have to be said. Not durable before `sync`: a
        note that a power cut has torn says that base is suspect. Raises OSError.
        """
        self._put(replace(self.note, record=record))

    def sync(self) -> None:
        """Make the note durable. Raises OSError."""
        if self._file is not None:
            self._file.sync()

    def suspect(self, reason: str) -> None:
        """Say that base is suspect, until `conclude`. Raises OSError."""
        self._write(replace(self.note, suspect=reason))

    def damaged(self, image: Image, reason: str) -> None:
        """Say that what `image`, whose lock this is, holds may be wrong, until `conclude`. Raises OSError."""
        self._write(replace(self.note, suspect=reason, damaged=_number(image.file)))

    def partial(self, image: Image) -> None:
        """Say that `image`, whose lock this is, holds what a job that was taken back has copied up. Raises OSError."""
        self._write(replace(self.note, partial=_number(image.file)))

    def conclude(self, suspect: str | None, *, damaged: int | None = None, partial: int | None = None) -> None:
        """
        The record is gone. Without a suspicion there is nothing to be told any more: the file goes with the lock. Raises
        OSError.
        """
        self.note = Note(suspect=suspect, damaged=damaged, partial=partial)
        if self.note != Note():
            self._write(self.note)

    def _write(self, note: Note) -> None:
        self._put(note)
        self.sync()

    def _put(self, note: Note) -> None:
        self.note = note
        if self._file is not None:
            entry = {**vars(note), "suspect": note.suspect and note.suspect[:_REASON]}
            self._file.write(json.dumps(entry).encode().ljust(_ROOM))


@contextlib.contextmanager
def held(image: Image, *others: Image) -> Iterator[Lock]:
    """
    Hold the locks of these images during the block; yields that of the first. The kernel drops them with our process.

    An image without a path, or in a folder where we may not write, has no lock: then QEMU alone keeps others away.
    Raises Locked, CannotLock.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_held(image))
        for other in others:
            stack.enter_context(_held(other))
        yield lock


def taken_for(plan: Plan) -> contextlib.AbstractContextManager[Lock]:
    """
    Hold the locks of the images that this plan writes; yields the receiver's, or that of the lowest merged image where that
    has no path. Raises Locked, CannotLock.
    """
    first = next((image for image in (plan.receiver, *plan.merged) if image.has_path), plan.receiver)
    return held(first, *(image for image in plan.written if image is not plan.receiver))


@contextlib.contextmanager
def _held(image: Image) -> Iterator[Lock]:
    file = _taken(image) if image.has_path else None
    lock = Lock(file, Note() if file is None else _note(file, image.file))
    try:
        yield lock
    finally:
        if file is not None:
            if lock.note == Note():
                with contextlib.suppress(OSError):
                    file.remove()
            file.close()


def read(path: str) -> Note | None:
    """What a lock file says, whoever holds it; None where there is no such file."""
    try:
        with folder.beside(path) as (place, name), place.open(name) as file:
            return _note(file, _locked_by(path))
    except FileNotFoundError:
        return None
    except OSError:
        return UNREADABLE


def noted(image: Image) -> Note:
    """What the lock of an image says, whoever holds it."""
    return (read(lock_path(image)) if image.has_path else None) or Note()


def is_damaged(image: Image) -> bool:
    """Whether what the image holds may be wrong, as a pull has found; not of another file that has its name now."""
    damaged = noted(image).damaged
    return damaged is not None and damaged == _number(image.file)


def is_partial(image: Image) -> bool:
    """Whether it holds what a job that was taken back has copied up, or may; not of another file that has its name now."""
    note = noted(image)
    return note == UNREADABLE or (note.partial is not None and note.partial == _number(image.file))


def forget_image(file: str) -> None:
    """Nobody finds an image at this path any more: what was noted about it is not to be told of the next one."""
    image = Image(file, "raw", 0)
    if {noted(image).damaged, noted(image).partial} != {None}:
        with contextlib.suppress(Locked, CannotLock, OSError), held(image) as lock:
            lock.conclude(None)


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
    place, name = os.path.split(path)
    return os.path.join(place, name.removeprefix(".").removesuffix(".qmpmerge-lock"))


def _note(file: File, image: str) -> Note:
    """Believed where it is ours, root's or of the image's owner."""
    try:
        data = file.read(_LARGEST + 1)
        if not data:
            return Note()
        if file.status.st_uid not in (0, os.geteuid(), _owner(image)):
            return UNREADABLE
        entry = json.loads(data)
        numbers = entry.get("damaged"), entry.get("partial")
        if not all(number is None or isinstance(number, int) for number in numbers):
            return UNREADABLE
        return Note(_text(entry["record"]), _text(entry["suspect"]), *numbers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return UNREADABLE


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError(value)


def _number(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except OSError:
        return None


def _taken(image: Image) -> File | None:
    path = lock_path(image)
    try:
        place, name = folder.split(path)
    except OSError:
        return None
    while True:
        try:
            file = _made(place, name, image)
        except FileExistsError:
            if (file := _found(place, name, image)) is None:
                continue
        if file is None:
            return None
        try:
            fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(base=image.file, lock=path) from None
        if place.inode_of(name) == file.inode:
            return file
        # its last holder has just removed it: take the next one


def _made(place: Folder, name: str, image: Image) -> File | None:
    """A lock file for whoever may write the image; None where we may not make any. Raises FileExistsError, CannotLock."""
    try:
        file = place.create(name)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in _NOT_ALLOWED:
            return None
        raise CannotLock(base=image.file, lock=lock_path(image), reason=error.strerror or str(error)) from None
    with contextlib.suppress(OSError):
        model = os.stat(image.file)
        file.belong(model)
        file.allow(0o660 if model.st_mode & 0o020 else 0o600)
    return file


def _found(place: Folder, name: str, image: Image) -> File | None:
    """The one that is there; None where it has just gone. What is no lock of ours is not written to: Locked, CannotLock."""
    path = lock_path(image)
    try:
        file = place.open(name, write=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error, PermissionError) and is_held(path):
            raise Locked(base=image.file, lock=path) from None
        raise CannotLock(base=image.file, lock=path, reason=error.strerror or str(error)) from None
    strange = _strange(file.status, image.file)
    if strange is not None:
        raise CannotLock(base=image.file, lock=path, reason=strange)
    return file


def _strange(lock: os.stat_result, image: str) -> str | None:
    """Why nobody can rely on what is noted in it; it may be of anybody who may write the image."""
    if lock.st_nlink > 1:
        return "it is a hard link to another file"
    if lock.st_uid in (0, os.geteuid(), _owner(image)):
        return None
    with contextlib.suppress(OSError):
        model = os.stat(image)
        if model.st_mode & 0o020 and model.st_gid == lock.st_gid:
            return None
    return f"it belongs to another user ({users.name(lock.st_uid)})"
