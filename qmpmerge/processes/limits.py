"""How many files may be open at once: by us, and by each program that we start, which inherits the limit."""

import contextlib
import resource

from qmpmerge.errors import TooFewFiles

BESIDES = 64
"""Descriptors that are not for images: of ours 16 were counted, of a storage daemon 11, of qemu-img 7."""

PER_IMAGE = 2
"""What a storage daemon has open for one: its file, and one with its data."""


def raise_own() -> None:
    """As far as we may. The usual 1024 is there for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def refuse_few(images: int = 0) -> None:
    """What is begun with a chain of so many images must not fail in the middle of it. Raises TooFewFiles."""
    needed = BESIDES + PER_IMAGE * images
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise TooFewFiles(limit=limit, needed=needed)
