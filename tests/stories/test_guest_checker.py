"""
The checker finds what a lost write looks like, before anybody trusts it that nothing was lost.

Most of it needs no guest: the writer writes a small file on the host, the test damages it, and the checker must say how.
The last one boots one, and shows that writer and crash work there too.
"""

import subprocess
from pathlib import Path

import pytest
from rig import guests
from rig.guests import Verdict, check_image, guest

pytestmark = pytest.mark.guest

SEED = 7
SIZE = 2 * 1024 * 1024
SECTOR = 512
LAST = 2000
"""Operations written, in two halves; most sectors are written several times."""


class Disk:
    """A raw file that the writer wrote, and the same file at half of the operations."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "disk.raw"
        self.path.write_bytes(bytes(SIZE))
        self.half = self._write(1, LAST // 2)
        self.full = self._write(LAST // 2 + 1, LAST)

    def _write(self, first: int, last: int) -> bytes:
        words = ["run", "-f", str(first), "-l", str(last), str(self.path), str(SEED)]
        subprocess.run([guests.built() / "writer", *words], check=True, stdout=subprocess.DEVNULL)
        return self.path.read_bytes()

    async def check(
        self, content: bytes, *, acknowledged: int = LAST, issued: int | None = LAST, seed: int = SEED
    ) -> Verdict:
        self.path.write_bytes(content)
        return await check_image(self.path, seed, acknowledged, form="raw", issued=issued)

    def written_twice(self) -> list[int]:
        """Sectors that were written in the first half and written anew in the second."""
        return [sector for sector in range(SIZE // SECTOR) if 0 < author(self.half, sector) < author(self.full, sector)]


def author(content: bytes, sector: int) -> int:
    """The number of the operation that wrote a sector: the third of its words."""
    return int.from_bytes(content[sector * SECTOR + 16 :][:8], "little")


def replaced(content: bytes, sector: int, by: bytes) -> bytes:
    """The content with bytes at the start of one sector replaced."""
    return content[: sector * SECTOR] + by + content[sector * SECTOR + len(by) :]


def sector_of(content: bytes, sector: int) -> bytes:
    return content[sector * SECTOR :][:SECTOR]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk"))


async def test_what_was_written_is_clean(disk: Disk) -> None:
    assert (await disk.check(disk.full)).clean
    assert len(disk.written_twice()) > 500


async def test_a_zeroed_sector_is_lost(disk: Disk) -> None:
    sector = disk.written_twice()[0]
    verdict = await disk.check(replaced(disk.full, sector, bytes(SECTOR)))
    assert (verdict.lost, verdict.torn, verdict.misplaced, verdict.foreign) == (1, 0, 0, 0)
    assert f"lost: sector {sector}:" in verdict.said
    assert "zeroes" in verdict.said


@pytest.mark.parametrize("byte", [0, 9, 17, 25, 300, 511])
async def test_a_flipped_bit_is_torn(disk: Disk, byte: int) -> None:
    sector = disk.written_twice()[1]
    damaged = bytearray(sector_of(disk.full, sector))
    damaged[byte] ^= 0x10
    verdict = await disk.check(replaced(disk.full, sector, bytes(damaged)))
    assert (verdict.lost, verdict.torn, verdict.misplaced, verdict.foreign) == (0, 1, 0, 0)
    assert f"torn: sector {sector}:" in verdict.said


async def test_half_a_sector_is_torn(disk: Disk) -> None:
    sector = disk.written_twice()[2]
    verdict = await disk.check(replaced(disk.full, sector, sector_of(disk.half, sector)[:256]))
    assert (verdict.lost, verdict.torn) == (0, 1)


async def test_one_sector_rolled_back_is_lost(disk: Disk) -> None:
    sector = disk.written_twice()[3]
    verdict = await disk.check(replaced(disk.full, sector, sector_of(disk.half, sector)))
    assert (verdict.lost, verdict.torn, verdict.misplaced, verdict.foreign) == (1, 0, 0, 0)
    assert f"operation {author(disk.half, sector)} found" in verdict.said


async def test_every_sector_that_is_rolled_back_is_found(disk: Disk) -> None:
    content = bytearray(disk.full)
    for sector in disk.written_twice():
        content[sector * SECTOR : (sector + 1) * SECTOR] = sector_of(disk.half, sector)
    assert (await disk.check(bytes(content))).lost == len(disk.written_twice())


async def test_a_stale_image_is_lost(disk: Disk) -> None:
    verdict = await disk.check(disk.half, issued=None)
    assert verdict.lost > 500
    assert verdict.newest <= LAST // 2


async def test_a_sector_of_another_place_is_misplaced(disk: Disk) -> None:
    here, there = disk.written_twice()[4:6]
    verdict = await disk.check(replaced(disk.full, here, sector_of(disk.full, there)))
    assert (verdict.lost, verdict.torn, verdict.misplaced, verdict.foreign) == (0, 0, 1, 0)
    assert f"misplaced: sector {here}: holds sector {there} of" in verdict.said


async def test_what_others_wrote_is_foreign(disk: Disk) -> None:
    verdict = await disk.check(replaced(disk.full, 3, b"somebody else's".ljust(SECTOR)))
    assert (verdict.lost, verdict.torn, verdict.misplaced, verdict.foreign) == (0, 0, 0, 1)
    assert (await disk.check(disk.full, seed=SEED + 1)).foreign > 1000


async def test_operations_after_the_last_acknowledgement_may_be_there_or_not(disk: Disk) -> None:
    assert (await disk.check(disk.full, acknowledged=LAST - 100, issued=None)).clean
    assert (await disk.check(disk.half, acknowledged=LAST // 2 - 100, issued=None)).clean
    assert not (await disk.check(disk.full, acknowledged=LAST - 100, issued=LAST - 50)).clean


async def test_what_the_writer_must_have_seen_acknowledged_counts_even_if_we_did_not_hear_it(disk: Disk) -> None:
    """It is never more than a window ahead, so a disk with operation 2000 holds all of the first 1000."""
    sector = next(n for n in disk.written_twice() if author(disk.full, n) < LAST - 600)
    rolled_back = replaced(disk.full, sector, sector_of(disk.half, sector))
    assert (await disk.check(rolled_back, acknowledged=1, issued=None)).lost == 1


# --- the same in a guest ---------------------------------------------------------------------------------------------


def drive(path: Path) -> list[str]:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    return ["-drive", f"file={path},if=virtio,format=qcow2,discard=unmap"]


async def test_a_killed_qemu_loses_nothing_acknowledged(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    async with guest([drive(image)], agent=False) as vm:
        writer = await vm.start_writer("/dev/vda", SEED)
        await writer.advance(300)
        last = await writer.stop()
        assert (await vm.check("/dev/vda", SEED, last, issued=last)).clean
        writer = await vm.start_writer("/dev/vda", SEED, first=last + 1)
        await writer.advance(300)
        await vm.kill()
    assert 0 < max(writer.slowest) <= writer.times[-1] - writer.times[0]
    verdict = await check_image(image, SEED, writer.acknowledged)
    assert verdict.clean, verdict.said
    assert verdict.newest > last
