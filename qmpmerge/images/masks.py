"""
Parts of a disk in a small qcow2 of our own: those that a comparison is to read, and those that a dirty bitmap tells of.

Laid over two chains, an image of zeros with holes makes both read the same but for the holes, so that one `qemu-img compare`
reads as many parts as there are, and nothing in between. QEMU would need a command for each of them, and hands out a bitmap's
parts only over NBD, by its one server, which may be the user's: so both are written and read by ourselves
(docs/interop/qcow2.txt in QEMU's source).
"""

import functools
import operator
import os
import struct
from collections.abc import Iterable, Iterator

from qmpmerge import folder
from qmpmerge.errors import ImageUnreadable
from qmpmerge.folder import File
from qmpmerge.images import qcow2, ranges
from qmpmerge.images.qemuimg import Extent
from qmpmerge.images.ranges import Range

LARGEST = 64 * 1024
"""What a mask tells apart at the most: 1 TiB is 8 MiB of tables then."""

_SMALLEST = 512
_EXTENDED = 1 << 4  # of the features: 32 bits for each cluster tell which parts of it read as zeros (`extended_l2`)
_PARTS = 32
_ZEROS = struct.pack(">QII", 0, 0xFFFFFFFF, 0)
_NOTHING = bytes(len(_ZEROS))
_BITMAPS = struct.Struct(">IIIIQQ")
_BITMAPS_EXTENSION = 0x23852875
_ENTRY = struct.Struct(">QIIBBHI")
_PLACE = 0x00FFFFFFFFFFFE00


def around(parts: Iterable[Range], size: int) -> File:
    """
    A qcow2 of `size` bytes that has nothing in these parts, which are in order and apart, and reads as zeros elsewhere; for
    QEMU 5.2 or newer. What does not begin or end at 512 bytes is made wider.
    """
    grain = _grain(parts := [part for part in parts if part[0] < size], size)
    cluster = grain * _PARTS
    span = cluster // len(_ZEROS) * cluster
    tables: dict[int, bytearray] = {}
    for begin, end in ranges.aligned(parts, grain):
        for number in range(begin // span, -(-min(end, size) // span)):
            if number not in tables:
                tables[number] = bytearray(_ZEROS * (cluster // len(_ZEROS)))
            start, stop = (min(max(edge - number * span, 0), span) // grain for edge in (begin, end))
            _open(tables[number], start, stop)
    return _written(cluster, size, tables)


def _grain(parts: Iterable[Range], size: int) -> int:
    edges = [edge for part in parts for edge in part if edge < size]
    together = functools.reduce(operator.or_, edges, LARGEST)
    return max(together & -together, _SMALLEST)


def _open(table: bytearray, start: int, stop: int) -> None:
    """Leave a hole in a table of zeros, from one grain to before another."""
    first, last = start // _PARTS, (stop - 1) // _PARTS
    for entry in {first, last}:
        begin, end = (min(max(edge - entry * _PARTS, 0), _PARTS) for edge in (start, stop))
        bits = int.from_bytes(table[16 * entry + 8 : 16 * entry + 12], "big") & ~((1 << end) - (1 << begin))
        table[16 * entry + 8 : 16 * entry + 12] = bits.to_bytes(4, "big")
    if last > first + 1:
        table[16 * (first + 1) : 16 * last] = _NOTHING * (last - first - 1)


def _written(cluster: int, size: int, tables: dict[int, bytearray]) -> File:
    """
    Header, an empty table of refcounts, which nobody reads who does not write, the upper table, a table of zeros alone, to
    which every entry leads that has none of its own, and these.
    """
    length = -(-size // (cluster // len(_ZEROS) * cluster))
    start = 2 * cluster + ranges.up(length * 8, cluster)
    places = {number: start + count * cluster for count, number in enumerate(sorted(tables), 1)}
    upper = struct.pack(f">{length}Q", *(places.get(number, start) for number in range(length)))
    bits = cluster.bit_length() - 1
    head = qcow2.WRITTEN.pack(
        *(qcow2.MAGIC, 3, 0, 0, bits, size, 0, length, 2 * cluster, cluster, 1, 0, 0, _EXTENDED, 0, 0, 4, qcow2.LENGTH)
    )
    file = folder.in_memory()
    os.ftruncate(file.descriptor, start + (1 + len(tables)) * cluster)
    os.pwrite(file.descriptor, head, 0)
    os.pwrite(file.descriptor, upper, 2 * cluster)
    os.pwrite(file.descriptor, _ZEROS * (cluster // len(_ZEROS)), start)
    for number, place in places.items():
        os.pwrite(file.descriptor, tables[number], place)
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
