"""
Whether a raw file is as long as QEMU believes: its length alone says how large the disk is that the next start finds.

QEMU asks for it once, and reads zeros from where a file ends that was cut off since.
"""

import os
import stat
from collections.abc import Iterable

from qmpmerge.chain.chain import Image
from qmpmerge.value import Value

SECTOR = 512
"""QEMU counts in these, and rounds up."""


class Cut(Value):
    """A raw file that has `size` bytes, where QEMU believes that it has `needed`."""

    file: str
    size: int
    needed: int


def cut(images: Iterable[Image]) -> Cut | None:
    """The first file of these images, or of their data, that was cut off; where that cannot be seen it was not."""
    files = (file for image in images for file in (image, image.data) if file is not None)
    return next((found for file in files if (found := _cut(file)) is not None), None)


def _cut(image: Image) -> Cut | None:
    start = image.slice.offset if image.slice is not None else 0
    if image.format != "raw" or not image.has_path or image.is_renamed or start is None:
        return None
    try:
        status = os.stat(image.file)
    except (OSError, ValueError):
        return None
    is_it = stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) == image.inode
    needed, size = start + image.virtual_size, status.st_size
    return Cut(image.file, size, needed) if is_it and -size // SECTOR * -SECTOR < needed else None
