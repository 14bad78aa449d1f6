"""What is left out of a comparison, as QEMU reads it; dirty bitmaps are in tests/qemu/test_writes.py."""

import json
import random
import subprocess

import pytest

from qmpmerge import folder
from qmpmerge.errors import ImageUnreadable
from qmpmerge.images import masks
from qmpmerge.images.qemuimg import Extent

SIZE = 96 * 1024 * 1024
GIB = 1024 * 1024 * 1024


@pytest.mark.parametrize("size", [SIZE, 200 * GIB, 9 * 1024 * GIB])
@pytest.mark.parametrize("grain", [512, 4096, 64 * 1024, 2 * 1024 * 1024])
def test_qemu_reads_zeros_in_the_parts_and_has_nothing_elsewhere(grain: int, size: int) -> None:
    chance = random.Random(grain)
    edges = sorted(chance.sample(range(1, SIZE // grain), 40)) if grain < 2 * 1024 * 1024 else [1, 5, 6, 40]
    parts = [Extent(start * grain, (end - start) * grain) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    with masks.mask([*parts, Extent(size - grain, 2 * grain)], size) as file:
        told = subprocess.run(
            ["qemu-img", "map", "--output=json", file.link], capture_output=True, check=True, pass_fds=[file.descriptor]
        ).stdout
    seen = [(one["start"], one["start"] + one["length"]) for one in json.loads(told) if one["present"]]
    assert seen == [(part.start, part.end) for part in [*parts, Extent(size - grain, grain)]]


def test_what_is_no_qcow2_with_a_bitmap_is_unreadable() -> None:
    with masks.mask([], SIZE) as file, pytest.raises(ImageUnreadable, match="no bitmap"):
        masks.stored(file, SIZE)
    with folder.in_memory() as file, pytest.raises(ImageUnreadable, match="no sense"):
        masks.stored(file, SIZE)
