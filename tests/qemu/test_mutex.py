"""Merges of one QEMU, in one process or in several, do not take each other's doings for the guest's or the user's."""

import asyncio
import contextlib
import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from rig import command, faults
from rig.machines import Content, Machine, fill, machine, make_chain
from rig.wire import heard

import qmpmerge
from qmpmerge.errors import NotPaused
from qmpmerge.qemu import mutex
from qmpmerge.qemu.monitor import Monitor

SOON = 2.0
"""A time that has to pass in full."""

HOLDER = """
import asyncio, sys
import qmpmerge
from qmpmerge.qemu import mutex

async def main():
    async with qmpmerge.live(sys.argv[1]) as target, mutex.taken(sys.argv[2], target.monitor):
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
    said: list[str] = []
    with machine(tmp_path, *arguments) as vm:
        vm.session.execute("cont")
        async with (
            heard(lambda direction, text: said.append(f"{direction} {text}")),
            qmpmerge.live(vm.target) as target,
        ):
            outcomes = await asyncio.gather(*(qmpmerge.commit(target, name) for name in ("one", "two")))
        assert vm.session.execute("query-status")["running"]
        vm.stop()
    said = [word for line in said for word in ("stop", "cont") if line == f'-> {{"execute": "{word}"}}']
    assert said == ["stop", "cont"] * 2
    assert all(outcome.paused_seconds is not None for outcome in outcomes)
    for images, content in zip(chains, contents, strict=True):
        content.check(images[0])


@contextlib.contextmanager
def two_monitors(folder: Path) -> Iterator[tuple[Machine, str]]:
    """A guest on three images, and the path of another monitor of its QEMU."""
    images = make_chain(folder, ["base.raw", "a.qcow2", "b.qcow2"])
    fill(images, Content())
    other = f"{folder}/other"
    monitor = ("-chardev", f"socket,id=m2,path={other},server=on,wait=off", "-mon", "m2,mode=control")
    disk = ("-drive", f"file={images[-1]},if=none,id=vda", "-device", "virtio-blk-pci,drive=vda")
    with machine(folder, *disk, *monitor) as vm:
        vm.session.execute("cont")
        yield vm, other


@contextlib.asynccontextmanager
async def holder(monitor: str, what: str = "work") -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that has a turn; killed at the end of the block."""
    arguments = (sys.executable, "-c", HOLDER, monitor, what)
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None and await process.stdout.readline() == b"taken\n"
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


OTHERS = f"qmpmerge-turn-work-1-{0:032x}"


def tickets(vm: Machine) -> list[str]:
    objects = vm.session.execute("qom-list", path="/objects")
    return [entry["name"] for entry in objects if entry["name"].startswith("qmpmerge-")]


def ticket(vm: Machine, id: str, **said: object) -> None:
    """One that somebody with a monitor has made."""
    vm.session.execute("object-add", qom_type="secret", id=id, data=json.dumps(said))


async def taken(monitor: Monitor, seconds: float | None, what: str = "work") -> None:
    async with mutex.taken(what, monitor, seconds):
        pass


# --- waiting ----------------------------------------------------------------------------------------------------------


async def test_a_turn_is_waited_for_and_freed_with_its_holder(tmp_path: Path) -> None:
    with two_monitors(tmp_path) as (vm, other):
        async with holder(other) as process, qmpmerge.live(vm.target) as target:
            with pytest.raises(mutex.NoTurn) as error:
                await taken(target.monitor, SOON)
            assert error.value.holder.startswith(f"pid {process.pid} of user ")
            await taken(target.monitor, 30, "other-work")
            process.kill()
            await taken(target.monitor, 30)
        assert tickets(vm) == []


async def test_all_have_their_turn_one_after_the_other(tmp_path: Path) -> None:
    """Whichever monitor of the QEMU they use; none is left out, and nothing is left in QEMU."""
    at_work = []

    async def work(monitor: Monitor) -> None:
        for _ in range(5):
            async with mutex.taken("work", monitor, 60):
                at_work.append(monitor)
                await asyncio.sleep(0)
                assert at_work == [monitor]
                at_work.pop()

    with two_monitors(tmp_path) as (vm, other):
        async with qmpmerge.live(vm.target) as one, qmpmerge.live(other) as two:
            await asyncio.gather(*(work(target.monitor) for target in (one, two) for _ in range(5)))
        assert tickets(vm) == []


async def test_who_stops_to_wait_is_not_waited_for(tmp_path: Path) -> None:
    with two_monitors(tmp_path) as (vm, other):
        async with qmpmerge.live(vm.target) as one, qmpmerge.live(other) as two:
            async with mutex.taken("work", one.monitor):
                waiting = asyncio.ensure_future(taken(two.monitor, None))
                while len(tickets(vm)) < 2:
                    await asyncio.sleep(0.01)
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting
                assert len(tickets(vm)) == 1
            await taken(two.monitor, 30)
        assert tickets(vm) == []


# --- those who must not have one --------------------------------------------------------------------------------------


async def test_nobody_has_a_turn_who_has_no_monitor(tmp_path: Path) -> None:
    """Each name in the kernel's namespace that says what is done to this QEMU is taken, and kept."""
    with two_monitors(tmp_path) as (vm, _), contextlib.ExitStack() as squatted:
        for what in (mutex.PAUSE, mutex.FLUSH):
            squatter = squatted.enter_context(socket.socket(socket.AF_UNIX))
            squatter.bind(f"\0qmpmerge-{what}-{vm.process.pid}")
        async with qmpmerge.live(vm.target) as target:
            assert (await qmpmerge.commit(target, top="[2]")).verdict == "merged"
            assert (await qmpmerge.commit(target)).verdict == "pivoted"


async def test_who_takes_the_socket_of_a_dead_holder_does_not_have_its_turn(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    with two_monitors(tmp_path) as (vm, other):
        async with holder(other) as process:
            (name,) = tickets(vm)
            process.kill()
            await process.wait()
        with socket.socket(socket.AF_UNIX) as squatter:
            os.seteuid(65534)
            try:
                squatter.bind(f"\0qmpmerge-{name.rpartition('-')[2]}")
                squatter.listen()
            finally:
                os.seteuid(0)
            async with qmpmerge.live(vm.target) as target:
                await taken(target.monitor, 30)
        assert tickets(vm) == []


@pytest.mark.parametrize("said", [{}, {"pid": 1}, {"pid": 1, "user": 0, "place": "another host"}])
async def test_a_ticket_that_does_not_tell_is_never_skipped(tmp_path: Path, said: dict[str, object]) -> None:
    with two_monitors(tmp_path) as (vm, _):
        ticket(vm, OTHERS, **said)
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(mutex.NoTurn) as error:
                await taken(target.monitor, SOON)
        assert tickets(vm) == [OTHERS]
        assert "object-del" in str(error.value) and OTHERS in str(error.value)
        vm.session.execute("object-del", id=OTHERS)
        async with qmpmerge.live(vm.target) as target:
            await taken(target.monitor, 30)


# --- the merge ----------------------------------------------------------------------------------------------------------


async def test_a_pause_of_somebody_else_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said for whom we wait; then the job is cancelled, and the next merge is free to try."""
    monkeypatch.setattr(mutex, "TELL_SECONDS", 0.0)
    monkeypatch.setattr(mutex, "LIMIT_SECONDS", 0.5)
    told: list[str] = []
    with two_monitors(tmp_path) as (vm, other):
        async with holder(other, mutex.PAUSE) as process, qmpmerge.live(vm.target) as target:
            who = f"pid {process.pid} of user {pwd.getpwuid(os.geteuid()).pw_name}"
            target.monitor.tell = told.append
            with pytest.raises(NotPaused) as error:
                await qmpmerge.commit(target)
            assert error.value.exit_code == 5 and who in str(error.value)
            assert told == [f"waiting for {who}, who is at work on {vm.target} too"]
            process.kill()
        await faults.untouched(vm, "base.raw <-- a.qcow2 <-- b.qcow2")
        async with qmpmerge.live(vm.target) as target:
            assert (await qmpmerge.commit(target)).verdict == "pivoted"


async def test_our_own_pauses_queue_for_as_long_as_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is told that somebody is waited for."""
    monkeypatch.setattr(mutex, "LIMIT_SECONDS", 0.0)
    monkeypatch.setattr(mutex, "TELL_SECONDS", 0.0)
    with two_monitors(tmp_path) as (vm, other):
        async with qmpmerge.live(vm.target) as one, qmpmerge.live(other) as two:
            told: list[str] = []
            two.monitor.tell = told.append
            async with mutex.taken("work", one.monitor):
                waiting = asyncio.ensure_future(taken(two.monitor, None))
                assert not (await asyncio.wait({waiting}, timeout=0.3))[0]
            await waiting
            assert told == []


def test_the_command_says_for_whom_it_waits(tmp_path: Path) -> None:
    with two_monitors(tmp_path) as (vm, other):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, other, mutex.PAUSE], stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None and process.stdout.readline() == b"taken\n"
            with subprocess.Popen([command.COMMAND, "commit", vm.target], stderr=subprocess.PIPE, text=True) as tool:
                assert tool.stderr is not None
                assert f"waiting for pid {process.pid} of user" in tool.stderr.readline()
                process.kill()
                assert tool.wait(60) == 0
