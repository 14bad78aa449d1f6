"""
Empty images of our own that stand between those of a long chain, and say in their headers what lies below.

Described in one piece, each image of a chain stands within the description of the one above it, and what QEMU takes to open
that grows with the cube of their number. What a header says it reads when it gets there.
"""

import os

from qmpmerge import folder
from qmpmerge.folder import File
from qmpmerge.images import qcow2

SHORT = 40
"""Chains of up to so many images need none."""

EVERY = 4
"""So many images are described in one piece; all above the last link are, where there may be no more of them."""

MOST = 840
"""Images and links one upon the other: QEMU 10 and 11 crash at the first read through some 870."""

_CLUSTER = 64 * 1024
_NO_EXTENSION = bytes(8)


def budget(images: int) -> int:
    """How many may stand in a chain of so many images."""
    return max(0, MOST - images) if images > SHORT else 0


def to(source: str, size: int) -> File | None:
    """A link to what `source` describes, which shows `size` bytes of it; None where that does not fit into a header."""
    name = source.encode()
    if len(name) > qcow2.LONGEST_NAME:
        return None
    length = -(-size // (_CLUSTER * _CLUSTER // 8))
    bits, upper = _CLUSTER.bit_length() - 1, 2 * _CLUSTER
    head = qcow2.WRITTEN.pack(
        *(qcow2.MAGIC, 3, qcow2.LENGTH + len(_NO_EXTENSION), len(name), bits, size, 0, length, upper, _CLUSTER, 1),
        *(0, 0, 0, 0, 0, 4, qcow2.LENGTH),
    )
    file = folder.in_memory()
    os.ftruncate(file.descriptor, upper + -(-length * 8 // _CLUSTER) * _CLUSTER)
    os.pwrite(file.descriptor, head + _NO_EXTENSION + name, 0)
    return file
