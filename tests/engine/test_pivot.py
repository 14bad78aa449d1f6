"""The pause of a pivot: what is compared and written down holds only while nobody writes, and anybody may let the guest run."""

import asyncio
import functools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import faults
from rig.disks import BACKEND, device, nodes
from rig.machines import MIB, Content, Machine, machine

import qmpmerge
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.engine import pivot, rest
from qmpmerge.engine.run import Run
from qmpmerge.errors import NotAtRest
from qmpmerge.guest.pause import paused
from qmpmerge.images import compare
from qmpmerge.qemu import discovery
from qmpmerge.qemu.monitor import Monitor


@pytest.fixture
def vm(tmp_path: Path, images: list[Path], content: Content) -> Iterator[Machine]:
    """A guest that runs and does not write."""
    with machine(tmp_path, *nodes(images), *device("c")) as vm:
        vm.session.execute("cont")
        yield vm


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether what both files look like was written down, each time."""
    told: list[bool] = []
    real = pivot._write_down

    def write_down(run: Run, rests: bool) -> None:
        real(run, rests)
        assert run.record is not None and bool(run.record.seen) == rests
        told.append(rests)

    monkeypatch.setattr(pivot, "_write_down", write_down)
    return told


async def merge(vm: Machine, verify: bool | None) -> qmpmerge.Outcome:
    async with qmpmerge.live(vm.target) as target:
        return await qmpmerge.commit(target, verify=verify)


def resume(vm: Machine) -> None:
    """Somebody else lets the guest run."""
    vm.session.execute("cont")


def write(vm: Machine) -> None:
    """The same, and it writes, and stands still again."""
    vm.session.execute("cont")
    vm.io(BACKEND, f"write -P 0x77 {4 * MIB} 64k")
    vm.session.execute("stop")


@pytest.mark.parametrize("meanwhile", [resume, write])
async def test_a_guest_that_runs_during_the_comparison(
    meanwhile: Any,
    vm: Machine,
    evidence: list[bool],
    content: Content,
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was read says nothing, neither that all is well nor that the storage is bad."""
    real = compare.same

    async def same(plan: CommitPlan, before: compare.Shown | None) -> bool:
        result = await real(plan, before=before)
        meanwhile(vm)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(compare, "same", same)
        with pytest.raises(NotAtRest):
            await merge(vm, True)
    await faults.untouched(vm)
    assert not evidence
    if meanwhile is write:
        content.put(0x77, 4 * MIB, 64 * 1024)
    outcome = await merge(vm, None)  # the base is not suspected of anything, so nothing has to be compared
    assert (outcome.verdict, outcome.verified, evidence) == ("pivoted", False, [True])
    vm.stop()
    content.check(images[0])


@pytest.mark.parametrize(("meanwhile", "rests"), [(resume, False), (write, True)])
async def test_a_guest_that_runs_before_it_is_written_down_that_nobody_writes(
    meanwhile: Any,
    rests: bool,
    vm: Machine,
    evidence: list[bool],
    content: Content,
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last look comes after it; what was written before a guest stands still again the job has copied."""
    real = rest.begin

    async def begin(run: Run) -> int | None:
        meanwhile(vm)
        return await real(run)

    monkeypatch.setattr(rest, "begin", begin)
    assert (await merge(vm, None)).verdict == "pivoted"
    assert evidence == [rests]
    if meanwhile is write:
        content.put(0x77, 4 * MIB, 64 * 1024)
    vm.stop()
    content.check(images[0])


@pytest.mark.parametrize("is_late", [False, True])
async def test_what_is_asked_while_the_guest_stands_still(
    is_late: bool, vm: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    All that nothing depends on in one go; the end of the job is for the graph to show, and is waited for where that shows the
    device on top still.
    """
    asked: list[str] = []
    graphs = iter([{"c"}] if is_late else [])
    execute, in_use = Monitor.execute, discovery.in_use

    async def noted(monitor: Monitor, command: str, **arguments: Any) -> Any:
        asked.append(command)
        return await execute(monitor, command, **arguments)

    async def late(monitor: Monitor, device: str) -> set[str]:
        return next(graphs, None) or await in_use(monitor, device)

    monkeypatch.setattr(Monitor, "execute", noted)
    monkeypatch.setattr(discovery, "in_use", late)
    assert (await merge(vm, None)).verdict == "pivoted"
    paused = asked[asked.index("stop") : asked.index("cont")]
    rest_and_migration = ["query-status", "query-block-exports", "query-block-jobs", "query-migrate"]
    assert paused[:6] == ["stop", *rest_and_migration, "job-complete"]
    assert paused[6] == ("query-jobs" if is_late else "x-debug-query-block-graph")


async def test_a_stop_that_takes_longer_than_the_limit(
    vm: Machine, evidence: list[bool], content: Content, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest stands still all the same while it is moved, and runs afterwards."""
    limit = 3.0
    monkeypatch.setattr(pivot, "paused", functools.partial(paused, limit=limit))
    async with qmpmerge.live(vm.target) as target:
        execute = target.monitor.execute

        async def late(command: str, **arguments: object) -> object:
            if command == "stop":
                vm.process.send_signal(signal.SIGSTOP)
                asyncio.get_running_loop().call_later(2 * limit, vm.process.send_signal, signal.SIGCONT)
            return await execute(command, **arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(target.monitor, "execute", late)
        outcome = await qmpmerge.commit(target, verify=True)
    assert (outcome.verdict, outcome.verified, evidence) == ("pivoted", True, [True])
    assert outcome.paused_seconds is not None and outcome.paused_seconds > 2 * limit
    assert vm.session.execute("query-status")["running"]
    vm.stop()
    content.check(images[0])
