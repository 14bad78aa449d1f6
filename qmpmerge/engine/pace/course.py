"""
The course of a job that walks the whole disk: QEMU tells where it is, this how much of what has to be copied lies behind it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from qmpmerge.images.qemuimg import Extent


class Course:
    """`extents` are what is copied, in order and apart; `total` is their bytes."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self.extents = extents
        self._starts = [extent.start for extent in extents]
        self._before = [0, *accumulate(extent.length for extent in extents)]

    @property
    def total(self) -> int:
        """Bytes that are copied in all."""
        return self._before[-1]

    def done(self, offset: int) -> int:
        """Bytes of it that lie before the byte `offset` of the disk."""
        number = bisect_right(self._starts, offset)
        if number == 0:
            return 0
        last = self.extents[number - 1]
        return self._before[number - 1] + min(offset - last.start, last.length)
