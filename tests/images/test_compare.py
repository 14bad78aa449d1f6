"""What is compared before the switch: all that was copied, and not the whole disk."""

from pathlib import Path

from rig.machines import MIB, SIZE, Content, fill, make_chain, run

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.images import compare, qemuimg
from qmpmerge.images.qemuimg import Extent


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
    whole = planned(images, "[3]")
    assert await compare.same(whole, [Extent(4 * MIB, MIB), Extent(MIB + 65536, MIB)])
    assert await compare.same(whole, [])
    for differs in (Extent(MIB, 512), Extent(MIB + 65024, 512), Extent(3 * MIB + 4096, 4096)):
        assert not await compare.same(whole, [Extent(0, 512), differs, Extent(5 * MIB, 512)])


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
