"""The guard: a guest that was paused for a pivot runs again, whatever happens to the one that paused it."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.machines import Machine, machine

import qmpmerge
from qmpmerge.errors import PauseUnproven
from qmpmerge.guest import pause
from qmpmerge.guest.pause import paused, start_switch

PROGRAM = """
import asyncio, os, sys
import qmpmerge
from qmpmerge.guest import pause

async def main():
    async with qmpmerge.live(sys.argv[1]) as target:
        switch = pause.start_switch(target.monitor)
        async with pause.paused(target.monitor, switch, limit=float(sys.argv[3])):
            os.write(target.monitor.descriptor, sys.argv[2].encode())
            print("paused", flush=True)
            await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as vm:
        vm.session.execute("cont")
        yield vm


def status(vm: Machine) -> str:
    return str(vm.session.execute("query-status")["status"])


def becomes(vm: Machine, wanted: str) -> bool:
    deadline = time.monotonic() + 30
    while status(vm) != wanted:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def pausing_process(vm: Machine, half: str = "", limit: float = 30) -> Iterator["subprocess.Popen[str]"]:
    """A process that has paused the guest and does not go on; `half` is a command of which it had sent a part."""
    command = [sys.executable, "-c", PROGRAM, vm.target, half, str(limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "paused\n"
            assert status(vm) == "paused"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("half", ["", '{"execute": "query-st', '{"execute": "quit", "arguments": {"x": "'])
def test_the_guest_runs_again_when_we_are_killed(vm: Machine, half: str) -> None:
    with pausing_process(vm, half) as process:
        process.kill()
        assert becomes(vm, "running")


def test_the_guest_runs_again_when_we_hang(vm: Machine) -> None:
    with pausing_process(vm, limit=0.2) as process:
        process.send_signal(signal.SIGSTOP)
        assert becomes(vm, "running")
        vm.session.execute("stop")  # what the user does after that is not undone
        time.sleep(0.5)
        assert status(vm) == "paused"


def test_a_second_guest_is_none_of_ours(vm: Machine) -> None:
    """After the death of the one that hung the guard has its last word, and goes: no process of ours is left."""
    with pausing_process(vm) as process:
        guards = children(process.pid)
        assert len(guards) == 1
        process.kill()
        process.wait()
        assert becomes(vm, "running")
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{guards[0]}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{guards[0]}")


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


async def test_a_paused_guest_stays_paused(vm: Machine) -> None:
    vm.session.execute("stop")
    async with qmpmerge.live(vm.target) as target:
        switch = start_switch(target.monitor)
        assert switch is not None
        async with paused(target.monitor, switch) as pause:
            assert status(vm) == "paused"
        switch.close()
    assert (pause.seconds, status(vm)) == (None, "paused")


async def test_a_guest_that_the_user_stops_afterwards_stays_stopped(vm: Machine) -> None:
    async with qmpmerge.live(vm.target) as target:
        switch = start_switch(target.monitor)
        assert switch is not None
        async with paused(target.monitor, switch) as pause:
            assert status(vm) == "paused"
        assert status(vm) == "running"
        vm.session.execute("stop")
        switch.close()
    assert pause.seconds is not None and status(vm) == "paused"


async def test_without_a_guard_nobody_is_paused(vm: Machine) -> None:
    async with qmpmerge.live(vm.target) as target, paused(target.monitor, None) as pause:
        assert status(vm) == "running"
    assert pause.seconds is None


async def test_a_dead_guard_pauses_nobody(vm: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    async with qmpmerge.live(vm.target) as target:
        switch = start_switch(target.monitor)
        assert switch is not None
        async with paused(target.monitor, switch) as pause:
            assert status(vm) == "running"
        switch.close()
    assert (pause.seconds, pause.is_unguarded) == (None, True)


async def test_a_cancelled_pause_ends(vm: Machine) -> None:
    async with qmpmerge.live(vm.target) as target:
        switch, inside = pause.start_switch(target.monitor), asyncio.Event()
        assert switch is not None

        async def wait() -> None:
            async with pause.paused(target.monitor, switch):
                inside.set()
                await asyncio.sleep(60)

        task = asyncio.ensure_future(wait())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        switch.close()
    assert status(vm) == "running"


async def test_a_session_that_ends_in_the_pause_is_taken_over(vm: Machine) -> None:
    """The connection is the guard's too, so the guest runs again although our half of it is broken."""
    async with qmpmerge.live(vm.target) as target:
        switch = pause.start_switch(target.monitor)
        with contextlib.suppress(PauseUnproven):
            async with pause.paused(target.monitor, switch):
                await target.monitor._client.disconnect()
        assert switch is not None
        switch.close()
    assert becomes(vm, "running")


async def test_a_cancellation_that_comes_as_the_guest_is_let_run_again_is_taken_back(vm: Machine) -> None:
    """The block is over by then: what it did is proved before anybody leaves."""
    came_to_the_end = False

    async def work() -> None:
        nonlocal came_to_the_end
        async with qmpmerge.live(vm.target) as target:
            execute = target.monitor.execute

            async def interrupted(command: str, **arguments: object) -> object:
                if command == "cont":
                    task.cancel()
                return await execute(command, **arguments)  # type: ignore[arg-type]

            target.monitor.execute = interrupted  # type: ignore[method-assign]
            switch = pause.start_switch(target.monitor)
            async with pause.paused(target.monitor, switch):
                assert status(vm) == "paused"
            came_to_the_end = True
            assert switch is not None
            switch.close()

    task = asyncio.ensure_future(work())
    await task
    assert came_to_the_end
    assert status(vm) == "running"


@pytest.mark.parametrize("limit", [3.0])
async def test_a_stop_that_takes_longer_than_the_limit_is_waited_for(limit: float, vm: Machine) -> None:
    """As over storage that hangs: the switch hears that we live, and does not let the guest run again behind our back."""
    async with qmpmerge.live(vm.target) as target:
        execute = target.monitor.execute

        async def late(command: str, **arguments: object) -> object:
            if command == "stop":
                vm.process.send_signal(signal.SIGSTOP)
                asyncio.get_running_loop().call_later(2 * limit, vm.process.send_signal, signal.SIGCONT)
            return await execute(command, **arguments)  # type: ignore[arg-type]

        target.monitor.execute = late  # type: ignore[method-assign]
        switch = start_switch(target.monitor)
        async with paused(target.monitor, switch, limit=limit) as pause:
            assert status(vm) == "paused"
            assert not pause.has_lapsed
    assert pause.seconds is not None and pause.seconds > 2 * limit
    assert status(vm) == "running"
