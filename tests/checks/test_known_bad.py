"""What QEMU does not survive: a pivot under the filter of a backup before 10.0, closing an image that is marked as dirty."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.command import invoke
from rig.disks import device, nodes
from rig.harms import harm
from rig.machines import Content, Machine, machine, run

import qmpmerge
from qmpmerge.errors import KnownBad

JOB = "stranger"


@pytest.fixture
def vm(tmp_path: Path, images: list[Path], content: Content) -> Iterator[Machine]:
    """The disk goes through a copy-before-write filter, as for a backup by hand."""
    target = tmp_path / "fleecing.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", target, "8M")
    backup = ["-blockdev", f"qcow2,node-name=fleecing,file.driver=file,file.filename={target}"]
    backup += ["-blockdev", "copy-before-write,node-name=cbw,file=c,target=fleecing"]
    with machine(tmp_path, *nodes(images), *backup, *device("cbw")) as vm:
        yield vm


def is_bad(vm: Machine) -> bool:
    return bool(vm.session.greeting["QMP"]["version"]["qemu"]["major"] < 10)


def begin(vm: Machine) -> None:
    vm.session.execute("block-commit", job_id=JOB, device="cbw", top_node="c", base_node="base", auto_dismiss=False)
    vm.wait_for_job("ready")


@pytest.mark.parametrize("end", ["blockdev-del", "quit"])
@harm("known-bad", "QEMU 7.2 aborts with its guest")
def test_plain_pivot_under_the_filter_of_a_backup(end: str, vm: Machine) -> None:
    """The merge itself works."""
    begin(vm)
    vm.session.execute("job-complete", id=JOB)
    vm.wait_for_job("concluded")
    vm.session.execute("job-dismiss", id=JOB)
    if not is_bad(vm):
        vm.session.execute("blockdev-del", node_name="c")
        return
    with pytest.raises((ValueError, ConnectionError)):
        vm.session.execute(end, **({"node_name": "c"} if end == "blockdev-del" else {}))
        vm.session.execute("query-status")
    assert vm.process.wait(20) == -6


async def test_the_guest_is_not_moved_there(vm: Machine, content: Content, images: list[Path]) -> None:
    async with qmpmerge.live(vm.target) as target:
        assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
        if is_bad(vm):
            with pytest.raises(KnownBad, match="copy-before-write"):
                await qmpmerge.commit(target)
            assert (await qmpmerge.commit(target, ending="keep")).verdict == "kept"
            last = images[3]
        else:
            assert (await qmpmerge.commit(target)).verdict == "pivoted"
            last = images[0]
    vm.session.execute("quit")
    assert vm.process.wait(20) == 0
    content.check(last)


@pytest.mark.parametrize("verb", ["pivot", "follow"])
def test_nor_by_the_job_of_somebody_else(verb: str, vm: Machine) -> None:
    begin(vm)
    done = invoke("job", vm.target, JOB, verb, "--json")
    if not is_bad(vm):
        assert done.document["verdict"] == "pivoted"
        return
    assert (done.code, done.document["error"]["name"]) == (3, "known-bad")
    vm.wait_for_job("ready")
    assert invoke("job", vm.target, JOB, "cancel").code == 0
    assert vm.process.poll() is None


# --- images that are marked as dirty ------------------------------------------------------------------------------------


def mark(image: Path) -> None:
    """As QEMU leaves one that has lazy reference counts when it dies."""
    with image.open("r+b") as file:
        file.seek(79)
        file.write(b"\x01")


@harm("known-bad", "QEMU 7.2 aborts with its guest")
def test_plain_merge_of_a_dirty_image_aborts_as_its_node_is_closed(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    mark(images[1])
    with machine(tmp_path, *nodes(images), *device("c")) as vm:
        vm.session.execute("block-commit", job_id=JOB, device="c", top_node="b", base_node="base", auto_dismiss=False)
        vm.wait_for_job("concluded")
        vm.session.execute("job-dismiss", id=JOB)
        vm.session.execute("blockdev-del", node_name="b")
        if vm.session.greeting["QMP"]["version"]["qemu"]["major"] >= 11:
            vm.session.execute("blockdev-del", node_name="a")
            return
        with pytest.raises((ValueError, ConnectionError)):
            vm.session.execute("blockdev-del", node_name="a")
        assert vm.process.wait(20) == -6


async def test_a_dirty_image_is_left_alone_until_it_is_repaired(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    mark(images[1])
    with machine(tmp_path, *nodes(images), *device("c")) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(KnownBad, match="marked as dirty") as refused:
                await qmpmerge.commit(target, base="[2]")  # which would be written as it is, by any QEMU
            if vm.session.greeting["QMP"]["version"]["qemu"]["major"] < 11:
                with pytest.raises(KnownBad, match="aborts as it closes"):
                    await qmpmerge.commit(target)
    assert invoke("commit", str(images[3]), "--base", "[2]").code == 3
    repair = refused.value.hint.split("`")[1]
    run("sh", "-c", repair)
    assert invoke("commit", str(images[3])).code == 0
    content.check(images[0])


async def test_the_active_image_may_be_dirty_since_qemu_repairs_it(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    mark(images[3])
    with machine(tmp_path, *nodes(images), *device("c")) as vm:
        async with qmpmerge.live(vm.target) as target:
            assert (await qmpmerge.commit(target)).verdict == "pivoted"
        vm.session.execute("quit")
        assert vm.process.wait(20) == 0
    content.check(images[0])
