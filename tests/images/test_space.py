"""When images are looked into. What comes of it is tested on real merges, in test_check and faults/test_growing."""

from dataclasses import replace
from pathlib import Path

from rig.machines import SIZE, Content, fill, make_chain

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import Estimate
from qmpmerge.images import space


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
