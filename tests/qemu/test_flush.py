"""Flushes whose error is seen, where a job has grown its base and no export is let in."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.disks import drive, nodes
from rig.machines import MIB, SIZE, Content, Machine, fill, machine, make_chain, run

import qmpmerge
from qmpmerge.errors import NotDurable
from qmpmerge.qemu import flush

OPTIONS = {"driver": "qcow2", "node-name": "base", "file": "base-debug"}


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """The base is half as large as what lies above it."""
    images = make_chain(tmp_path, ("base.qcow2", "a.qcow2", "b.qcow2"))
    for image in images[1:]:
        run("qemu-img", "resize", "-q", image, str(2 * SIZE))
    return images


@pytest.fixture
def pending(tmp_path: Path, images: list[Path], request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A storage daemon with a job that has grown its base, whose storage does `request.param`."""
    run("qemu-io", "-c", f"write -P 5 {SIZE} 1M", images[1])
    faulty = nodes(images)
    place = faulty.index("qcow2,node-name=base,file=base-file,read-only=on")
    faulty[place] = faulty[place].replace("file=base-file", "file=base-debug")
    faulty[place - 1 : place - 1] = ["-blockdev", f"blkdebug,node-name=base-debug,image=base-file{request.param}"]
    arguments = [part.replace("-blockdev", "--blockdev") for part in faulty]
    with machine(tmp_path, *arguments, program="qemu-storage-daemon") as daemon:
        commit = {"job_id": "job", "device": "b", "top_node": "a", "base_node": "base", "backing_file": "base.qcow2"}
        daemon.session.execute("block-commit", **commit, auto_finalize=False)
        while daemon.session.execute("query-jobs")[0]["status"] != "pending":
            pass
        yield daemon


async def flushed(daemon: Machine) -> bool:
    async with qmpmerge.live(daemon.target) as target:
        base = (await target.chain("b")).chain.base
        return await flush.flush(target.monitor, base, opened=OPTIONS)


@pytest.mark.parametrize("pending", [""], indirect=True)
async def test_a_node_of_our_own_is_reopened(pending: Machine) -> None:
    assert await flushed(pending)
    pending.session.execute("job-finalize", id="job")


@pytest.mark.parametrize(
    "pending", [",inject-error.0.event=flush_to_disk,inject-error.0.iotype=flush,inject-error.0.errno=5"], indirect=True
)
async def test_its_error_is_seen(pending: Machine) -> None:
    with pytest.raises(NotDurable, match="Input/output error"):
        await flushed(pending)


@pytest.mark.parametrize("top", ["[2]", "[3]"])
async def test_on_a_running_vm_base_and_top_are_compared(top: str, tmp_path: Path, images: list[Path]) -> None:
    content = Content(bytearray(2 * SIZE))
    fill(images, content)
    run("qemu-io", "-c", content.put(0x77, SIZE + MIB, MIB), images[-1])
    with drive(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.commit(target, top=top, verify=False)
        assert outcome.verified == (top == "[2]")
        assert outcome.after.base.virtual_size == 2 * SIZE
        setup.check()
        setup.off()
    content.check(outcome.after.active.file)


async def test_merges_of_one_qemu_take_turns_at_its_nbd_server(tmp_path: Path) -> None:
    """One that stopped the server of another would hang QEMU 7.2 with its guest."""
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    for folder in folders:
        folder.mkdir()
    chains = [make_chain(folder) for folder in folders]
    contents = [Content() for _ in chains]
    arguments: list[str] = []
    for images, content in zip(chains, contents, strict=True):
        fill(images, content)
        name = images[0].parent.name
        arguments += ["-drive", f"file={images[-1]},if=none,id={name}", "-device", f"virtio-blk-pci,drive={name}"]
    heard: list[str] = []
    with machine(tmp_path, *arguments) as vm:
        async with qmpmerge.live(
            vm.target, trace=lambda direction, text: heard.append(f"{direction} {text}")
        ) as target:
            merges = [qmpmerge.commit(target, images[0].parent.name, top="[3]") for images in chains]
            outcomes = await asyncio.gather(*merges)
        vm.stop()
    assert [outcome.verdict for outcome in outcomes] == ["merged"] * len(chains)
    assert len([line for line in heard if line.startswith('-> {"execute": "nbd-server-start"')]) >= 2 * len(chains)
    assert not [line for line in heard if "already running" in line]
    for images, content in zip(chains, contents, strict=True):
        content.check(images[-1])
