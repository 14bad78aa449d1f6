"""Images that are parts of a file: merged through the part, and the file with all that is not theirs left alone."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rig.disks import device, nodes
from rig.machines import MIB, SIZE, Content, Machine, fill, machine, make_chain, run

import qmpmerge
from qmpmerge.errors import AmbiguousLayer, DeviceTooSmall, DiskNeeded, NotVerified, QemuRefused
from qmpmerge.journal import store

BEGIN = 4 * MIB
OTHERS = b"\xee" * BEGIN
"""What stands before the image in the file, and behind it."""


@dataclass
class Box:
    """A file with an image in it, and data of others around that."""

    path: Path
    form: str
    size: int = SIZE

    @property
    def node(self) -> dict[str, Any]:
        """The image, as a header and a blockdev can describe it."""
        file = {"driver": "file", "filename": str(self.path)}
        part = {"driver": "raw", "offset": BEGIN, "size": self.size, "file": file}
        return part if self.form == "raw" else {"driver": self.form, "file": part}

    @property
    def name(self) -> str:
        return f"json:{json.dumps(self.node)}"

    @property
    def inside(self) -> bytes:
        return self.path.read_bytes()[BEGIN : BEGIN + self.size]

    def check(self) -> None:
        """Nobody has touched what is not the image's."""
        data = self.path.read_bytes()
        assert (data[:BEGIN], data[BEGIN + self.size :]) == (OTHERS, OTHERS)


def boxed(image: Path, size: int = SIZE) -> Box:
    """Move an image into a part of this size of another file."""
    box = Box(image.with_name("box"), image.suffix[1:], size)
    box.path.write_bytes(OTHERS + image.read_bytes().ljust(size, b"\0") + OTHERS)
    image.unlink()
    return box


def rebase(image: Path, backing: str, form: str) -> None:
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", backing, "-F", form, image)


@pytest.fixture
def base(images: list[Path], content: Content) -> Box:
    """The base is a part of a file, and the header of the first overlay says so."""
    box = boxed(images[0])
    rebase(images[1], box.name, "raw")
    return box


@pytest.fixture
def layer(images: list[Path], content: Content) -> Box:
    """The lowest overlay is a part of a file, with room to grow; the header above says so."""
    rebase(images[1], str(images[0]), "raw")
    box = boxed(images[1], 16 * MIB)
    rebase(images[2], box.name, "qcow2")
    return box


def by_header(images: list[Path], base: Box) -> list[str]:
    return ["-drive", f"file={images[-1]},format=qcow2,if=none,id=vda", *device("vda")]


def by_options(images: list[Path], base: Box) -> list[str]:
    """The header names the file, and the command line says which part."""
    rebase(images[1], str(base.path), "raw")
    lowest = "backing.backing.backing"
    part = f"{lowest}.driver=raw,{lowest}.offset={BEGIN // MIB}M,{lowest}.size={SIZE}"
    return ["-drive", f"file={images[-1]},format=qcow2,if=none,id=vda,{part}", *device("vda")]


def by_nodes(images: list[Path], base: Box) -> list[str]:
    """The same with explicit nodes."""
    rebase(images[1], str(base.path), "raw")
    file = {"driver": "file", "node-name": "base-file", "filename": str(base.path), "auto-read-only": True}
    lowest = {**base.node, "node-name": "base", "file": "base-file", "read-only": True}
    return ["-blockdev", json.dumps(file), "-blockdev", json.dumps(lowest), *nodes(images)[4:], *device("c")]


Start = Callable[[list[Path], Box], list[str]]
starts = pytest.mark.parametrize("start", [by_header, by_options, by_nodes])


async def merge(target: str | Path, **options: Any) -> qmpmerge.Outcome:
    async with qmpmerge.open(target) as opened:
        return await qmpmerge.commit(opened, **options)


async def chain(vm: Machine) -> qmpmerge.Chain:
    async with qmpmerge.open(vm.target) as target:
        return (await target.chain()).chain


# --- the base ---------------------------------------------------------------------------------------------------------


@starts
async def test_a_pivot_onto_a_part_of_a_file(
    start: Start, tmp_path: Path, images: list[Path], base: Box, content: Content
) -> None:
    with machine(tmp_path, *start(images, base)) as vm:
        outcome = await merge(vm.target, merged_files="delete", verify=True)
        labels = [image.label for image in await chain(vm)]
    assert (outcome.verdict, outcome.verified) == ("pivoted", True)
    assert labels == [f"{base.path} ({SIZE} bytes from {BEGIN} on)"]
    assert [merged.action for merged in outcome.merged] == ["delete"] * 3
    assert base.inside == content.data
    base.check()


@starts
async def test_the_overlay_that_stays_names_the_part(
    start: Start, tmp_path: Path, images: list[Path], base: Box, content: Content
) -> None:
    with machine(tmp_path, *start(images, base)) as vm:
        outcome = await merge(vm.target, top="[3]", verify=True)
    assert (outcome.verdict, outcome.verified) == ("merged", True)
    backing = outcome.after.active.backing
    assert backing is not None and json.loads(backing.removeprefix("json:")) == base.node
    content.check(images[3])
    base.check()


async def test_a_plain_merge_has_the_overlay_name_the_whole_file(
    tmp_path: Path, images: list[Path], base: Box, content: Content
) -> None:
    """What a chain means for the next start is in its headers; QEMU writes what it is told there."""
    with machine(tmp_path, *by_nodes(images, base)) as vm:
        given = {"top_node": "b", "base_node": "base", "backing_file": str(base.path)}
        vm.session.execute("block-commit", job_id="plain", device="c", **given)
        while vm.session.execute("query-jobs"):
            vm.session.event()
    with pytest.raises(AssertionError):
        content.check(images[3])


async def test_a_part_does_not_grow(tmp_path: Path, images: list[Path], base: Box, content: Content) -> None:
    """Of QEMU a job would fail that has begun."""
    run("qemu-img", "resize", "-q", images[3], "+4M")
    with machine(tmp_path, *by_header(images, base)) as vm:
        async with qmpmerge.open(vm.target) as target:
            with pytest.raises(DeviceTooSmall) as refused:
                await qmpmerge.commit(target)
        vm.session.execute("block-commit", job_id="plain", device="vda", auto_dismiss=False)
        vm.wait_for_job("concluded")
        (job,) = vm.session.execute("query-jobs")
    assert (refused.value.size, refused.value.needed) == (SIZE, SIZE + 4 * MIB)
    assert job["error"] == "Operation not supported"
    base.check()


async def test_what_follows_to_the_end_of_the_file(tmp_path: Path, images: list[Path], content: Content) -> None:
    """A part without a size, of which all that begins behind others' data is ours; as `-drive` takes it."""
    box = boxed(images[0])
    box.path.write_bytes(box.path.read_bytes()[: BEGIN + SIZE])
    more = f"backing.backing.backing.offset={BEGIN}"
    rebase(images[1], str(box.path), "raw")
    with machine(tmp_path, "-drive", f"file={images[3]},format=qcow2,if=none,id=vda,{more}", *device("vda")) as vm:
        labels = [image.label for image in await chain(vm)]
        outcome = await merge(vm.target, verify=True)
    assert (labels[0], outcome.verified) == (f"{box.path} (from byte {BEGIN} on)", True)
    assert (box.inside, box.path.read_bytes()[:BEGIN]) == (bytes(content.data), OTHERS)


async def test_two_images_of_a_chain_in_one_file(tmp_path: Path) -> None:
    """Two images of a chain in one file, as of an OVA: told apart, and the file is what neither of them is."""
    one, two = make_chain(tmp_path, ["one.qcow2", "two.qcow2"])
    content = Content()
    fill([one, two], content)
    half, box = 16 * MIB, tmp_path / "box"
    first = {"driver": "raw", "offset": 0, "size": half, "file": {"driver": "file", "filename": str(box)}}
    name = f"json:{json.dumps({'driver': 'qcow2', 'file': first})}"
    rebase(two, name, "qcow2")
    box.write_bytes(b"".join(image.read_bytes().ljust(half, b"\0") for image in (one, two)))
    one.unlink()
    two.unlink()
    options = []
    for node_name, offset, backing in (("one", 0, None), ("two", half, "one")):
        file = {"driver": "file", "filename": str(box), "locking": "off"}
        part = {"driver": "raw", "offset": offset, "size": half, "file": file}
        node = {
            "driver": "qcow2",
            "node-name": node_name,
            "file": part,
            "backing": backing,
            "read-only": node_name == "one",
        }
        options += ["-blockdev", json.dumps({**node, "auto-read-only": node_name == "one"})]
    with machine(tmp_path, *options, *device("two")) as vm:
        found = await chain(vm)
        assert [image.label for image in found] == [
            f"{box} ({half} bytes from 0 on)",
            f"{box} ({half} bytes from {half} on)",
        ]
        assert str(found) == " <-- ".join(image.label for image in found)
        with pytest.raises(AmbiguousLayer) as refused:
            found.find(str(box))
        assert [found.find(word) for word in refused.value.words] == list(found)
        outcome = await merge(vm.target, merged_files="delete")
        assert (outcome.verdict, [file.action for file in outcome.merged]) == ("pivoted", ["keep"])
        assert len(await chain(vm)) == 1
    run("qemu-img", "convert", "-O", "raw", name, tmp_path / "view")
    assert (tmp_path / "view").read_bytes() == content.data


# --- a merged image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["stash", "delete"])
@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_file_of_which_a_part_was_merged_stays(
    top: str, policy: str, tmp_path: Path, images: list[Path], layer: Box, content: Content
) -> None:
    with machine(tmp_path, *by_header(images, layer)) as vm:
        before = [image.label for image in await chain(vm)]
        outcome = await merge(vm.target, top=top, merged_files=policy, verify=True)
    assert before[1] == f"{layer.path} ({16 * MIB} bytes from {BEGIN} on)"
    done = [(Path(merged.file).name, merged.action) for merged in outcome.merged]
    assert done == [("box", "keep"), ("b.qcow2", policy), ("c.qcow2", policy)][: 2 if top == "[3]" else 3]
    assert (outcome.verified, any("only a part of it" in hint for hint in outcome.hints)) == (True, True)
    content.check(images[3] if top == "[3]" else images[0])
    layer.check()


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_part_that_no_header_tells(
    top: str, tmp_path: Path, images: list[Path], layer: Box, content: Content
) -> None:
    """
    The header names the file as if it were the image. qemu-img would join that with what it is told: no comparison, so
    nothing is deleted; and base is not suspect for it.
    """
    rebase(images[2], str(layer.path), "qcow2")
    file = {"driver": "file", "node-name": "a-file", "filename": str(layer.path), "auto-read-only": True}
    part = {"driver": "raw", "offset": BEGIN, "size": layer.size, "file": "a-file"}
    node = {"driver": "qcow2", "node-name": "a", "file": part, "backing": "base", "read-only": True}
    explicit = ["-blockdev", json.dumps(file), "-blockdev", json.dumps(node)]
    with machine(tmp_path, *nodes(images)[:4], *explicit, *nodes(images)[8:], *device("c")) as vm:
        with pytest.raises(NotVerified, match="Could not open backing file"):
            await merge(vm.target, top=top, merged_files="delete")
        outcome = await merge(vm.target, top=top)
    assert (outcome.verified, [merged.action for merged in outcome.merged][:2]) == (False, ["keep", "stash"])
    content.check(images[3] if top == "[3]" else images[0])
    layer.check()


async def test_an_active_image_in_a_part_is_resumed(tmp_path: Path, images: list[Path], content: Content) -> None:
    """The record knows the part: what another process goes on with is the same merge."""
    rebase(images[3], str(images[2]), "qcow2")
    box = boxed(images[3], 16 * MIB)
    drive = f"file.driver=raw,file.offset={BEGIN},file.size={box.size},file.file.filename={box.path}"
    with machine(tmp_path, "-drive", f"driver=qcow2,{drive},if=none,id=vda", *device("vda")) as vm:
        ready = await merge(vm.target, ending="hold")
        assert ready.verdict == "ready"
        outcome = await merge(vm.target, merged_files="delete")
        assert [image.label for image in await chain(vm)] == [str(images[0])]
    assert (outcome.verdict, outcome.merged[-1].action) == ("pivoted", "keep")
    content.check(images[0])
    box.check()


# --- pulled -------------------------------------------------------------------------------------------------------------


async def test_a_pull_that_stops_above_a_part(tmp_path: Path, images: list[Path], base: Box, content: Content) -> None:
    with machine(tmp_path, *by_nodes(images, base)) as vm:
        async with qmpmerge.open(vm.target) as target:
            outcome = await qmpmerge.pull(target, base="[1]", verify=True)
    backing = outcome.after.active.backing
    assert (outcome.verified, backing and json.loads(backing.removeprefix("json:"))) == (True, base.node)
    content.check(images[3])
    base.check()


async def test_a_pull_into_a_part(tmp_path: Path, images: list[Path], layer: Box, content: Content) -> None:
    with machine(tmp_path, *by_header(images, layer)) as vm:
        async with qmpmerge.open(vm.target) as target:
            outcome = await qmpmerge.pull(target, top="[2]", verify=True)
    assert (outcome.verified, len(outcome.after)) == (True, 3)
    content.check(images[3])
    layer.check()


# --- offline --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_base_that_a_header_names_as_a_part(top: str, images: list[Path], base: Box, content: Content) -> None:
    async with qmpmerge.open(images[3]) as target:
        found = (await target.chain()).chain
        outcome = await qmpmerge.commit(target, top=top, merged_files="delete")
    assert found.base.label == f"{base.path} ({SIZE} bytes from {BEGIN} on)"
    assert (outcome.verified, [merged.action for merged in outcome.merged][:2]) == (True, ["delete"] * 2)
    if top == "[4]":
        assert base.inside == content.data
    else:
        content.check(images[3])
    base.check()


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_layer_that_a_header_names_as_a_part(
    top: str, images: list[Path], layer: Box, content: Content
) -> None:
    assert not {one.name for one in await qmpmerge.examine(images[3])} - {"other-overlay"}
    outcome = await merge(images[3], top=top, merged_files="delete")
    assert (outcome.verified, [merged.action for merged in outcome.merged][:2]) == (True, ["keep", "delete"])
    content.check(images[3] if top == "[3]" else images[0])
    layer.check()


async def test_two_parts_of_one_file_offline(tmp_path: Path, images: list[Path], base: Box, content: Content) -> None:
    """QEMU locks them against each other: nothing is begun."""
    inner = layer_behind(base, images[1])
    rebase(images[2], inner, "qcow2")
    images[1].unlink()
    before = base.path.read_bytes()
    with pytest.raises(QemuRefused, match="lock"):
        await merge(images[3])
    assert (base.path.read_bytes(), store.in_folder(str(tmp_path))) == (before, [])
    content.check(images[3])


def layer_behind(box: Box, image: Path) -> str:
    """Put an image into the same file, behind all that is there; returns its name."""
    begin, size = box.path.stat().st_size, 16 * MIB
    with box.path.open("ab") as file:
        file.write(image.read_bytes().ljust(size, b"\0"))
    part = {**box.node, "offset": begin, "size": size}
    return f"json:{json.dumps({'driver': 'qcow2', 'file': part})}"


# --- names ---------------------------------------------------------------------------------------------------------------


async def test_two_disks_in_one_file(tmp_path: Path, images: list[Path], base: Box, content: Content) -> None:
    base.path.write_bytes(base.path.read_bytes() * 2)
    drives = [
        f"file={base.path},format=raw,offset={offset},size={SIZE},if=none,id={name},file.locking=off"
        for name, offset in (("vda", BEGIN), ("vdb", SIZE + 3 * BEGIN))
    ]
    with machine(tmp_path, "-drive", drives[0], "-drive", drives[1]) as vm:
        async with qmpmerge.open(vm.target) as target:
            layout = await target.layout()
            with pytest.raises(DiskNeeded):
                layout.find(str(base.path), "")
            assert layout.find("vdb", "").name == "vdb"


async def test_an_overlay_on_a_part_names_the_part(tmp_path: Path, images: list[Path], content: Content) -> None:
    box = boxed(images[0])
    drive = f"file={box.path},format=raw,offset={BEGIN},size={SIZE},if=none,id=vda"
    with machine(tmp_path, "-drive", drive, *device("vda")) as vm:
        async with qmpmerge.open(vm.target) as target:
            await qmpmerge.snapshot(target, {"vda": tmp_path / "top.qcow2"})
            assert not (await target.chain()).oddities
    view = tmp_path / "view"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", tmp_path / "top.qcow2", view)
    assert view.read_bytes() == box.inside


async def test_the_doctor_mends_a_header_that_names_the_whole_file(
    tmp_path: Path, images: list[Path], base: Box, content: Content
) -> None:
    with machine(tmp_path, *by_nodes(images, base)) as vm:
        async with qmpmerge.open(vm.target) as target:
            found = [one for one in await qmpmerge.examine(target) if one.name == "part-of-file"]
    assert [one.where for one in found] == [str(images[1])]
    subprocess.run(found[0].fix or "", shell=True, check=True)
    content.check(images[3])
    with machine(tmp_path, *by_header(images, base)) as vm:
        async with qmpmerge.open(vm.target) as target:
            assert "part-of-file" not in {one.name for one in await qmpmerge.examine(target)}
