"""Ranges of bytes: joined, widened and taken from one another. What they are of is tested on real images, in test_checks."""

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rig.machines import SIZE, Content, fill, make_chain

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import Estimate
from qmpmerge.images import space
from qmpmerge.images.qemuimg import Extent
from qmpmerge.images.space import Range

extents = st.lists(st.builds(Extent, st.integers(0, 60), st.integers(1, 20)), max_size=8)


def numbers(ranges: list[Range]) -> set[int]:
    return {number for start, end in ranges for number in range(start, end)}


def covered(given: list[Extent]) -> set[int]:
    return {number for extent in given for number in range(extent.start, extent.start + extent.length)}


@given(extents)
def test_a_union_is_in_order_and_apart(given: list[Extent]) -> None:
    joined = space._union(given)
    assert numbers(joined) == covered(given)
    assert space._length(joined) == len(covered(given))
    assert all(earlier[1] < later[0] for earlier, later in zip(joined, joined[1:], strict=False))


@given(extents, extents)
def test_what_is_left(given: list[Extent], taken: list[Extent]) -> None:
    left = space._without(space._union(given), space._union(taken))
    assert numbers(left) == covered(given) - covered(taken)
    assert space._length(left) == len(numbers(left))


@given(extents, st.integers(1, 16))
def test_widened_to_whole_blocks(given: list[Extent], step: int) -> None:
    wide = space._aligned(space._union(given), step)
    blocks = {number // step for number in covered(given)}
    assert numbers(wide) == {block * step + byte for block in blocks for byte in range(step)}


def test_what_cannot_be_told_is_no_reason_to_refuse() -> None:
    assert Estimate().is_enough and Estimate(growth=5).is_enough and Estimate(free=0).is_enough
    assert Estimate(growth=5, free=5).is_enough and not Estimate(growth=6, free=5).is_enough


async def test_images_are_looked_into_where_room_may_be_short_or_figures_are_asked_for(tmp_path: Path) -> None:
    """It takes some 10 ms an image; elsewhere it is enough to know that there is room for the whole disk."""
    fill(make_chain(tmp_path), Content())
    small = [
        Image(str(tmp_path / name), name.rpartition(".")[2], SIZE, inode=(1, number))
        for number, name in enumerate(("base.raw", "a.qcow2", "b.qcow2"))
    ]
    huge = [replace(image, virtual_size=2**60) for image in small]
    for images, closely, looked in ((small, False, False), (small, True, True), (huge, False, True)):
        told = await space.estimate(plan.commit(Chain(tuple(images))), closely=closely)
        assert (told.copy is not None, told.is_enough) == (looked, True)
