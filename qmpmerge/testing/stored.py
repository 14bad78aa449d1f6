"""
Images that qemu-img and qemu-io have made once and that are put down again wherever a test wants the same ones: a tenth of the
time. What is put down is theirs to the byte, holes and all.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stored:
    """A file: its length, and the data in it that is no hole, by offset."""

    length: int
    data: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, path: Path) -> "Stored":
        """As the file is now."""
        with open(path, "rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            parts = tuple(
                (start, os.pread(file.fileno(), end - start, start)) for start, end in extents(file.fileno(), length)
            )
        return cls(length, parts)

    def put(self, path: Path) -> None:
        """Be what the file is from now on: a new one, or one that is there and stays the same file."""
        with open(path, "wb", buffering=0) as file:
            os.truncate(file.fileno(), self.length)
            for offset, part in self.data:
                os.pwrite(file.fileno(), part, offset)


def extents(descriptor: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of a file of this length that are no holes: where each begins and ends."""
    end = 0
    while end < length:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end
