"""Headers made by hand, and what is opened while they are read."""

import struct
import subprocess

from qmpmerge.images import qcow2
from rig import machines
from rig.machines import MIB


def may_trace() -> bool:
    command = ["strace", "-f", "-o", "/dev/null", "true"]
    return machines.have("strace") and subprocess.run(command, capture_output=True, check=False).returncode == 0


def raw_header(
    backing: bytes | None = None,
    backing_format: bytes | None = None,
    *,
    data_file: bytes | None = None,
    version: int = 3,
    size: int = MIB,
    crypt: int = 0,
) -> bytes:
    """A header as QEMU writes it, of no use but for reading it: there are no tables."""
    names = {0xE2792ACA: backing_format, 0x44415441: data_file}
    extensions = b"".join(
        struct.pack(">II", kind, len(name)) + name + bytes(-len(name) % 8)
        for kind, name in names.items()
        if name is not None
    )
    length = 104 if version >= 3 else 72
    offset = length + len(extensions) + 8 if backing is not None else 0
    fixed = struct.pack(">4sIQIIQI", qcow2.MAGIC, version, offset, len(backing or b""), 16, size, crypt)
    head = (fixed + bytes(24)).ljust(length, b"\0")
    if version >= 3:
        head = head[:96] + struct.pack(">II", 4, length)
    return head + extensions + bytes(8) + (backing or b"") + bytes(64)
