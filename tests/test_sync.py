"""The library without asyncio: the same functions, which block, on a real QEMU."""

import asyncio
import concurrent.futures
import inspect
import signal
import sys
import threading
from pathlib import Path

import pytest
from rig.command import JOB
from rig.disks import Setup
from rig.machines import Content, fill, make_chain
from rig.wire import heard

import qmpmerge
from qmpmerge import sync
from qmpmerge.errors import NoSuchDisk


@pytest.mark.parametrize("name", [name for name in sync.__all__ if name != "Target"])
def test_a_function_is_that_of_the_library(name: str) -> None:
    ours, theirs = getattr(sync, name), getattr(qmpmerge, name)
    assert not inspect.iscoroutinefunction(ours)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__doc__ == theirs.__doc__


def test_all_that_waits_is_here_too() -> None:
    waiting = [name for name in qmpmerge.__all__ if inspect.isroutine(getattr(qmpmerge, name))]
    assert set(waiting) == set(sync.__all__) - {"Target"}


def depth(target: sync.Target) -> int:
    return len(target.chain().chain)


def test_a_vm_is_looked_at_and_merged(setup: Setup, images: list[Path]) -> None:
    told: list[threading.Thread] = []

    def report(progress: qmpmerge.Progress) -> None:
        told.append(threading.current_thread())

    with sync.live(setup.machine.target) as target:
        assert (target.name, target.pid, target.is_live) == (setup.machine.target, setup.machine.process.pid, True)
        assert [disk.name for disk in target.disks()] == ["vda"] and depth(target) == 4
        (made,) = sync.snapshot(target, {"vda": images[3].with_name("d.qcow2")})
        assert target.chain("vda").chain.active.file == made.file
        assert sync.commit(target, "vda", top="[4]", report=report).verdict == "merged"
        assert target.jobs() == []
        assert "launch-path" in {finding.name for finding in sync.examine(target)}
        assert target.run(lambda session: session.monitor.execute("query-status"))["status"] == "prelaunch"
    assert "launch-path" in {finding.name for finding in sync.examine(setup.machine.target)}
    assert set(told) == {threading.current_thread()}
    setup.check()


def test_images_are_merged_cleaned_and_asked_about(images: list[Path], content: Content) -> None:
    with sync.open(images[3]) as target:
        assert not target.is_live
        assert sync.commit(target, merged_files="stash").verdict == "pivoted"
    assert sync.active(images[0]).file == str(images[0])
    assert [found.verdict for found in sync.recover(images[0])] == ["unchanged"]
    assert {found.obstacle for found in sync.clean([images[0].parent])} == {None}
    assert sync.examine(images[0]) == ()
    content.check(images[0])


def test_ctrl_c_cancels_a_merge_and_waits_until_the_old_chain_is_back(setup: Setup, images: list[Path]) -> None:
    def interrupt(progress: qmpmerge.Progress) -> None:
        signal.raise_signal(signal.SIGINT)

    with sync.live(setup.machine.target) as target:
        with pytest.raises(KeyboardInterrupt):
            sync.commit(target, top="[3]", speed=1, report=interrupt)
        assert target.jobs() == []
        assert target.chain().chain.files == [str(image) for image in images]
        assert sync.commit(target, top="[3]").verdict == "merged"
    setup.check()


def test_so_does_a_signal_handler_that_raises(setup: Setup) -> None:
    def leave(progress: qmpmerge.Progress) -> None:
        asyncio.get_running_loop().call_soon(sys.exit)

    with sync.live(setup.machine.target) as target:
        with pytest.raises(SystemExit):
            sync.commit(target, top="[3]", speed=1, report=leave)
        assert target.jobs() == [] and depth(target) == 4
    setup.check()


def test_ctrl_c_during_the_switch_waits_for_the_outcome(setup: Setup) -> None:
    def interrupt(direction: str, text: str) -> None:
        if direction == "->" and "job-finalize" in text:
            signal.raise_signal(signal.SIGINT)

    with heard(interrupt), sync.live(setup.machine.target) as target:
        assert sync.commit(target, top="[3]").verdict == "merged"
        assert target.jobs() == [] and depth(target) == 2
    setup.check()


def test_a_time_limit_is_a_timeout_error(setup: Setup) -> None:
    with sync.live(setup.machine.target) as target:
        with pytest.raises(TimeoutError) as left:
            sync.commit(target, top="[3]", speed=1, timeout=1)
        assert isinstance(left.value, qmpmerge.Error)
        assert {job.id for job in target.jobs()} <= {JOB}


def test_threads_take_turns_at_a_target(setup: Setup) -> None:
    with sync.live(setup.machine.target) as target, concurrent.futures.ThreadPoolExecutor(4) as threads:
        merging = threads.submit(sync.commit, target, top="[3]")
        depths = [threads.submit(depth, target) for _ in range(8)]
        assert merging.result().verdict == "merged"
        assert {looking.result() for looking in depths} <= {2, 4}
        assert depth(target) == 2
    setup.check()


def test_a_target_is_closed_when_the_call_of_another_thread_has_ended(setup: Setup) -> None:
    begun = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        with sync.live(setup.machine.target) as target:
            merging = threads.submit(sync.commit, target, top="[3]", report=lambda progress: begun.set())
            assert begun.wait(60)
        assert merging.result().verdict == "merged"
    with pytest.raises(RuntimeError, match="closed"):
        target.jobs()


def test_threads_merge_at_once_each_at_a_target_of_its_own(tmp_path: Path) -> None:
    chains, content = [], Content()
    for name in "one", "two":
        (tmp_path / name).mkdir()
        chains.append(make_chain(tmp_path / name))
        content = Content()
        fill(chains[-1], content)

    def merge(image: Path) -> str:
        with sync.offline(image) as target:
            met.wait()
            return sync.commit(target).verdict

    met = threading.Barrier(2, timeout=60)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert list(threads.map(merge, [chain[3] for chain in chains])) == ["pivoted", "pivoted"]
    for chain in chains:
        content.check(chain[0])


def test_targets_can_be_open_side_by_side_in_one_thread(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_chain(tmp_path / "other")
    with sync.live(setup.machine.target) as vm, sync.offline(other[3]) as image:
        assert depth(vm) == depth(image) == 4
        assert sync.commit(image, top="[3]").verdict == "merged"
        assert (depth(vm), depth(image)) == (4, 2)


async def test_where_a_loop_runs_already_it_is_said_what_to_await(setup: Setup, images: list[Path]) -> None:
    with pytest.raises(RuntimeError, match="await"), sync.live(setup.machine.target):
        pass
    with pytest.raises(RuntimeError, match="await"):
        sync.recover(images[3])


def test_so_it_is_where_a_report_asks(setup: Setup) -> None:
    with sync.live(setup.machine.target) as target:
        with pytest.raises(RuntimeError, match="await"):
            sync.commit(target, top="[3]", report=lambda progress: print(target.disks()))
        with pytest.raises(NoSuchDisk):
            target.chain("nonsense")
