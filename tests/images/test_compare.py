"""What is compared before the switch: all that was copied, and not the whole disk."""

import json
from pathlib import Path

import pytest
from rig.disks import nbd_server
from rig.machines import MIB, SIZE, Content, fill, make_chain, run

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.errors import ImageUnreadable
from qmpmerge.images import compare, links, qemuimg
from qmpmerge.images.qemuimg import Extent
from qmpmerge.images.walk import DEEPEST


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


async def test_a_deep_chain_is_read_in_parts_to_its_very_bottom(tmp_path: Path) -> None:
    """With growing images, and data at all depths; in one piece each image more takes longer than all below it."""
    images = [Image(str(tmp_path / "0.raw"), "raw", MIB)]
    Path(images[0].file).write_bytes(bytes([9]) * MIB)
    for number in range(1, 60):
        size, below = MIB + number // 20 * MIB, images[-1]
        overlay = Image(str(tmp_path / f"{number}.qcow2"), "qcow2", size)
        run("qemu-img", "create", "-qu", "-f", "qcow2", "-b", below.file, "-F", below.format, overlay.file, str(size))
        images.append(overlay)
    written = {1: 0, 2: 1, 30: 2, 59: 3}
    for number, place in written.items():
        run("qemu-io", "-c", f"write -P {number} {place * 65536} 64k", _alone(images[number]))
    assert await qemuimg.shown(images[1:]) == (
        [Extent(3 * 65536, 65536)],
        [Extent(place * 65536, 65536) for place in range(3)],
    )
    for changed, differs in ((images[:1], 0), (images[:3], 2 * 65536), (images[:31], 3 * 65536), (images, None)):
        assert await qemuimg.differs_at(images, changed) == differs
    assert not links.budget(links.SHORT) and links.budget(links.MOST + 1) == 0


async def test_on_a_base_of_the_network_any_two_are_compared(tmp_path: Path) -> None:
    """By a single client, which may be all that the server takes besides QEMU."""
    base, *overlays = make_chain(tmp_path)
    with nbd_server(tmp_path, base, shared=1) as uri:
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", uri, "-F", "raw", overlays[0])
        run("qemu-io", "-c", f"write -P 1 {MIB} 64k", overlays[2])
        chain = [Image(uri, "raw", SIZE), *(Image(str(overlay), "qcow2", SIZE) for overlay in overlays)]
        assert await qemuimg.same(chain[:3], chain[:2])
        assert await qemuimg.differs_at(chain, chain[:1]) == MIB
        assert await qemuimg.differs_at(chain, chain[:3]) == MIB


def _alone(image: Image) -> str:
    return "json:" + json.dumps(
        {"driver": "qcow2", "file": {"driver": "file", "filename": image.file}, "backing": None}
    )


async def test_a_chain_too_long_for_an_argument_cannot_be_compared(tmp_path: Path) -> None:
    """Linux takes 128 KiB for one, which many images with data files of their own need more than."""
    first, data = tmp_path / "0.qcow2", tmp_path / "data.raw"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", first, "1M")
    images = [Image(str(tmp_path / f"{number}.qcow2"), "qcow2", MIB) for number in range(DEEPEST)]
    for image in images[1:]:
        Path(image.file).write_bytes(first.read_bytes())
    with pytest.raises(ImageUnreadable, match="too long"):
        await qemuimg.same(images, images[:1])
