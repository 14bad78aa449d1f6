"""
The dead man's switch: what it was armed for is undone whatever becomes of the tool, also by a QEMU that hangs meanwhile.

    QMPMERGE_ALL_KILLS=1 python -m pytest tests/guest/test_deadman.py

also lets QEMU hang for longer than anybody ever waited for it.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rig.machines import MIB, Machine, machine, make_chain

import qmpmerge
from qmpmerge.guest import deadman
from qmpmerge.guest.deadman_child import Duty, Undoing
from qmpmerge.qemu import mutex
from qmpmerge.qemu.monitor import Monitor

HANGS = [2.0, 75.0] if os.environ.get("QMPMERGE_ALL_KILLS") else [2.0]
"""How long QEMU hangs, in seconds; `AGAIN` is short beside them."""

AGAIN = 0.1

TOOL = f"""
import asyncio, os, signal, sys
import qmpmerge
from qmpmerge.guest import deadman, pause
from qmpmerge.guest.throttle import Throttle

deadman.AGAIN_SECONDS = {AGAIN}

async def main(target, what):
    async with qmpmerge.live(target) as target:
        if "pause" in what:
            async with pause.paused(target.monitor, pause.start_switch(target.monitor)):
                await wait()
        if "throttle" in what:
            throttle = Throttle(target.monitor, await target.disk())
            async with throttle.undone():
                await throttle.limit(1024 * 1024)
                if "both" in what:
                    async with deadman.armed(target.monitor.descriptor, deadman.qmp("cont")):
                        await target.monitor.execute("stop")
                        await wait()
                await wait()
        if "idle" in what:
            pause.start_switch(target.monitor)
            await wait()

async def wait():
    print("ready", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Machine]:
    """A guest that runs, with a third monitor at ``other``."""
    (image,) = make_chain(tmp_path, ["base.qcow2"])
    disk = ("-drive", f"file={image},if=none,id=vda", "-device", "virtio-blk-pci,drive=vda")
    other = ("-chardev", f"socket,id=m2,path={tmp_path}/other,server=on,wait=off", "-mon", "m2,mode=control")
    with machine(tmp_path, *disk, *other) as vm:
        vm.session.execute("cont")
        yield vm


def is_running(vm: Machine) -> bool:
    return bool(vm.session.execute("query-status")["running"])


def is_throttled(vm: Machine) -> bool:
    (entry,) = vm.session.execute("query-block")
    return bool(entry["inserted"]["bps_wr"])


def becomes_true(look: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def tool(vm: Machine, what: str) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """A process that has done `what` and does not go on, and its switches."""
    with subprocess.Popen([sys.executable, "-c", TOOL, vm.target, what], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process, psutil.Process(process.pid).children()
        finally:
            process.kill()


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()


@contextlib.contextmanager
def hanging(vm: Machine) -> Iterator[None]:
    """QEMU stands still during the block, as over storage that does not answer."""
    vm.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        vm.process.send_signal(signal.SIGCONT)


def all_end(switches: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(switches, 30)[1]


# --- QEMU hangs as we die -----------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", HANGS)
def test_a_guest_whose_qemu_hangs_runs_again_when_it_wakes(vm: Machine, seconds: float) -> None:
    with tool(vm, "pause") as (process, switches):
        assert not is_running(vm)
        with hanging(vm):
            end(process)
            time.sleep(seconds)
            assert all(switch.is_running() for switch in switches)
        assert becomes_true(lambda: is_running(vm))
        assert all_end(switches)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", HANGS)
def test_a_throttled_guest_whose_qemu_hangs_gets_its_limits_back(vm: Machine, seconds: float) -> None:
    with tool(vm, "throttle") as (process, switches):
        assert is_throttled(vm)
        with hanging(vm):
            end(process)
            time.sleep(seconds)
        assert becomes_true(lambda: not is_throttled(vm))
        assert all_end(switches)


def test_two_switches_on_one_monitor_both_come_to_their_end(vm: Machine) -> None:
    """They take each other's replies, and ask again."""
    with tool(vm, "throttle, both") as (process, switches):
        assert is_throttled(vm) and not is_running(vm)
        assert len(switches) == 2
        with hanging(vm):
            end(process)
        assert all_end(switches)
        assert is_running(vm) and not is_throttled(vm)


def test_a_qemu_that_dies_ends_the_duty(vm: Machine) -> None:
    with tool(vm, "pause") as (process, switches):
        with hanging(vm):
            end(process)
            vm.kill()
        assert all_end(switches)


# --- the turn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.3])
async def test_a_turn_is_free_only_when_the_guest_runs_again(vm: Machine, seconds: float) -> None:
    """Else another merge could take the guest that a dead one has paused for one at rest."""
    async with qmpmerge.live(f"{vm.folder}/other") as target:
        with tool(vm, "pause") as (process, switches):
            waiting = asyncio.ensure_future(take(target.monitor))
            with hanging(vm):
                end(process)
                assert not (await asyncio.wait({waiting}, timeout=seconds))[0]
            await waiting
            assert is_running(vm)
            assert all_end(switches)


async def take(monitor: Monitor) -> None:
    async with mutex.taken(mutex.PAUSE, monitor, 30):
        pass


# --- the tool goes, or hangs --------------------------------------------------------------------------------------


def test_a_switch_that_is_not_armed_goes_with_the_tool(vm: Machine) -> None:
    with tool(vm, "idle") as (process, switches):
        assert len(switches) == 1
        vm.session.execute("stop")
        end(process)
        assert all_end(switches)
        assert not is_running(vm)


ARMED = """
import asyncio, os, signal, sys
import qmpmerge
from qmpmerge.guest import deadman

async def main():
    async with qmpmerge.live(sys.argv[1]) as target:
        async with deadman.armed(target.monitor.descriptor, deadman.qmp("cont"), limit=1.0) as switch:
            await target.monitor.execute("stop")
            if sys.argv[2] == "9":
                os.write(target.monitor.descriptor, b'{"execute": "que')
            print("stopped", flush=True)
            if sys.argv[2] == "dismiss":
                return switch.dismiss()
            os.kill(os.getpid(), int(sys.argv[2]))

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["dismiss", str(int(signal.SIGKILL)), str(int(signal.SIGSTOP))])
def test_a_dead_mans_switch(end: str, vm: Machine) -> None:
    """It acts in the middle of a command of ours; where we only hang, at its limit."""
    with subprocess.Popen([sys.executable, "-c", ARMED, vm.target, end], stdout=subprocess.PIPE) as tool:
        assert tool.stdout is not None
        assert tool.stdout.readline() == b"stopped\n"
        if end == "dismiss":
            assert tool.wait(30) == 0
            assert not is_running(vm)
            return
        assert becomes_true(lambda: is_running(vm))
        tool.kill()


def test_what_was_undone_while_the_tool_hung_is_not_undone_again(vm: Machine) -> None:
    """The user may have stopped the guest since, and killed the tool that hung."""
    with subprocess.Popen([sys.executable, "-c", ARMED, vm.target, "19"], stdout=subprocess.PIPE) as tool:
        assert tool.stdout is not None and tool.stdout.readline() == b"stopped\n"
        switches = psutil.Process(tool.pid).children()
        assert becomes_true(lambda: is_running(vm))
        vm.session.execute("stop")
        tool.kill()
        assert all_end(switches)
        assert not is_running(vm)


async def test_it_tells_whether_it_has_acted(vm: Machine) -> None:
    async with qmpmerge.live(vm.target) as target:
        switch = deadman.Switch.start(target.monitor.descriptor, deadman.qmp("cont"))
        async with switch.patient():
            await asyncio.sleep(0)
        assert await switch.state() is Duty.IDLE
        await switch.go_on_duty(0.2)
        assert not switch.has_lapsed
        async with switch.patient():
            await asyncio.sleep(0.5)
            assert (await switch.state(), switch.has_lapsed) == (Duty.ARMED, False)
        await asyncio.sleep(0.5)
        assert (await switch.state(), switch.has_lapsed) == (Duty.ACTED, True)
        switch.arm(60)
        assert (await switch.state(), switch.has_lapsed) == (Duty.ACTED, True)
        assert await target.monitor.execute("query-name") == {}
        switch.dismiss()
        assert await switch.state() is Duty.GONE


async def test_what_we_cannot_undo_it_does_on_our_word(vm: Machine) -> None:
    """Also in the presence of our own session, which reads from the connection too and is lost over it."""
    async with qmpmerge.live(vm.target) as target:
        switch = deadman.Switch.start(target.monitor.descriptor, deadman.qmp("cont"))
        await switch.go_on_duty()
        await target.monitor.execute("stop")
        await target.monitor.close()
        assert await switch.act() is Undoing.DONE
        assert is_running(vm)


async def test_a_refusal_is_told(vm: Machine) -> None:
    async with qmpmerge.live(vm.target) as target:
        limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), MIB)
        undo = deadman.qmp("block_set_io_throttle", device="nobody", **limits)
        switch = deadman.Switch.start(target.monitor.descriptor, undo)
        await switch.go_on_duty()
        await target.monitor.close()
        assert await switch.act() is Undoing.REFUSED


async def test_a_connection_that_is_closed_has_no_switch(vm: Machine) -> None:
    async with qmpmerge.live(vm.target) as target:
        await target.monitor.close()
        with pytest.raises(OSError, match="closed"):
            deadman.Switch.start(target.monitor.descriptor, deadman.qmp("cont"))
