"""
The classic story, start to end, on every kind of disk: list, snapshot, show, merge some layers, consolidate, list again.

The guest writes in every step, and after every step it reads back all that it ever wrote.
"""

from pathlib import Path

import pytest
from rig.disks import WAYS, drive, nbd_server, remove
from rig.machines import MIB, SIZE, Content, fill, make_chain, run

import qmpmerge

names = ["a.qcow2", "b.qcow2", "c.qcow2"]


@pytest.mark.parametrize("kind", WAYS)
async def test_the_classic_story(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    run("qemu-img", "create", "-q", "-f", "raw", base, str(SIZE))
    content = Content()
    with WAYS[kind](tmp_path, [base], content) as setup:
        setup.write(0x10, 0, 2 * MIB)
        async with setup.target() as target:
            disk = await target.disk()
            assert (disk.name, str(disk.chain)) == (setup.disk, "base.raw")

        for number, name in enumerate(names, 1):
            async with setup.target() as target:
                disk = await target.disk()
                (overlay,) = await qmpmerge.snapshot(target, {disk.name: str(tmp_path / name)})
            assert overlay.file == str(tmp_path / name)
            setup.moved(overlay.file)
            setup.write(0x10 + number, number * MIB, MIB + 64 * 1024)
            setup.check()

        async with setup.target() as target:
            view = await target.chain()
            assert str(view.chain) == "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2"
            assert [image.backing for image in view.chain] == [None, "base.raw", "a.qcow2", "b.qcow2"]
            assert not view.oddities
            outcome = await qmpmerge.commit(target, top="[3]", base="[1]")
        assert (outcome.verdict, str(outcome.after)) == ("merged", "base.raw <-- c.qcow2")
        assert outcome.after.active.backing == "base.raw"
        remove(outcome)
        setup.write(0x20, 5 * MIB, MIB)
        setup.check()

        async with setup.target() as target:
            outcome = await qmpmerge.commit(target)
        assert (outcome.verdict, str(outcome.after)) == ("pivoted", "base.raw")
        assert [merged.file for merged in outcome.merged] == [str(tmp_path / "c.qcow2")]
        setup.moved(outcome.after.active.file)
        setup.write(0x21, 6 * MIB, MIB)
        setup.check()

        async with setup.target() as target:
            (disk,) = await target.disks()
            assert (disk.job, str(disk.chain)) == (None, "base.raw")
            assert not await target.jobs()
            assert not [name for name in (await target.layout()).nodes if name.startswith("qmpmerge")]
        setup.off()
    content.check(base)


async def test_the_story_with_a_base_on_the_network(tmp_path: Path) -> None:
    base, first = tmp_path / "base.raw", tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "raw", base, str(SIZE))
    content = Content()
    run("qemu-io", "-f", "raw", "-c", content.put(0x10, 0, 2 * MIB), base)
    with nbd_server(tmp_path, base) as uri:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", first)
        with drive(tmp_path, [first], content) as setup:
            setup.write(0x11, MIB, MIB)
            async with qmpmerge.live(setup.machine.target) as target:
                for name in ("b.qcow2", "c.qcow2"):
                    await qmpmerge.snapshot(target, {"vda": str(tmp_path / name)})
                    setup.write(0x12, 3 * MIB, MIB)
                outcome = await qmpmerge.commit(target, "vda", top=str(tmp_path / "b.qcow2"), base=uri)
                assert outcome.verdict == "merged"
                assert outcome.after.active.backing == uri
                setup.write(0x13, 4 * MIB, MIB)
                setup.check()
                outcome = await qmpmerge.commit(target, "vda", base=uri)
                assert (outcome.verdict, len(outcome.after)) == ("pivoted", 1)
                assert outcome.after.base.file.startswith("nbd+unix:")
                setup.write(0x14, 5 * MIB, MIB)
                setup.check()
            setup.machine.stop()
    content.check(base)


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize(
    ("base", "top", "left"),
    [
        ("[1]", "[2]", "base.raw <-- b.qcow2 <-- c.qcow2"),
        ("[2]", "[3]", "base.raw <-- a.qcow2 <-- c.qcow2"),
        ("[2]", "[4]", "base.raw <-- a.qcow2"),
        ("[3]", "[4]", "base.raw <-- a.qcow2 <-- b.qcow2"),
    ],
)
async def test_any_range_of_a_chain_that_was_there_before(
    kind: str, base: str, top: str, left: str, tmp_path: Path
) -> None:
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    with WAYS[kind](tmp_path, images, content) as setup:
        setup.write(0x55, 7 * MIB, MIB)
        async with setup.target() as target:
            outcome = await qmpmerge.commit(target, setup.disk, base=base, top=top)
        assert str(outcome.after) == left
        setup.moved(outcome.after.active.file)
        setup.write(0x56, 5 * MIB, MIB)
        setup.check()
        async with setup.target() as target:
            assert not (await target.chain()).oddities
        setup.off()
    content.check(outcome.after.active.file)
