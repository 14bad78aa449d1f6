"""A note tells of the file that was merged: what QEMU writes as it closes an image is no change, and all else is one."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from rig.disks import form, nodes
from rig.machines import MIB, SIZE, Machine, machine, run

import qmpmerge
from qmpmerge.engine import pivot
from qmpmerge.engine.run import Run
from qmpmerge.images import stashed

FEATURES = {
    "lazy": "lazy_refcounts=on",
    "old": "compat=0.10",
    "bitmap": "compat=1.1",
    "data": "lazy_refcounts=on,data_file={}.data",
}
"""Of the overlays of a disk that is called so; into the last one of `bitmap` QEMU stores one as it closes it."""

Disks = Mapping[str, list[Path]]


def made(folder: Path, name: str) -> list[Path]:
    base = "qcow2" if name == "bitmap" else "raw"
    images = [folder / f"{name}0.{base}", *(folder / f"{name}{number}.qcow2" for number in (1, 2))]
    run("qemu-img", "create", "-q", "-f", base, images[0], str(SIZE))
    for below, image in zip(images, images[1:], strict=False):
        options = ["-o", FEATURES[name].format(image.stem), "-b", below.name, "-F", form(below), image.name]
        run("qemu-img", "create", "-q", "-f", "qcow2", *options, cwd=folder)
    if name == "bitmap":
        run("qemu-img", "bitmap", "--add", images[2], "nightly")
    return images


def stashed_of(images: list[Path]) -> list[stashed.Note | str]:
    return [stashed.look(f"{image}{stashed.STASHED}") for image in images[1:]]


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return {name: made(tmp_path, name) for name in FEATURES}


@pytest.fixture(params=["drive", "blockdev"])
def vm(request: pytest.FixtureRequest, tmp_path: Path, disks: Disks) -> Iterator[Machine]:
    """It has all the disks, and its guest has written to each."""
    arguments: list[str] = []
    for name, images in disks.items():
        one = ["-drive", f"file={images[2]},format=qcow2,if=none,id={name}2"]
        arguments += one if request.param == "drive" else nodes(images)
        arguments += ["-device", f"virtio-blk-pci,drive={name}2,id={name}"]
    with machine(tmp_path, *arguments) as vm:
        for name in disks:
            vm.io(f"/machine/peripheral/{name}/virtio-backend", f"write -P 7 {MIB} 64k")
        yield vm


async def test_that_qemu_closes_an_image_is_no_change(vm: Machine, disks: Disks) -> None:
    """Neither where it is stashed nor where it is deleted."""
    async with qmpmerge.live(vm.target) as target:
        for name in disks:
            policy: qmpmerge.Policy = "delete" if name == "data" else "stash"
            outcome = await qmpmerge.commit(target, name, merged_files=policy, verify=True)
            assert outcome.verdict == "pivoted"
            assert [(one.action, one.obstacle) for one in outcome.merged if one.file.endswith("qcow2")] == [
                (policy, None)
            ] * 2
    vm.stop()
    for name, images in disks.items():
        assert name == "data" or all(isinstance(one, stashed.Note) for one in stashed_of(images)), stashed_of(images)
        assert qmpmerge.active(images[0]).file == str(images[0])


@pytest.mark.parametrize("vm", ["drive"], indirect=True)
async def test_a_write_of_somebody_else_is_one(vm: Machine, disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    """To an image that QEMU has closed without a word while that is, and to any other after."""
    real = pivot.see_closed

    def see_closed(run_: Run) -> None:
        """Somebody writes."""
        assert run_.record is not None
        place = run_.record.place(run_.record.top)
        assert place is not None
        if "lazy" in place:
            real(run_)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 2M 64k", place)
        if "old" in place:
            real(run_)

    monkeypatch.setattr(pivot, "see_closed", see_closed)
    async with qmpmerge.live(vm.target) as target:
        for name in ("lazy", "old"):
            outcome = await qmpmerge.commit(target, name)
            assert "changed since it was merged" in str(outcome.hints)
            assert stashed_of(disks[name])[1] == stashed.NO_NOTE
