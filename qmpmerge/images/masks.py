"""
Parts of a disk in a small qcow2 of our own: those that a comparison leaves out, and those that a dirty bitmap tells of.

Laid over two chains, an image of zeros makes both read the same where it has some, so that one `qemu-img compare` leaves out as
many parts as there are. QEMU would need a command for each of them, and hands out a bitmap's parts only over NBD, by its one
server, which may be the user's: so both are written and read by ourselves (docs/interop/qcow2.txt in QEMU's source).
"""

import functools
import operator
import os
import struct
from collections.abc import Iterable, Iterator

from qmpmerge import folder
from qmpmerge.errors import ImageUnreadable
from qmpmerge.folder import File
from qmpmerge.images import qcow2
from qmpmerge.images.qemuimg import Extent

_SMALLEST, _LARGEST = 512, 64 * 1024
_SUBCLUSTERS = 32
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_LENGTH = 104
_EXTENDED_L2 = 0x10
_ENTRY_LENGTH = 16
_BITMAPS = struct.Struct(">IIIIQQ")
_BITMAPS_EXTENSION = 0x23852875
_ENTRY = struct.Struct(">QIIBBHI")
_PLACE = 0x00FFFFFFFFFFFE00


def mask(parts: Iterable[Extent], size: int) -> File:
    """
    A qcow2 of `size` bytes that reads as zeros in these parts, and has nothing elsewhere. Its subclusters, of which a cluster
    has 32, are as large as the parts allow; what does not begin or end at 512 bytes is made wider. Where that is 4 KiB it takes
    128 KiB for each GiB that holds a part; with clusters as small QEMU would open none for disks of more than 8 TiB.
    """
    parts = [Extent(part.start, min(part.end, size) - part.start) for part in parts if part.start < size]
    grain = _grain(parts, size)
    cluster = grain * _SUBCLUSTERS
    covered = cluster // _ENTRY_LENGTH * _SUBCLUSTERS
    tables: dict[int, bytearray] = {}
    for part in parts:
        first, end = part.start // grain, -(-part.end // grain)
        for index in range(first // covered, -(-end // covered)):
            start, stop = (min(max(at - index * covered, 0), covered) for at in (first, end))
            _zero(tables.setdefault(index, bytearray(cluster)), start, stop)
    return _written(cluster, size, tables)


def _zero(table: bytearray, start: int, stop: int) -> None:
    """The subclusters from `start` to `stop`: each is a bit of four bytes in its cluster's entry, the first is the lowest."""
    whole, end = -(-start // _SUBCLUSTERS), stop // _SUBCLUSTERS
    for byte in range(8, 12):
        table[whole * _ENTRY_LENGTH + byte : end * _ENTRY_LENGTH : _ENTRY_LENGTH] = b"\xff" * (end - whole)
    for number in (*range(start, min(whole * _SUBCLUSTERS, stop)), *range(max(end * _SUBCLUSTERS, start), stop)):
        cluster, bit = divmod(number, _SUBCLUSTERS)
        table[cluster * _ENTRY_LENGTH + 11 - bit // 8] |= 1 << bit % 8


def _grain(parts: Iterable[Extent], size: int) -> int:
    edges = [edge for part in parts for edge in (part.start, part.end) if edge < size]
    together = functools.reduce(operator.or_, edges, _LARGEST)
    return max(together & -together, _SMALLEST)


def _written(cluster: int, size: int, tables: dict[int, bytearray]) -> File:
    """Header, an empty table of refcounts, which nobody reads who does not write, the upper table, and the others."""
    length = -(-size // (cluster * (cluster // _ENTRY_LENGTH)))
    start = 2 * cluster + -(-length * 8 // cluster) * cluster
    places = {index: start + number * cluster for number, index in enumerate(sorted(tables))}
    upper = struct.pack(f">{length}Q", *(places.get(index, 0) for index in range(length)))
    bits = cluster.bit_length() - 1
    places_of = (size, 0, length, 2 * cluster, cluster, 1, 0, 0)
    head = _HEADER.pack(qcow2.MAGIC, 3, 0, 0, bits, *places_of, _EXTENDED_L2, 0, 0, 4, _LENGTH)
    file = folder.in_memory()
    os.ftruncate(file.descriptor, start + len(tables) * cluster)
    os.pwrite(file.descriptor, head, 0)
    os.pwrite(file.descriptor, upper, 2 * cluster)
    for index, place in places.items():
        os.pwrite(file.descriptor, tables[index], place)
    return file


def stored(file: File, size: int) -> list[Extent]:
    """What the first dirty bitmap in a qcow2, of a disk of `size` bytes, tells of, in order. Raises ImageUnreadable."""
    try:
        return [Extent(start, min(end, size) - start) for start, end in _runs(_granules(file))]
    except (struct.error, OverflowError, MemoryError):
        raise ImageUnreadable(file=file.path, reason="what it says of its bitmap makes no sense") from None


def _granules(file: File) -> Iterator[tuple[int, int]]:
    """Where each marked part of the smallest size begins and ends."""
    cluster = 1 << struct.unpack(">I", file.read(4, 20))[0]
    directory = _directory(file)
    if directory is None:
        raise ImageUnreadable(file=file.path, reason="QEMU has put no bitmap into it")
    table, length, _flags, _kind, bits, _name, _more = _ENTRY.unpack(file.read(_ENTRY.size, directory))
    for number, entry in enumerate(struct.unpack(f">{length}Q", file.read(8 * length, table))):
        place = entry & _PLACE
        marks = file.read(cluster, place) if place else bytes([0xFF if entry & 1 else 0]) * cluster
        for index, byte in enumerate(marks):
            for bit in range(8) if byte else ():
                if byte >> bit & 1:
                    start = ((number * cluster + index) * 8 + bit) << bits
                    yield start, start + (1 << bits)


def _directory(file: File) -> int | None:
    place = struct.unpack(">I", file.read(4, 100))[0]
    while True:
        kind, length, _count, _reserved, _size, directory = _BITMAPS.unpack(file.read(_BITMAPS.size, place))
        if kind in (0, _BITMAPS_EXTENSION):
            return directory if kind else None
        place += 8 + -(-length // 8) * 8


def _runs(granules: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbours as one."""
    for start, end in granules:
        for next_start, next_end in granules:
            if next_start != end:
                yield start, end
                start = next_start
            end = next_end
        yield start, end
