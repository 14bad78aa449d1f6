"""The agent's socket, as a QEMU tells it that was started in one way or another."""

import asyncio
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from rig.agents import FREEZE, THAW, serving
from rig.command import COMMAND
from rig.disks import drive, storage_daemon
from rig.machines import Content, Machine, machine, make_chain

import qmpmerge
from qmpmerge.errors import NoAgent
from qmpmerge.guest import agentsocket

NAME = "name=org.qemu.guest_agent.0"


def channel(path: Path | str, *, port: str = NAME, number: int = 0) -> list[str]:
    """An agent's channel as the manuals have it."""
    serial = ["-device", "virtio-serial-pci"] if number == 0 else []
    listening = f"socket,path={path},server=on,wait=off,id=qga{number}"
    return [*serial, "-chardev", listening, "-device", f"virtserialport,chardev=qga{number},{port}"]


async def found(vm: Machine) -> str:
    async with qmpmerge.live(vm.target) as target:
        return await agentsocket.find(target.monitor)


@pytest.mark.parametrize("name", ["agent", "a,b", "a ,server=on"])
async def test_a_socket_by_its_path(tmp_path: Path, name: str) -> None:
    with machine(tmp_path, *channel(str(tmp_path / name).replace(",", ",,"))) as vm:
        assert await found(vm) == str(tmp_path / name)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / name))
            assert await found(vm) == str(tmp_path / name), "with a client QEMU calls it something else"


async def test_a_relative_path_is_qemu_s(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with machine(tmp_path, *channel("agent"), cwd=tmp_path / "there") as vm:
        assert await found(vm) == f"{tmp_path}/there/agent"


async def test_among_other_ports(tmp_path: Path) -> None:
    others = [*channel(tmp_path / "other", port="name=com.example"), *channel(tmp_path / "agent", number=1)]
    with machine(tmp_path, *others, *channel(tmp_path / "third", port="name=x,id=third", number=2)) as vm:
        assert await found(vm) == str(tmp_path / "agent")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no virtserialport of the name org.qemu.guest_agent.0"),
        (channel("other", port="name=com.example"), "no virtserialport of the name org.qemu.guest_agent.0"),
        (
            ["-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=n,{NAME}", "-chardev", "null,id=n"],
            "null",
        ),
    ],
)
async def test_none(tmp_path: Path, arguments: Sequence[str], reason: str) -> None:
    with machine(tmp_path, *arguments) as vm, pytest.raises(NoAgent) as error:
        await found(vm)
    assert reason in error.value.reason
    assert "--agent SOCKET" in error.value.hint


async def test_a_storage_daemon_has_none(tmp_path: Path) -> None:
    images = make_chain(tmp_path, ("base.raw", "a.qcow2"))
    with storage_daemon(tmp_path, images, Content()) as setup, pytest.raises(NoAgent, match="it has no guest"):
        await found(setup.machine)


@pytest.mark.parametrize(
    "options", [["--quiesce"], ["--agent", "agent"], ["--quiesce", "--agent", "agent"]], ids=" ".join
)
async def test_the_snapshot_is_taken_of_a_frozen_guest(tmp_path: Path, options: list[str]) -> None:
    """Here an agent of ours has taken the name of QEMU's socket: no guest was booted."""
    images = make_chain(tmp_path, ("base.raw",))
    known = channel(tmp_path / "agent") if options == ["--quiesce"] else []
    disk = ["-drive", f"file={images[0]},format=raw,if=none,id=vda", "-device", "virtio-blk-pci,drive=vda"]
    with machine(tmp_path, *disk, *known) as vm:
        if known:
            os.unlink(tmp_path / "agent")
        async with serving(str(tmp_path / "agent")) as fake:
            code = await called("snapshot", vm.target, f"vda={tmp_path}/a.qcow2", *options, cwd=tmp_path)
            assert (code, fake.seen[FREEZE], fake.frozen) == (0, 1, 0)
            assert fake.seen[THAW] >= 1  # again where its answer is late
    assert (tmp_path / "a.qcow2").exists()


async def called(*arguments: str, cwd: Path) -> int:
    process = await asyncio.create_subprocess_exec(COMMAND, *arguments, cwd=cwd)
    return await process.wait()


async def test_without_an_agent_there_is_no_snapshot(tmp_path: Path) -> None:
    images = make_chain(tmp_path, ("base.raw",))
    with drive(tmp_path, images, Content()) as setup:
        async with setup.target() as target:
            with pytest.raises(NoAgent):
                await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/a.qcow2"}, quiesce=True)
    assert not (tmp_path / "a.qcow2").exists()
