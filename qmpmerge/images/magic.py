"""
What a file begins like, for formats that we do not open: an image of one may have layers below it that we would not see.

The first bytes of a raw image belong to its guest, so nothing is opened for what they say.
"""

from qmpmerge.folder import File

_BEGINNINGS = {
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
}
"""The `probe` functions of QEMU's block drivers."""


def of(file: File) -> str | None:
    """The format, by QEMU's name, where the file begins like one of these; None for all else. Closes it. Raises OSError."""
    with file:
        head = file.read(32)
    return next((name for beginning, name in _BEGINNINGS.items() if head.startswith(beginning)), None)
