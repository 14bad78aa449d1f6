"""The door to a running QEMU: which of its monitors, and what a disk may be called."""

import os
import socket
from pathlib import Path

import pytest
from rig.command import invoke
from rig.disks import blockdev, device, nodes
from rig.machines import Content, machine, run

import qmpmerge
from qmpmerge.errors import DiskNeeded


def monitors(folder: Path, *names: str, more: str = "") -> list[str]:
    arguments: list[str] = []
    for name in names:
        chardev = f"socket,id={name},path={folder}/{name},server=on,wait=off"
        arguments += ["-chardev", chardev, "-mon", f"chardev={name},mode=control{more}"]
    return arguments


def held(path: str) -> socket.socket:
    """A client that QEMU serves, and that stays."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    assert b"QMP" in client.recv(4096)
    return client


@pytest.mark.parametrize("by", ["name", "pid"])
def test_by_name_and_by_pid_the_monitor_that_nobody_holds_is_found(tmp_path: Path, images: list[Path], by: str) -> None:
    name = f"vm-{os.getpid()}-{tmp_path.name}"
    arguments = ["-name", name, *monitors(tmp_path, "one", "two"), *nodes(images), *device("c")]
    with machine(tmp_path, *arguments) as vm, held(f"{tmp_path}/one"):
        said = invoke("disks", name if by == "name" else f"pid:{vm.process.pid}", "--json")
        assert (said.code, len(said.document["disks"])) == (0, 1)
        with held(f"{tmp_path}/two"), held(vm.target):
            said = invoke("commit", name, "--dry-run", "--json", "--timeout", "2")
            assert (said.code, said.document["error"]["name"]) == (4, "monitor-silent")
            assert f"{tmp_path}/one" in said.document["error"]["message"]


async def test_a_monitor_that_writes_prettily_is_understood(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    arguments = [*monitors(tmp_path, "pretty", more=",pretty=on"), *nodes(images), *device("c")]
    with machine(tmp_path, *arguments) as vm:
        async with qmpmerge.live(f"{tmp_path}/pretty") as target:
            assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
            assert str((await qmpmerge.commit(target)).after) == "base.raw"
        vm.stop()
    content.check(images[0])


async def test_a_node_names_its_disk_after_a_snapshot_too(tmp_path: Path, images: list[Path], content: Content) -> None:
    with blockdev(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            await qmpmerge.snapshot(target, {"c": str(tmp_path / "d.qcow2")})
            assert (await target.disk("c")).name == "disk0"
            assert (await qmpmerge.commit(target, "c", top="[4]")).verdict == "merged"


def overlay(folder: Path, images: list[Path]) -> Path:
    run("qemu-img", "create", "-qf", "qcow2", "-b", images[2], "-F", "qcow2", folder / "x.qcow2")
    return folder / "x.qcow2"


async def test_a_node_that_is_in_two_chains_names_neither(tmp_path: Path, images: list[Path]) -> None:
    second = ["-blockdev", "qcow2,node-name=x,file=x-file,backing=b", "-device", "virtio-blk-pci,drive=x,id=disk1"]
    file = ["-blockdev", f"file,node-name=x-file,filename={overlay(tmp_path, images)}"]
    with machine(tmp_path, *nodes(images), *device("c"), *file, *second) as vm:
        async with qmpmerge.live(vm.target) as target:
            assert (await target.disk("c")).name == "disk0"
            with pytest.raises(DiskNeeded):
                await target.disk("b")
