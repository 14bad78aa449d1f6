"""
The folder of a replay: nobody else's, and gone with it.

Of one that was killed it stays; the next replay of the same user removes it, for nobody has it locked any more.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator

PREFIX = "qmpmerge-replay-"
"""How they are called, where temporary files lie (`TMPDIR`)."""


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """A new one, for the length of the block. Raises OSError."""
    _remove_what_was_left()
    while True:
        path = os.path.realpath(tempfile.mkdtemp(prefix=PREFIX))
        descriptor = _locked(path)
        if descriptor is not None:
            break  # else somebody has just taken it for one that was left, and removes it
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _remove_what_was_left() -> None:
    place = tempfile.gettempdir()
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for path in [entry.path for entry in entries if entry.name.startswith(PREFIX)]:
            descriptor = _locked(path)
            if descriptor is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)


def _locked(path: str) -> int | None:
    """Open; None where it is not ours, or somebody has it, or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(descriptor)
        if status.st_uid == os.geteuid() and os.path.samestat(status, os.lstat(path)):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
