"""Merges of one QEMU, in one process or in several, do not take each other's doings for the guest's or the user's."""

import asyncio
import sys
from pathlib import Path

import pytest
from rig.machines import Content, fill, machine, make_chain

import qmpmerge
from qmpmerge.qemu import mutex
from qmpmerge.qemu.monitor import Monitor

HOLDER = """
import asyncio, sys
import qmpmerge
from qmpmerge.qemu import mutex

async def main():
    async with qmpmerge.live(sys.argv[1]) as target, mutex.taken("work", target.monitor):
        print("taken", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_pivots_of_two_disks_pause_the_guest_one_after_the_other(tmp_path: Path) -> None:
    """Else the second would take the first one's pause for a guest at rest, and it would run again in its middle."""
    chains, contents, arguments = [], [Content(), Content()], []
    for name, content in zip(("one", "two"), contents, strict=True):
        (tmp_path / name).mkdir()
        images = make_chain(tmp_path / name)
        fill(images, content)
        chains.append(images)
        arguments += ["-drive", f"file={images[-1]},if=none,id={name}", "-device", f"virtio-blk-pci,drive={name}"]
    heard: list[str] = []
    with machine(tmp_path, *arguments) as vm:
        vm.session.execute("cont")
        async with qmpmerge.live(
            vm.target, trace=lambda direction, text: heard.append(f"{direction} {text}")
        ) as target:
            outcomes = await asyncio.gather(*(qmpmerge.commit(target, name) for name in ("one", "two")))
        assert vm.session.execute("query-status")["running"]
        vm.stop()
    said = [word for line in heard for word in ("stop", "cont") if line == f'-> {{"execute": "{word}"}}']
    assert said == ["stop", "cont"] * 2
    assert all(outcome.paused_ms is not None for outcome in outcomes)
    for images, content in zip(chains, contents, strict=True):
        content.check(images[0])


async def test_a_turn_is_waited_for_and_freed_with_its_holder(tmp_path: Path) -> None:
    (image,) = make_chain(tmp_path, ["base.raw"])
    other = f"{tmp_path}/other"
    monitor = ("-chardev", f"socket,id=m2,path={other},server=on,wait=off", "-mon", "m2,mode=control")
    with machine(tmp_path, "-drive", f"file={image},format=raw,if=none,id=vda", *monitor) as vm:
        arguments = (sys.executable, "-c", HOLDER, other)
        holder = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
        assert holder.stdout is not None and await holder.stdout.readline() == b"taken\n"
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(TimeoutError):
                await taken(target.monitor, 0.1)
            holder.kill()
            await taken(target.monitor, 30)
        await holder.wait()


async def taken(monitor: Monitor, seconds: float) -> None:
    async with mutex.taken("work", monitor, seconds):
        pass
