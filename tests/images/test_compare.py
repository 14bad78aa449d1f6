"""What is compared before the switch: all that was copied, and not the whole disk."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rig.machines import MIB, SIZE, Content, fill, make_chain, run

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.images import compare, qemuimg
from qmpmerge.images.compare import PARTS, SMALL_GAP, parts
from qmpmerge.images.qemuimg import Extent

DISK = 64 * SMALL_GAP


@st.composite
def held(draw: st.DrawFn) -> list[Extent]:
    """Extents in order and apart, as qemu-img tells them; neighbours may touch."""
    cuts = sorted(draw(st.lists(st.integers(0, DISK), max_size=80)))
    return [Extent(start, end - start) for start, end in zip(cuts[::2], cuts[1::2], strict=False) if end > start]


@given(held(), st.integers(1, DISK))
def test_parts_cover_what_is_held_and_leave_the_widest_gaps_out(extents: list[Extent], size: int) -> None:
    found = parts(extents, size)
    assert len(found) <= PARTS
    assert all(left.end + SMALL_GAP < right.start for left, right in zip(found, found[1:], strict=False))
    inside = [extent for extent in extents if extent.start < size]
    for extent in inside:
        assert any(part.start <= extent.start and min(extent.end, size) <= part.end for part in found)
    if inside:
        assert (found[0].start, found[-1].end) == (inside[0].start, min(inside[-1].end, size))
    gaps = [right.start - left.end for left, right in zip(inside, inside[1:], strict=False)]
    read_along = [gap for gap in gaps if gap > SMALL_GAP][PARTS - 1 :]
    assert bool(read_along) or len(found) == bool(inside) + sum(gap > SMALL_GAP for gap in gaps)


def planned(images: list[Path], top: str) -> plan.CommitPlan:
    chain = [Image(str(image), image.suffix[1:], SIZE, inode=(1, number)) for number, image in enumerate(images)]
    return plan.commit(Chain(tuple(chain)), top=top)


async def test_only_what_the_merged_images_hold_is_compared(tmp_path: Path) -> None:
    images = make_chain(tmp_path, ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2"))
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 8M", images[0])
    run("qemu-io", "-c", "write -P 2 1M 64k", images[1])
    run("qemu-io", "-c", "write -z 3M 64k", images[2])
    chain = planned(images, "[3]").chain.images[:3]
    found = await qemuimg.held(chain[1:])
    assert found == [Extent(MIB, 65536), Extent(3 * MIB, 65536, zero=True)]
    assert await qemuimg.same(chain, chain[:1], Extent(4 * MIB, MIB))
    assert not await qemuimg.same(chain, chain[:1], Extent(MIB, 512))
    assert await qemuimg.same(chain, chain[:1], Extent(MIB + 65536, MIB))


async def test_a_byte_that_differs_is_found_wherever_an_image_holds_it(tmp_path: Path) -> None:
    images = make_chain(tmp_path)
    content = Content()
    fill(images, content)
    whole = planned(images, "[4]")
    assert not await compare.same(whole)
    images[0].write_bytes(content.data)
    assert await compare.same(whole)
    for offset in (2 * MIB, 6 * MIB + 250 * 1024, 4 * MIB - 1):
        wrong = bytearray(content.data)
        wrong[offset] ^= 1
        images[0].write_bytes(wrong)
        assert not await compare.same(whole), offset
