"""
A lock of our own beside the base, so that two qmpmerge never meet on it.

QEMU's image locks keep other processes from writing; they do not keep two of us from checking at the same time.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from qmpmerge.chain import Image
from qmpmerge.errors import Locked


def lock_path(base: Image) -> str:
    """``.NAME.qmpmerge-lock`` in the folder of the real file."""
    folder, name = os.path.split(os.path.realpath(base.file))
    return os.path.join(folder, f".{name}.qmpmerge-lock")


@contextlib.contextmanager
def held(base: Image) -> Iterator[None]:
    """
    Hold the lock of `base` during the block; the kernel drops it with our process.

    A base without a path, or in a folder where we may not write, has no lock: then QEMU alone keeps others away.
    Raises Locked.
    """
    path = lock_path(base)
    descriptor = _take(path, base) if base.has_path else None
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(descriptor)


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
