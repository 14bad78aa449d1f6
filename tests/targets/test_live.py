"""The door to a running QEMU: which of its monitors, and what a disk may be called."""

import os
import socket
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from rig.command import invoke
from rig.disks import Setup, blockdev, device, nodes
from rig.machines import Content, machine, run
from rig.wire import heard

import qmpmerge
from qmpmerge.errors import DiskNeeded, SessionLost, StillRunning, WentAway


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


@pytest.mark.parametrize("command", ["query-named-block-nodes", "blockdev-add", "block-commit"])
async def test_a_qemu_that_goes_away_while_we_only_look_is_unreachable(command: str, setup: Setup) -> None:
    """It is killed as it is asked for this: in a dry run for what leaves nothing behind, too."""

    def killing(direction: str, text: str) -> None:
        if direction == "->" and command in text:
            setup.machine.kill()

    begins = command == "block-commit"
    with pytest.raises(SessionLost if begins else WentAway) as lost:
        async with heard(killing), qmpmerge.live(setup.machine.target) as target:
            await qmpmerge.commit(target, top="[3]", dry_run=not begins)
    assert lost.value.exit_code == (6 if begins else 4) and "qmpmerge recover" in lost.value.hint


async def test_a_qemu_that_goes_away_while_tidy_looks_is_one_that_was_not_reached(setup: Setup) -> None:
    def killing(direction: str, text: str) -> None:
        if direction == "->" and '"query-block' in text and seen:
            setup.machine.kill()
        seen.append(text)

    seen: list[str] = []

    def door(name: str, *, write: bool, dry_run: bool) -> AbstractAsyncContextManager[qmpmerge.Target]:
        return qmpmerge.live(name)

    with heard(killing):
        told = await qmpmerge.tidy([setup.machine.target], keep=1, dry_run=True, door=door)
    assert [(one.verdict, one.error and one.error.exit_code) for one in told.tidied] == [("unreachable", 4)]


async def test_a_job_that_is_followed_is_unknown_where_its_qemu_goes_away(setup: Setup) -> None:
    """Nothing but questions was asked in this session; what was begun in another one counts."""
    asked: list[str] = []

    def killing(direction: str, text: str) -> None:
        asked.extend([text] if direction == "->" and "query-jobs" in text else [])
        if len(asked) > 5:
            setup.machine.kill()

    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(StillRunning):
            await qmpmerge.commit(target, top="[3]", speed=1, patience=qmpmerge.Patience(detach=True))
    with pytest.raises(SessionLost):
        async with heard(killing), qmpmerge.live(setup.machine.target) as target:
            await qmpmerge.follow(target, setup.disk)
