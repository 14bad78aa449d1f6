"""What is left out of a comparison, as QEMU reads it; dirty bitmaps are in tests/qemu/test_writes.py."""

import json
import os
import random
import subprocess

import pytest

from qmpmerge import folder
from qmpmerge.errors import ImageUnreadable
from qmpmerge.images import masks, ranges
from qmpmerge.images.ranges import Range

MIB = 1024 * 1024


def zeros(parts: list[Range], size: int) -> list[Range]:
    """What qemu-img says of the mask around these parts: all that is there reads as zeros."""
    with masks.around(parts, size) as file:
        assert os.fstat(file.descriptor).st_blocks * 512 < 16 * MIB
        told = subprocess.run(
            ["qemu-img", "map", "--output=json", file.link], capture_output=True, check=True, pass_fds=[file.descriptor]
        ).stdout
    found = [one for one in json.loads(told) if one["present"]]
    assert all(one["zero"] for one in found)
    return ranges.joined((one["start"], one["start"] + one["length"]) for one in found)


@pytest.mark.parametrize(
    ("grain", "size"), [(512, 96 * MIB + 512), (4096, 600 * MIB), (64 * 1024, MIB * MIB + 4096), (2 * MIB, MIB * MIB)]
)
def test_qemu_reads_zeros_all_around_the_parts_and_has_nothing_there(grain: int, size: int) -> None:
    chance = random.Random(grain)
    edges = sorted(chance.sample(range(1, size // grain), 80))
    parts = [(start * grain, end * grain) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    near = [(place, place + grain) for place in range(edges[-1] * grain + grain, size, 3 * grain)][:40]
    for found in (parts, [(0, grain), *parts, *near, (size // grain * grain, size + grain)], [(0, size)], []):
        assert zeros(found, size) == ranges.without([(0, size)], found)


def test_what_begins_or_ends_within_a_sector_is_read_with_it() -> None:
    assert zeros([(5000, 5001), (MIB - 1, MIB)], 2 * MIB) == [(0, 4608), (5120, MIB - 512), (MIB, 2 * MIB)]


def test_what_is_no_qcow2_with_a_bitmap_is_unreadable() -> None:
    with masks.around([], MIB) as file, pytest.raises(ImageUnreadable, match="no bitmap"):
        masks.stored(file, MIB)
    with folder.in_memory() as file, pytest.raises(ImageUnreadable, match="no sense"):
        masks.stored(file, MIB)
