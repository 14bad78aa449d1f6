"""
A guest of 512 bytes that never stops writing, on a real virtual processor that stands still when the guest is paused.

It is a boot sector: write N puts N, 128 times, into the sector (37 * N) mod 16384 of the second disk by way of the BIOS,
and then says N on port 0xe9, which QEMU keeps in a file. With ``cache=writethrough`` what was said has been flushed.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

SECTORS = 16384
_STEP = 37
# cli; ds = es = ss = 0; sp = 0x7c00; sti; cld; ebp = 1
# next: fill 0x8000 with ebp; dap.lba = (ebp * 37) & 0x3fff; int 0x13, ah = 0x43, dl = 0x81; jc failed
#       say the four bytes of ebp on port 0xe9; ebp += 1; jmp next
# failed: say ff ff ff ff; jmp next
# dap: 16 bytes, 1 sector, from 0:0x8000
_CODE = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007cfbfc66bd010000006689e8bf0080b9800066f3ab666bc5256625ff3f000066a35f7cbe577cb281b80043cd13"
    "72126689e8b90400e6e966c1e808e2f86645ebc8b0ffb90400e6e9e2fcebbd1000010000800000"
)


def arguments(folder: Path, disk: Sequence[str]) -> list[str]:
    """QEMU's: the boot disk, the disk under test with its ``-drive`` options, where the writer says what it has written."""
    boot = folder / "boot.img"
    boot.write_bytes(_CODE.ljust(510, b"\0") + b"\x55\xaa" + bytes(1024 * 1024 - 512))
    return [
        *("-m", "32", "-drive", f"file={boot},if=none,id=boot,format=raw", "-device", "ide-hd,drive=boot,bootindex=0"),
        *("-drive", ",".join((*disk, "if=none,id=vda,cache=writethrough"))),
        *("-device", "virtio-blk-pci,drive=vda,bootindex=1", "-debugcon", f"file:{folder / 'said'}"),
    ]


def said(folder: Path) -> int:
    """The number of the last write that is known to be done; all before it are done too."""
    data = (folder / "said").read_bytes()
    count = len(data) // 4
    assert struct.unpack(f"<{count}I", data[: 4 * count]) == tuple(range(1, count + 1)), "a write failed"
    return count


def sector(number: int) -> tuple[int, bytes]:
    """Where write `number` goes, and what it puts there."""
    return (number * _STEP) % SECTORS, struct.pack("<I", number) * 128


def wrong(view: bytes, before: bytes, done: int) -> str:
    """What a disk shows that it must not; empty where all is right. One write more than those known may be there."""
    expected = bytearray(before)
    for number in range(1, done + 1):
        place, data = sector(number)
        expected[place * 512 : place * 512 + 512] = data
    place, data = sector(done + 1)
    if view[place * 512 : place * 512 + 512] == data:
        expected[place * 512 : place * 512 + 512] = data
    bad = [at // 512 for at in range(0, len(expected), 512) if view[at : at + 512] != expected[at : at + 512]]
    return f"{len(bad)} of {SECTORS} sectors are wrong, {bad[:4]} first" if bad else ""
