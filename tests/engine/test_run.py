"""The ways to leave a merge: signals, time limits, lost sessions; and the monitor left to others meanwhile."""

import asyncio
import contextlib
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rig import contract, folder
from rig.command import COMMAND, JOB, Begun, invoke
from rig.disks import Images, Setup, drive
from rig.machines import Content, Machine, fill, make_chain
from rig.server import CLIENT, stop
from rig.wire import heard

import qmpmerge as library
from qmpmerge.chain.state import State
from qmpmerge.cli.run import ONE_SIGNAL_SECONDS
from qmpmerge.engine import reconnect, safeguards, time_limit
from qmpmerge.engine.run import Run
from qmpmerge.errors import CannotRecord, JobFailed, LiveOnly, NoReply, RecordFailed, SessionLost, StillRunning, TimeUp
from qmpmerge.folder import Folder
from qmpmerge.journal import store
from qmpmerge.qemu import monitor

FOREVER = ("--speed", "1")
ALL_TOPS = pytest.mark.parametrize("top", ["[3]", "[4]"])


def job_now(setup: Setup) -> str | None:
    """The status of our job, None where it is gone."""
    return next((job["status"] for job in setup.machine.session.execute("query-jobs") if job["id"] == JOB), None)


def nothing_is_left_behind(setup: Setup) -> None:
    """Nothing throttled, frozen or paused: the guest can write, and no node of ours is there."""
    ask = setup.machine.session.execute
    assert not any("qmpmerge" in node["node-name"] for node in ask("query-named-block-nodes", flat=True))
    setup.write(0x31, 0, 4096)
    setup.check()


# --- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "number"), [("[3]", signal.SIGINT), ("[4]", signal.SIGTERM)])
def test_the_first_signal_cancels_and_waits_for_the_old_chain(setup: Setup, top: str, number: signal.Signals) -> None:
    begun = Begun("commit", setup.machine.target, "--top", top, *FOREVER)
    begun.process.send_signal(number)
    run = begun.end()
    assert (run.code, run.document["verdict"], job_now(setup)) == (130, "cancelled", None)
    nothing_is_left_behind(setup)
    assert list(setup.machine.folder.glob(".*qmpmerge*")) == []


@ALL_TOPS
def test_a_closed_terminal_leaves_the_job(setup: Setup, top: str) -> None:
    begun = Begun("commit", setup.machine.target, "--top", top, *FOREVER)
    begun.process.send_signal(signal.SIGHUP)
    run = begun.end()
    assert (run.code, run.document["verdict"]) == (7, "running")
    assert job_now(setup) in ("running", "ready")
    nothing_is_left_behind(setup)
    again = invoke("commit", setup.machine.target, "--top", top, "--speed", "0", "--json")
    assert again.document["verdict"] == {"[3]": "merged", "[4]": "pivoted"}[top]


def test_nohup_means_what_it_says(setup: Setup) -> None:
    line = ["nohup", COMMAND, "commit", setup.machine.target, "--top", "[3]", *FOREVER, "--json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b'"progress"' not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGHUP)
        setup.machine.session.execute("block-job-set-speed", device=JOB, speed=0)
        out, _ = process.communicate(timeout=60)
    assert json.loads(out)["verdict"] == "merged"


def test_a_terminal_that_is_gone_is_no_error(setup: Setup) -> None:
    """Closing it takes its streams away too."""
    ours, theirs = os.openpty()
    line = [COMMAND, "commit", setup.machine.target, "--top", "[3]", *FOREVER]
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    while job_now(setup) != "running":
        time.sleep(0.01)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 7
    assert job_now(setup) == "running"


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_leaves_at_once_and_says_how_to_come_back(setup: Setup, second: signal.Signals) -> None:
    """QEMU is stopped, so the cancelling does not end."""
    begun = Begun("commit", setup.machine.target, *FOREVER)
    stop(setup.machine)
    begun.process.send_signal(signal.SIGINT)
    assert begun.process.stderr is not None
    while b"cancelling" not in begun.process.stderr.readline():
        pass
    time.sleep(2 * ONE_SIGNAL_SECONDS)
    begun.process.send_signal(second)
    run = begun.end()
    setup.machine.process.send_signal(signal.SIGCONT)
    assert (run.code, run.document["verdict"]) == (7, "running")
    assert f"qmpmerge job {setup.machine.target} {JOB} follow" in run.document["error"]["hint"]


@ALL_TOPS
async def test_from_the_switch_to_the_proof_signals_wait(setup: Setup, top: str) -> None:
    """Both kinds, at every moment between the command and its proof."""
    ends = ("job-finalize", "job-complete")
    patience = library.Patience()
    tasks: list[asyncio.Task[library.Outcome]] = []
    switching = False

    def signals(direction: str, text: str) -> None:
        nonlocal switching
        switching = switching or (direction == "->" and any(command in text for command in ends))
        if switching:
            patience.leave()
            tasks[0].cancel()

    async with heard(signals), library.live(setup.machine.target) as target:
        tasks.append(asyncio.ensure_future(library.commit(target, "vda", top=top, patience=patience)))
        assert (await tasks[0]).verdict in ("merged", "pivoted")
    assert job_now(setup) is None
    nothing_is_left_behind(setup)


HANGING = """
import os, sys, time
os.fdatasync = lambda descriptor: time.sleep(600)
from qmpmerge.cli import main
sys.exit(main())
"""
"""The command, on storage that does not answer to the sync of a record, for which nobody waits while QEMU copies."""


def left_hanging(machine: Machine, base: str, limit: float | None) -> Any:
    """What the command says that was left at this time limit, where there is one, else by two signals."""
    words = ["commit", machine.target, "--base", base, "--top", "[3]", *FOREVER, "--json"]
    limits = [] if limit is None else ["--timeout", str(limit)]
    process = subprocess.Popen([sys.executable, "-c", HANGING, *words, *limits], stdout=-1, stderr=-1)
    while limit is None and not store.in_folder(str(machine.folder)):
        assert process.poll() is None
    for _ in range(2 if limit is None else 0):
        time.sleep(2 * ONE_SIGNAL_SECONDS)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    contract.hold(out.decode(), err.decode())
    told = json.loads(out)
    is_early = limit is not None and told["error"]["name"] == "time-up"  # on a busy machine
    return left_hanging(machine, base, 2 * (limit or 1)) if is_early else told


@pytest.mark.parametrize(
    ("base", "limit", "name"),
    [
        ("[1]", 3, "still-running"),
        ("[1]", None, "record-left"),
        ("[2]", 3, "record-left"),  # the job waits for the record, which alone tells of what is copied from below base
    ],
)
def test_storage_that_hangs_holds_nobody_who_leaves(setup: Setup, base: str, limit: float | None, name: str) -> None:
    """Whoever comes next finds the record, and makes it durable before anything is switched."""
    told = left_hanging(setup.machine, base, limit)
    left = store.in_folder(str(setup.machine.folder))
    assert told["error"]["name"] == name and len(left) == 1
    assert (job_now(setup) is not None) == (name == "still-running")
    if name == "still-running":
        assert told["hints"] == [
            f"{left[0].path} is written, but the storage has not made it durable yet, so it was left"
        ]
    again = invoke("commit", setup.machine.target, "--base", base, "--top", "[3]", "--speed", "0", "--json")
    assert again.document["verdict"] == "merged" and store.in_folder(str(setup.machine.folder)) == []
    setup.check()


def test_offline_a_second_signal_leaves_the_old_chain(images: list[Path], content: Content) -> None:
    begun = Begun("commit", str(images[3]), *FOREVER)
    begun.process.send_signal(signal.SIGHUP)
    begun.process.send_signal(signal.SIGINT)
    assert begun.end().document["verdict"] == "cancelled"
    content.check(images[3])


# --- leaving on purpose, and in time -------------------------------------------------------------------------------------


@ALL_TOPS
def test_detach_leaves_once_the_job_has_been_started(setup: Setup, top: str) -> None:
    run = invoke("commit", setup.machine.target, "--top", top, "--detach", "--json")
    assert (run.code, run.document["verdict"], run.document["error"]["facts"]["job"]) == (7, "running", JOB)
    assert job_now(setup) is not None
    followed = invoke("job", setup.machine.target, JOB, "follow", "--json")
    assert followed.document["verdict"] in ("merged", "pivoted")


async def test_offline_nothing_can_be_left(images: list[Path], content: Content) -> None:
    async with Images(images[3], content).target() as target:
        with pytest.raises(LiveOnly, match="--detach"):
            await library.commit(target, patience=library.Patience(detach=True))


@pytest.mark.parametrize("option", [["--converge"], ["--converge-pause", "2s"]], ids=" ".join)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["", "dry-run"])
def test_offline_there_is_no_guest_to_slow_down(option: list[str], dry_run: list[str], images: list[Path]) -> None:
    told = invoke("commit", str(images[3]), *option, *dry_run, "--json").document["error"]
    assert (told["name"], told["facts"]["option"]) == ("live-only", option[0])


def test_two_signals_at_once_are_one(setup: Setup) -> None:
    """As timeout(1) sends them, to the process and then to its group: the job is cancelled, and not left."""
    begun = Begun("commit", setup.machine.target, "--top", "[3]", *FOREVER)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        begun.process.send_signal(number)
    run = begun.end()
    assert (run.code, run.document["verdict"], job_now(setup)) == (130, "cancelled", None)


@ALL_TOPS
def test_timeout_of_coreutils_cancels(setup: Setup, top: str) -> None:
    """What docs/commit.md tells to those who want no job to be left."""
    options = ["--top", top, *FOREVER]
    if top == "[4]":  # so small a disk heeds no limit, so it is paused instead
        options.append("--wait-ready")
        assert invoke("commit", setup.machine.target, "--wait-ready").code == 0
        setup.machine.session.execute("job-pause", id=JOB)
        setup.machine.wait_for_job("standby")
    words = [COMMAND, "commit", setup.machine.target, *options, "--json"]
    limited = ["timeout", "--preserve-status", "-s", "INT", "10m", *words]
    with subprocess.Popen(limited, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as timeout:
        assert timeout.stderr is not None
        next(line for line in timeout.stderr if b'"speed": 1,' in line)  # by now it follows the job
        timeout.send_signal(signal.SIGALRM)  # the ten minutes are over
        out, _ = timeout.communicate(timeout=60)
    assert (timeout.returncode, json.loads(out)["verdict"], job_now(setup)) == (130, "cancelled", None)
    nothing_is_left_behind(setup)


async def begun_within(commit: Callable[..., Awaitable[object]], limit: float) -> "asyncio.Future[object]":
    """A merge that is followed and not yet at its time limit, which is longer where a busy machine does not get there."""
    while True:
        begun = asyncio.Event()

        def set_(_: object, begun: asyncio.Event = begun) -> None:
            begun.set()

        following = asyncio.ensure_future(commit(timeout=limit, report=set_))
        following.add_done_callback(set_)
        await begun.wait()
        if not (following.done() and isinstance(following.exception(), TimeUp)):
            return following
        limit *= 4


async def test_the_time_limit_holds_where_qemu_stands_still(setup: Setup) -> None:
    """While it is followed, and before anything is sent."""
    async with library.live(setup.machine.target) as target:
        following = await begun_within(functools.partial(library.commit, target, top="[3]", speed=1), 1.0)
        stop(setup.machine)
        with pytest.raises(StillRunning):
            await following
    setup.machine.process.send_signal(signal.SIGCONT)
    async with library.live(setup.machine.target) as target:
        stop(setup.machine)
        with pytest.raises(TimeUp):
            await library.commit(target, top="[3]", timeout=0.3)
    setup.machine.process.send_signal(signal.SIGCONT)
    assert job_now(setup) == "running"


async def test_a_job_that_goes_on_is_not_taken_for_our_own_time_limit() -> None:
    """Both are a TimeoutError, and only of ours it is known that nothing was switched."""
    with pytest.raises(StillRunning):
        async with time_limit.in_time(library.Patience(60)):
            raise StillRunning(target="vm1", job=JOB)


async def test_the_time_limit_holds_for_flush_comparison_and_switch(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = False

    async def for_ever(*_: object, **_named: object) -> None:
        nonlocal reached
        reached = True
        await asyncio.sleep(60)

    async with library.live(setup.machine.target) as target:
        for place, name in ((safeguards, "make_receiver_durable"), (safeguards, "verify")):
            limit, reached = 0.5, False
            with monkeypatch.context() as patch:
                patch.setattr(place, name, for_ever)
                while not reached:  # on a busy machine it may be reached before anything began, or while QEMU copies
                    with pytest.raises((StillRunning, TimeUp)):
                        await library.commit(target, top="[3]", timeout=limit)
                    limit *= 2
            assert job_now(setup) == "pending"
        assert (await library.commit(target, top="[3]")).verdict == "merged"


# --- sessions that are lost ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def losing(setup: Setup, moment: str, count: int = 1) -> AsyncIterator[tuple[library.Target, list[str]]]:
    """
    A host whose session is cut off under it at a moment of the conversation, so many times; yields the commands that were
    sent. A moment is a direction with a command, or what is said.
    """
    sent: list[str] = []
    hosts: list[library.Target] = []

    def cut(direction: str, text: str) -> None:
        nonlocal count
        if direction == "->":
            sent.append(json.loads(text)["execute"])
        if moment in f"{direction} {sent[-1]} {text}" and count:
            count -= 1
            hosts[0].monitor._client._writer.transport.abort()  # type: ignore[union-attr]

    async with heard(cut), library.live(setup.machine.target) as target:
        hosts.append(target)
        yield target, sent


@pytest.mark.parametrize(
    ("top", "moment"),
    [
        ("[3]", "-> block-commit"),
        ("[3]", "<- block-commit"),
        ("[3]", "take-child-perms"),  # the flush of base
        ("[3]", "-> job-finalize"),
        ("[3]", "<- job-finalize"),
        ("[3]", "-> job-dismiss"),
        ("[4]", "-> job-complete"),
        ("[4]", "<- job-complete"),
        ("[4]", "-> job-dismiss"),
    ],
)
async def test_a_lost_session_is_made_again_and_qemu_asked_for_the_truth(
    setup: Setup, content: Content, top: str, moment: str
) -> None:
    """What was being sent may have been lost or not; nothing is sent a second time without a look."""
    async with losing(setup, moment) as (target, sent):
        try:
            outcome = await library.commit(target, "vda", top=top)
        except JobFailed as error:  # it was lost before QEMU had it
            assert moment == "-> block-commit" and "before QEMU had started it" in error.reason
            assert sent.count("block-commit") == 1
            outcome = await library.commit(target, "vda", top=top)
    assert outcome.verdict == {"[3]": "merged", "[4]": "pivoted"}[top]
    assert job_now(setup) is None
    setup.check()
    setup.off()
    content.check(outcome.after.active.file)


async def test_a_session_that_is_lost_twice_is_an_unknown_outcome(setup: Setup) -> None:
    async with losing(setup, "-> job-finalize", count=2) as (target, _):
        try:
            outcome = await library.commit(target, "vda", top="[3]")
            assert outcome.verdict == "merged"  # QEMU had the first one already
        except SessionLost as lost:
            assert lost.verdict == "unknown"
    async with library.live(setup.machine.target) as target:
        outcome = await library.commit(target, "vda", top=f"{setup.machine.folder}/b.qcow2")
        assert outcome.verdict == "merged"


async def test_a_monitor_that_stops_answering_mid_job_and_comes_back(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first question after SIGSTOP gets no reply in time; by the time we come back QEMU runs again."""
    monkeypatch.setattr(monitor.Monitor.execute, "__kwdefaults__", {"timeout": 0.5})
    begun = asyncio.Event()
    async with library.live(setup.machine.target) as target:
        merge = asyncio.ensure_future(library.commit(target, top="[3]", speed=1, report=lambda told: begun.set()))
        await begun.wait()
        stop(setup.machine)
        await asyncio.sleep(1.2)
        setup.machine.process.send_signal(signal.SIGCONT)
        setup.machine.session.execute("block-job-set-speed", device=JOB, speed=0)
        monkeypatch.undo()
        assert (await merge).verdict == "merged"


async def test_a_monitor_that_never_answers_again_is_an_unknown_outcome(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor.Monitor.execute, "__kwdefaults__", {"timeout": 0.5})
    begun = asyncio.Event()
    async with library.live(setup.machine.target, timeout=0.5) as target:
        merge = asyncio.ensure_future(library.commit(target, top="[3]", speed=1, report=lambda told: begun.set()))
        await begun.wait()
        stop(setup.machine)
        with pytest.raises(NoReply) as lost:
            await merge
    assert lost.value.verdict == "unknown" and "qmpmerge doctor" in lost.value.hint
    setup.machine.process.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    assert (await followed(setup)).verdict == "merged"


async def followed(setup: Setup) -> library.Outcome:
    async with library.live(setup.machine.target) as target:
        return await library.commit(target, top="[3]", speed=0)


async def test_a_qemu_that_was_started_anew_is_not_the_one_that_had_the_job(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """A supervisor restarts it at the same path before we come back."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(drive(tmp_path, images, content))
        begun = asyncio.Event()
        async with library.live(first.machine.target) as target:
            merge = asyncio.ensure_future(library.commit(target, top="[3]", speed=1, report=lambda told: begun.set()))
            await begun.wait()
            second = replaced(first.machine, stack, tmp_path, images, content)
            with pytest.raises(JobFailed, match="started anew") as failed:
                await merge
        assert failed.value.verdict == "failed"
        assert (await followed(second)).verdict == "merged"


def replaced(
    machine: Machine, stack: contextlib.ExitStack, folder: Path, images: list[Path], content: Content
) -> Setup:
    machine.kill()
    return stack.enter_context(drive(folder, images, content))


# --- the monitor left to others --------------------------------------------------------------------------------------------


@ALL_TOPS
async def test_a_polite_follower_lets_others_at_the_monitor(setup: Setup, content: Content, top: str) -> None:
    """It would be refused otherwise: a monitor serves one client at a time."""
    begun = asyncio.Event()
    async with library.live(setup.machine.target) as target:
        speed = 0 if top == "[4]" else 1
        merge = asyncio.ensure_future(
            library.commit(target, top=top, speed=speed, polite=0.2, report=lambda told: begun.set())
        )
        if top == "[3]":
            await begun.wait()
            async with library.live(setup.machine.target) as other:
                assert [job.id for job in await other.jobs()] == [JOB]
                await library.control(other, JOB, "speed", speed=0)
        outcome = await merge
        assert outcome.verdict in ("merged", "pivoted")
        assert (await target.disks())[0].chain is not None  # the session is there again
    setup.off()
    content.check(outcome.after.active.file)


async def test_a_polite_follower_waits_for_its_turn_and_heeds_the_limit(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnect, "POLITE_TRIES_SECONDS", 0.05)
    async with library.live(setup.machine.target, timeout=0.2) as target:
        merge = await begun_within(functools.partial(library.commit, target, top="[3]", speed=1, polite=0.3), 3)
        async with another(setup.machine.target):
            with pytest.raises(StillRunning):
                await merge
    assert job_now(setup) == "running"


@contextlib.asynccontextmanager
async def another(path: str) -> AsyncIterator[None]:
    """Another client that gets the monitor when it is its turn, and keeps it."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, path, stdin=pipe, stdout=pipe)
    assert process.stdin is not None and process.stdout is not None
    assert await process.stdout.readline() == b"greeted\n"
    yield
    process.stdin.close()
    await process.wait()


@pytest.mark.parametrize(("where", "error"), [("", JobFailed), ("other", SessionLost)])
@pytest.mark.parametrize("merge", [library.commit, library.pull])
async def test_a_polite_follower_leaves_a_qemu_alone_that_was_started_anew_meanwhile(
    merge: Callable[..., Awaitable[library.Outcome]],
    where: str,
    error: type[Exception],
    tmp_path: Path,
    images: list[Path],
    content: Content,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On other images, it may have a job of the same id, and it is not told that theirs were merged."""
    away, back, again = asyncio.Event(), asyncio.Event(), reconnect.our_turn
    job = f"qmpmerge-{merge.__name__}-vda"

    async def once_it_is_back(run: Run) -> None:
        away.set()
        await back.wait()
        await again(run)

    monkeypatch.setattr(reconnect, "our_turn", once_it_is_back)
    (tmp_path / "other").mkdir()
    others = make_chain(tmp_path / where) if where else images
    if where:
        fill(others, Content())
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(drive(tmp_path, images, content))
        async with library.live(first.machine.target) as target:
            merging = asyncio.ensure_future(merge(target, speed=1, polite=0.1))
            await away.wait()
            second = replaced(first.machine, stack, tmp_path, others, content)
            if where:
                second.machine.session.execute("block-commit", device="vda", job_id=job, speed=1)
            back.set()
            with pytest.raises(error, match="started anew"):
                await merging
        assert [one["id"] for one in second.machine.session.execute("query-jobs")] == ([job] if where else [])


async def test_a_polite_follower_that_is_cancelled_takes_the_job_back(setup: Setup) -> None:
    begun = asyncio.Event()
    async with library.live(setup.machine.target) as target:
        following = library.commit(target, top="[3]", speed=1, polite=30, report=lambda told: begun.set())
        merge = asyncio.ensure_future(following)
        await begun.wait()
        await asyncio.sleep(0.1)
        merge.cancel()
        with pytest.raises(asyncio.CancelledError):
            await merge
    assert job_now(setup) is None


# --- states ----------------------------------------------------------------------------------------------------------------


async def test_each_state_is_entered_in_its_order_and_written_down_first(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[tuple[State, State | None]] = []
    enter = Run.enter

    def watched(run: Run, state: State, **facts: Any) -> None:
        enter(run, state, **facts)
        entered.append((run.state, run.record.state if run.record is not None else None))

    monkeypatch.setattr(Run, "enter", watched)
    async with library.live(setup.machine.target) as target:
        assert (await library.commit(target, top="[3]")).verdict == "merged"
        intermediate, entered[:] = entered[:], []
        assert (await library.commit(target)).verdict == "pivoted"
    written = [State.COPYING, State.COPYING, State.SWITCHING, State.SWITCHED, State.PROVED, None]
    states = [State.COPYING, State.SAFE, State.SWITCHING, State.SWITCHED, State.PROVED, State.DONE]
    assert intermediate == list(zip(states, written, strict=True))
    assert list(dict.fromkeys(entered)) == list(zip(states, written, strict=True))


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("left", ["merged", "pivoted", "ready", "running"])
async def test_the_record_is_made_durable_while_qemu_copies_and_before_anything_is_switched(
    left: str, fails: bool, tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that takes long over it holds nobody up; where it fails the job is taken back, whatever was to become of it."""
    begun, synced, really = threading.Event(), list[str](), Folder.sync

    def sync(place: Folder) -> None:
        if not synced:
            assert begun.wait(20), "the job waits for it"
            time.sleep(0.1)
            synced.append(place.path)
            if fails:
                raise OSError(errno.EIO, "Input/output error")
        really(place)

    def note_start(direction: str, text: str) -> None:
        if direction == "->" and ('"block-commit"' in text or '"block-stream"' in text):
            begun.set()

    monkeypatch.setattr(Folder, "sync", sync)
    before = folder.names(tmp_path)
    async with heard(note_start), library.live(setup.machine.target) as target:
        with pytest.raises(RecordFailed, match="Input/output error") if fails else contextlib.nullcontext():
            assert await _verdict(target, left) == left
        assert synced
        if fails:
            assert (await target.jobs(), folder.names(tmp_path), store.in_folder(str(tmp_path))) == ([], before, [])
            setup.check()


async def _pulled(target: library.Target) -> None:
    await library.pull(target, top="[3]")


async def _merged_into_the_middle(target: library.Target) -> None:
    await library.commit(target, base="[2]", top="[3]")


@pytest.mark.parametrize("carry_out", [_pulled, _merged_into_the_middle])
async def test_the_record_is_durable_before_anything_is_copied_from_further_below(
    carry_out: Callable[[library.Target], Awaitable[None]], setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That counts as the receiver's own data then, and who finds no record does not know that nobody has compared it."""
    told: list[str] = []
    really = Folder.sync

    def sync(place: Folder) -> None:
        told.append("synced")
        really(place)

    def note(direction: str, text: str) -> None:
        if direction == "->" and ('"block-commit"' in text or '"block-stream"' in text):
            told.append("started")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "sync", sync)
        async with heard(note), library.live(setup.machine.target) as target:
            await carry_out(target)
        assert told[0] == "synced"
    setup.check()


async def test_where_that_fails_nothing_is_begun(tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(_place: Folder) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = folder.names(tmp_path)
    async with library.live(setup.machine.target) as target:
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "sync", sync)
            with pytest.raises(CannotRecord, match="Input/output error"):
                await _pulled(target)
        assert (await target.jobs(), folder.names(tmp_path), store.in_folder(str(tmp_path))) == ([], before, [])
    setup.check()


async def _verdict(target: library.Target, left: str) -> str:
    if left == "running":
        with pytest.raises(StillRunning):
            await library.commit(target, top="[3]", speed=1, patience=library.Patience(detach=True))
        return "running"
    if left == "ready":
        return (await library.commit(target, ending="hold")).verdict
    return (await library.commit(target, top="[3]" if left == "merged" else None)).verdict


async def test_a_step_that_is_not_allowed_is_a_bug_and_changes_nothing(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    write_down = Run.write_down

    def remembered(run: Run) -> None:
        write_down(run)
        runs.append(run)

    monkeypatch.setattr(Run, "write_down", remembered)
    async with library.live(setup.machine.target) as target:
        with pytest.raises(StillRunning):
            await library.commit(target, top="[3]", speed=1, patience=library.Patience(detach=True))
        (run,) = runs
        assert run.state is State.LEFT and run.record is not None and run.record.state is State.COPYING
        with pytest.raises(ValueError, match="LEFT does not lead to SWITCHED"):
            run.enter(State.SWITCHED)
        assert run.state is State.LEFT
        assert (await library.commit(target, top="[3]", speed=0)).verdict == "merged"
