"""
Several pulls in one QEMU, and others who look at its disks meanwhile.

QEMU 7.2 and 10.0 crash when they are asked for their nodes while a stream job is concluded (`test_pull.py` shows it): one
that dismisses itself never is as anybody asks, however many end at the same time. Nobody has to wait for that.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from rig.command import COMMAND, invoke
from rig.machines import Content, Machine, fill, machine, make_chain

import qmpmerge
from qmpmerge.errors import StillRunning
from qmpmerge.qemu import mutex

PIPE = asyncio.subprocess.PIPE
DISKS = ("one", "two", "three")


@pytest.fixture
def contents() -> dict[str, Content]:
    return {name: Content() for name in DISKS}


@pytest.fixture
def vm(tmp_path: Path, contents: dict[str, Content]) -> Iterator[Machine]:
    """Three disks, and four more monitors, ``1`` to ``4``. At the end it must live, with nothing left, and all data there."""
    arguments = []
    for number in range(1, 5):
        arguments += ["-chardev", f"socket,id=x{number},path={tmp_path}/{number},server=on,wait=off"]
        arguments += ["-mon", f"x{number},mode=control"]
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        images = make_chain(tmp_path / name)
        fill(images, content)
        arguments += ["-drive", f"file={images[-1]},format=qcow2,if=none,id={name}"]
        arguments += ["-device", f"virtio-blk-pci,drive={name}"]
    with machine(tmp_path, *arguments) as vm:
        yield vm
        assert vm.process.poll() is None
        assert not vm.session.execute("query-jobs")
        nodes = vm.session.execute("query-named-block-nodes", flat=True)
        assert not [node for node in nodes if "qmpmerge" in node["node-name"]]
        vm.stop()
    for name, content in contents.items():
        content.check(tmp_path / name / "c.qcow2")


@contextlib.asynccontextmanager
async def asking(monitor: Path) -> AsyncIterator[None]:
    """Somebody who asks for all nodes, again and again."""
    asked = 0

    async def ask(target: qmpmerge.Target) -> None:
        nonlocal asked
        while True:
            await target.monitor.execute("query-named-block-nodes", flat=True)
            asked += 1

    async with qmpmerge.live(str(monitor)) as target:
        task = asyncio.ensure_future(ask(target))
        try:
            yield
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):  # and not because QEMU is gone
                await task
    assert asked


async def test_pulls_and_a_commit_of_the_library(vm: Machine, tmp_path: Path) -> None:
    """In one session: whole, into the middle, and a merge down."""
    async with qmpmerge.live(vm.target) as target, asking(tmp_path / "1"):
        outcomes = await asyncio.gather(
            qmpmerge.pull(target, "one"),
            qmpmerge.pull(target, "two", top="[3]", base="[1]"),
            qmpmerge.commit(target, "three", top="[3]"),
        )
    assert [outcome.verdict for outcome in outcomes] == ["pulled", "pulled", "merged"]


async def begun(*arguments: str) -> asyncio.subprocess.Process:
    """A command whose job is at work."""
    process = await asyncio.create_subprocess_exec(COMMAND, *arguments, "--json", stdout=PIPE, stderr=PIPE)
    assert process.stderr is not None
    while b'"progress"' not in (line := await process.stderr.readline()):
        assert line
    return process


async def test_pulls_that_end_together_while_others_look(vm: Machine, tmp_path: Path) -> None:
    """
    A command for each disk, one of which follows a pull that was left. All are held where they are about to switch, since
    somebody else has the turn to flush, and others look then. Let go, they switch one right after the other, while somebody
    asks for the nodes all the time.
    """
    one, two, three, other = (str(tmp_path / str(number)) for number in (1, 2, 3, 4))
    async with qmpmerge.live(vm.target) as target:
        with pytest.raises(StillRunning):
            await qmpmerge.pull(target, "three", speed=1, patience=qmpmerge.Patience(detach=True))
        pulls = [
            await begun("pull", one, "one", "--speed", "1"),
            await begun("pull", two, "two", "--speed", "1", "--base", "1"),
            await begun("job", three, "three", "follow"),
        ]
        async with mutex.taken(mutex.FLUSH, target.monitor):
            for name in DISKS:
                vm.session.execute("block-job-set-speed", device=f"qmpmerge-pull-{name}", speed=0)
            while [job["status"] for job in vm.session.execute("query-jobs")] != ["pending"] * 3:
                await asyncio.sleep(0.01)
            for look in (["disks", other], ["chain", other, "two"], ["doctor", other]):
                assert (await asyncio.to_thread(invoke, *look, "--json")).code == 0
        async with asking(tmp_path / "4"):
            ends = [await pull.communicate() for pull in pulls]
    assert [json.loads(out)["verdict"] for out, _ in ends] == ["pulled"] * 3, ends
