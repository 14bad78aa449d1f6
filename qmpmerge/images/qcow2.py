"""
What a qcow2 header says, read by ourselves.

qemu-img opens an image's data file along with it, and takes 10 ms an image; walking a stranger's chain must open nothing
that a header names, and looking for dependents means thousands of headers. So this one page of the format is our own
(docs/interop/qcow2.txt in QEMU's source). Everything that is written or read as data goes through QEMU.
"""

import errno
import os
import stat
import struct
from dataclasses import field
from typing import NamedTuple

from qmpmerge import folder
from qmpmerge.chain import backing
from qmpmerge.chain.chain import Image
from qmpmerge.folder import File
from qmpmerge.value import Value

MAGIC = b"QFI\xfb"
_FIXED = struct.Struct(">4sIQIIQI")
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE = 0x44415441
_BITMAPS = 0x23852875
LONGEST_NAME = 1023
_LARGEST_TABLE = 32 * 1024 * 1024  # QCOW_MAX_L1_SIZE in block/qcow2.h
_EXTENDED_ENTRIES = 1 << 4
_DIRTY = 1 << 0
_CORRUPT = 1 << 1
_EXTERNAL_DATA = 1 << 2
# A header with its extensions fits in the smallest cluster that anybody uses; the name may lie behind it.
_READ = 65536
_WHOLE = struct.Struct(">4sI8x4xIQIIQQIIQQQQII")
WRITTEN, LENGTH = struct.Struct(">4sIQIIQIIQQIIQQQQII"), 104
"""A header of version 3 as we write it, of files that are in memory only, and how long it is."""


SMALLEST_PART, TABLE_PART = 512, 64 * 1024
"""
So much of a second-level table QEMU reads at a time where it is told to (`l2-cache-entry-size`), up to a cluster. Its default
are 4 KiB, among 8192 of which each miss is a search through all: to walk a whole disk of 1 TiB takes three times as long.
"""


LARGEST_CLUSTER = 2 * 1024 * 1024
"""The most that QEMU takes."""


class _Whole(NamedTuple):
    """The fixed part of a header of version 3 but for the backing file's name, in the order of the file."""

    magic: bytes
    version: int
    bits: int
    size: int
    crypt: int
    l1_size: int
    l1_offset: int
    refcounts_offset: int
    refcounts_clusters: int
    snapshots: int
    snapshots_offset: int
    features: int
    compatible: int
    autoclear: int
    order: int
    length: int


class Qcow2Header(Value):
    """
    Names as they are written; sizes in bytes; `encrypted` also for the old AES method.

    `version` is 2 (`compat=0.10`) or 3. `entry_size` is that of an entry of the second-level tables, 16 with extended entries
    (`extended_l2`). `dirty` says that its reference
    counts are not to be trusted (`lazy_refcounts`): QEMU counts anew as it opens the image for writing. `corrupt` is QEMU's
    mark, `snapshots` the number of internal ones. `has_bitmaps`: dirty bitmaps are stored in it.
    """

    virtual_size: int
    backing: str | None
    backing_format: str | None
    data_file: str | None
    encrypted: bool
    version: int = field(default=3, compare=False)
    cluster_size: int = field(default=65536, compare=False)
    entry_size: int = field(default=8, compare=False)
    dirty: bool = field(default=False, compare=False)
    corrupt: bool = field(default=False, compare=False)
    snapshots: int = field(default=0, compare=False)
    has_bitmaps: bool = field(default=False, compare=False)

    @property
    def span(self) -> int:
        """Bytes of the disk that one second-level table covers."""
        return self.cluster_size // self.entry_size * self.cluster_size

    @property
    def table_part(self) -> int:
        """What QEMU is to read of its tables at a time by whoever walks the whole disk."""
        return min(self.cluster_size, TABLE_PART)


def read_of(image: Image) -> Qcow2Header | None:
    """The same of an image that may be a part of its file. Raises OSError, also where nobody tells which part."""
    if image.slice is not None and image.slice.offset is None:
        raise OSError(errno.EINVAL, "QEMU uses a part of it, and does not tell which")
    return read(image.file, image.slice.offset or 0 if image.slice is not None else 0)


def read(path: str, offset: int = 0) -> Qcow2Header | None:
    """
    The header of the regular file or block device at `path`, from this byte on; None where it is not qcow2.

    Nothing else is opened. Raises OSError, also for a header that makes no sense.
    """
    with folder.looked_at(path) as seen:
        return None if seen.is_special else read_from(folder.opened(seen), offset)


def read_from(file: File, offset: int = 0) -> Qcow2Header | None:
    """The same of one that is open; it is closed."""
    with file:
        if file.read(len(MAGIC), offset) != MAGIC:
            return None
        header = decode(file.read(_READ, offset))
    if header is None:
        raise OSError(errno.EINVAL, "it begins like qcow2, but its header makes no sense")
    return header


def data_path(image: Image) -> str | None:
    """As `data_in`, of the header as it is now. Raises OSError."""
    return data_in(image, read_of(image))


def data_in(image: Image, header: Qcow2Header | None) -> str | None:
    """
    The data file of an image with this header, its name resolved as QEMU does; None where it has none.

    Raises OSError where the name leads to anything but a regular file: nothing else is to be opened for it.
    """
    if header is None or header.data_file is None:
        return None
    name = backing.named_path(header.data_file)
    found = os.path.join(os.path.dirname(image.file), name) if name is not None else ""
    if not found or not stat.S_ISREG(os.stat(found).st_mode):
        raise OSError(errno.EINVAL, f"its data file {header.data_file} is not a regular file")
    return found


def is_empty(path: str) -> bool:
    """
    Whether a qcow2 image holds nothing at all, so that it shows what it is built on: its first-level table is empty, and it has
    no snapshot. Whoever has it open may know better. Raises OSError.
    """
    with folder.reading(path) as file:
        start = file.read(72)
        if start[:4] != MAGIC or len(start) < 72 or struct.unpack_from(">I", start, 60) != (0,):
            return False
        entries, offset = struct.unpack_from(">IQ", start, 36)
        table = file.read(entries * 8, offset) if entries * 8 <= _LARGEST_TABLE and offset < 1 << 62 else b""
    return len(table) == entries * 8 > 0 and not any(table)


def is_plain(path: str) -> bool:
    """
    Whether QEMU opens a qcow2 image as far as its header tells, and finds no mark in it: it uses nothing but what every image
    has, and its tables lie in the file. Of all others QEMU has to be asked. Raises OSError.
    """
    with folder.reading(path) as file:
        start, end = file.read(_WHOLE.size + 8), file.status.st_size
    if len(start) < _WHOLE.size + 8:
        return False
    header = _Whole(*_WHOLE.unpack_from(start))
    cluster = 1 << min(header.bits, 32)
    covered = cluster * cluster // (16 if header.features & _EXTENDED_ENTRIES else 8)
    tables = ((header.l1_offset, header.l1_size * 8), (header.refcounts_offset, header.refcounts_clusters * cluster))
    return (
        (header.magic, header.version) == (MAGIC, 3)
        and 9 <= header.bits <= 21
        and not (header.crypt or header.snapshots or header.snapshots_offset or header.autoclear)
        and not header.features & ~_EXTENDED_ENTRIES
        and header.order <= 6
        and header.length in (_WHOLE.size, _WHOLE.size + 8)  # with room for a compression type, which is the usual one
        and not (header.length > _WHOLE.size and any(start[_WHOLE.size :]))
        and header.l1_size * covered >= header.size
        and all(offset and 0 < size <= _LARGEST_TABLE for offset, size in tables)
        and all(offset % cluster == 0 and offset + size <= end for offset, size in tables)
    )


def decode(data: bytes) -> Qcow2Header | None:
    """Decode the first bytes of a file; None where they are no header, or one that makes no sense."""
    if len(data) < 72 or data[:4] != MAGIC:
        return None
    _magic, version, offset, length, bits, size, crypt = _FIXED.unpack_from(data)
    features = struct.unpack_from(">Q", data, 72)[0] if version >= 3 and len(data) >= 104 else 0
    header_length = struct.unpack_from(">I", data, 100)[0] if version >= 3 and len(data) >= 104 else 72
    names = _extensions(data, header_length, offset or len(data))
    if features & _EXTERNAL_DATA and _DATA_FILE not in names:
        return None  # it has a data file, whose name it hides from us
    backing = None
    if offset:
        if not 0 < length <= LONGEST_NAME or offset + length > len(data):
            return None
        # QEMU reads it as a C string
        backing = os.fsdecode(data[offset : offset + length].partition(b"\0")[0])
        if not backing:
            return None
    return Qcow2Header(
        virtual_size=size,
        backing=backing,
        backing_format=names.get(_BACKING_FORMAT),
        data_file=names.get(_DATA_FILE),
        encrypted=crypt != 0,
        version=version,
        cluster_size=1 << min(bits, LARGEST_CLUSTER.bit_length() - 1),
        entry_size=16 if features & _EXTENDED_ENTRIES else 8,
        dirty=bool(features & _DIRTY),
        corrupt=bool(features & _CORRUPT),
        snapshots=struct.unpack_from(">I", data, 60)[0],
        has_bitmaps=_BITMAPS in names,
    )


def _extensions(data: bytes, start: int, end: int) -> dict[int, str]:
    """The header extensions that somebody asks for, those that are names decoded; 0 ends the list."""
    found: dict[int, str] = {}
    position, end = start, min(end, len(data))
    while position + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(data, position)
        position += _EXTENSION.size
        if kind == 0 or position + length > end:
            break
        if kind in (_BACKING_FORMAT, _DATA_FILE, _BITMAPS):
            found[kind] = os.fsdecode(data[position : position + length].partition(b"\0")[0])
        position += (length + 7) & ~7
    return found
