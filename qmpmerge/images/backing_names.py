"""
The backing file that an image's header names, whatever its format: what a search for dependents reads of every file.

qcow2 by `qcow2`; QED (docs/interop/qed_spec.txt in QEMU's source) and VMDK (its descriptor is text) by the few bytes that
hold the name. Nothing that a header names is opened.
"""

import os
import re
import stat
import struct

from qmpmerge import folder
from qmpmerge.folder import File
from qmpmerge.images import qcow2

_QED = b"QED\0"
_QED_HEADER = struct.Struct("<4sIIIQQQQQII")
_QED_HAS_BACKING = 1
_VMDK_TEXT = b"# Disk DescriptorFile"
_VMDK_SPARSE = b"KDMV"
_VMDK_DESCRIPTOR = struct.Struct("<QQ")
_SECTOR = 512
_LONGEST = 65536
_PARENT = rb'(?m)^parentFileNameHint\s*=\s*"([^"\n]*)"'


def read(path: str, *, device: bool = False) -> str | None:
    """
    The backing name in the header of the file at `path`; None where it has none, or is of another format.

    A FIFO is not read, nor a block device, unless it is known to be one that may be (`device`). Raises OSError.
    """
    with folder.looked_at(path) as seen:
        mode = seen.status.st_mode
        return _read(seen) if stat.S_ISREG(mode) or (device and stat.S_ISBLK(mode)) else None


def _read(seen: File) -> str | None:
    with folder.opened(seen) as file:
        start = file.read(4096)
        if start.startswith(qcow2.MAGIC):
            header = qcow2.decode(start) or qcow2.decode(file.read(_LONGEST))
            return header.backing if header is not None else None
        return _qed(file, start) if start.startswith(_QED) else _vmdk(file, start)


def _qed(file: File, start: bytes) -> str | None:
    if len(start) < _QED_HEADER.size:
        return None
    _magic, _cluster, _table, _size, features, *_others, offset, length = _QED_HEADER.unpack_from(start)
    if not features & _QED_HAS_BACKING:
        return None
    return _decoded(file.read(min(length, _LONGEST), offset))


def _vmdk(file: File, start: bytes) -> str | None:
    text = start if start.startswith(_VMDK_TEXT) else b""
    if start.startswith(_VMDK_SPARSE) and len(start) >= _SECTOR:
        offset, size = (sectors * _SECTOR for sectors in _VMDK_DESCRIPTOR.unpack_from(start, 28))
        text = file.read(min(size, _LONGEST), offset) if offset < 1 << 62 else b""
    parent = re.search(_PARENT, text)
    return _decoded(parent[1]) if parent is not None else None


def _decoded(name: bytes) -> str | None:
    """A name, which QEMU reads as a C string."""
    return os.fsdecode(name.partition(b"\0")[0]) or None
