"""What is written is on its way to the storage soon, and a merge sees to that while it copies."""

import asyncio
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from rig.machines import MIB, make_chain, run

import qmpmerge
from qmpmerge.chain.chain import Image
from qmpmerge.engine.pace import writeback
from qmpmerge.engine.pace.progress import Progress

FIEMAP = 0xC020660B  # FS_IOC_FIEMAP, linux/fs.h
DELAYED = 0x4  # FIEMAP_EXTENT_DELALLOC: in memory alone, no place on the storage has been chosen
EXTENTS = 256


def written_back(file: Path) -> int:
    """So many bytes of it have left memory."""
    answer = bytearray(struct.pack("=QQLLLL", 0, 2**64 - 1, 0, 0, EXTENTS, 0) + bytes(56 * EXTENTS))
    with file.open("rb") as opened:
        try:
            fcntl.ioctl(opened, FIEMAP, answer)
        except OSError:
            pytest.skip("a filesystem that does not tell what it has written back")
    (count,) = struct.unpack_from("=L", answer, 20)
    # fe_length and fe_flags of struct fiemap_extent (linux/fiemap.h)
    found = [struct.unpack_from("=Q16xL", answer, 32 + 56 * number + 16) for number in range(count)]
    return sum(length for length, flags in found if not flags & DELAYED)


def image(file: Path) -> Image:
    status = file.stat()
    return Image(str(file), "raw", status.st_size, inode=(status.st_dev, status.st_ino))


def is_at_work() -> bool:
    return any(thread.name == writeback.NAME for thread in threading.enumerate())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it stays as it is"
        time.sleep(0.01)


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """A file that is in memory alone: left to itself it is for many seconds."""
    file = tmp_path / "base.raw"
    file.write_bytes(b"x" * MIB)
    if written_back(file):
        pytest.skip("a filesystem that chooses places at once")
    return file


def test_what_is_written_is_written_back_soon(dirty: Path) -> None:
    with writeback.early(image(dirty), None):
        until(lambda: written_back(dirty) == MIB)
        assert is_at_work()
    until(lambda: not is_at_work())


def test_another_file_under_the_name_is_left_alone(dirty: Path) -> None:
    meant = image(dirty)
    dirty.rename(dirty.with_name("aside"))
    dirty.write_bytes(b"y")
    with writeback.early(meant, os.getpid()):
        assert not is_at_work()


def test_what_is_not_there_is_left_alone(tmp_path: Path) -> None:
    with writeback.early(Image(str(tmp_path / "gone"), "raw", 0, inode=(1, 1)), None):
        assert not is_at_work()


def test_a_device_is_left_alone() -> None:
    if not Path("/dev/loop0").exists():
        pytest.skip("no block device to look at")
    with writeback.early(image(Path("/dev/loop0")), None):
        assert not is_at_work()


@pytest.mark.parametrize("way", ["commit", "pull"])
def test_it_is_written_back_while_it_is_copied(tmp_path: Path, way: Literal["commit", "pull"]) -> None:
    images = make_chain(tmp_path, ["base.raw", "a.qcow2", "b.qcow2"], 64 * MIB)
    run("qemu-io", "-c", f"write -P 1 0 {24 * MIB}", images[1])
    receiver = images[0] if way == "commit" else images[-1]
    seen: list[int] = []

    def look(_progress: Progress) -> None:
        seen.append(written_back(receiver))

    async def merge() -> None:
        async with qmpmerge.offline(images[-1]) as target:
            if way == "commit":
                await qmpmerge.commit(target, top=str(images[1]), speed=24 * MIB, report=look)
            else:
                await qmpmerge.pull(target, base=str(images[0]), speed=24 * MIB, report=look)

    asyncio.run(merge())
    assert max(seen) > 2 * MIB, "QEMU alone writes a block, when it makes the file"
