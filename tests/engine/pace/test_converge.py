"""
Convergence: a guest that outruns the copy is seen, told, and where the user says so helped; what was done to it is undone.

The copy is slow since the base's file is behind a throttle filter, or by the job's own limit; the guest writes as fast as
QEMU takes it. So it is outrun however busy the host is.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rig.disks import BACKEND, device, storage_daemon
from rig.machines import MIB, Content, Machine, machine, make_chain

import qmpmerge
from qmpmerge.cli.recorded import Screen
from qmpmerge.engine.pace import converge, rates
from qmpmerge.engine.pace.converge import Converge, Ladder
from qmpmerge.engine.pace.progress import Progress
from qmpmerge.engine.pace.rates import Rates, Watch
from qmpmerge.errors import JobFailed, QemuRefused, StillRunning
from qmpmerge.guest.throttle import Throttle
from qmpmerge.qemu.jobs import Job
from qmpmerge.recording import record

SIZE = 8 * MIB
PIECE = 512 * 1024
COPIED = 4 * MIB
"""Bytes a second that the storage of the slow base takes."""

SIX = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


@dataclass
class Guest:
    """A guest that rewrites its whole disk again and again, for as long as the machine says that it runs."""

    vm: Machine
    content: Content
    stands_still: bool = False
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    def ask(self, command: str, **arguments: Any) -> Any:
        """The bench's session is the writer's too."""
        with self._turn:
            return self.vm.session.execute(command, **arguments)

    def write_on(self) -> None:
        number = 0
        while not self._over.is_set():
            if not (self.stands_still and self.ask("query-status")["status"] == "paused"):
                offset = number * 7 % (SIZE // PIECE) * PIECE
                line = f'qemu-io -d {BACKEND} "{self.content.put(number % 251, offset, PIECE).replace("-P", "-q -P")}"'
                self.ask("human-monitor-command", command_line=line)
                number += 1
            time.sleep(0.001)

    def limits(self) -> dict[str, Any]:
        """What the guest is limited to."""
        (entry,) = self.ask("query-block")
        return {
            name: value for name, value in entry["inserted"].items() if name[:3] in ("bps", "iop") or name == "group"
        }

    def is_unlimited_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while "group" in self.limits():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        thread = threading.Thread(target=self.write_on)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return make_chain(tmp_path, ["base.raw", "c.qcow2"], SIZE)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SETTLE_SECONDS", 0.6)


@pytest.fixture
def guest(tmp_path: Path, images: list[Path]) -> Iterator[Guest]:
    """Its base is on slow storage; it has written everywhere."""
    arguments = [
        *("-object", f"throttle-group,id=slow,x-bps-write={COPIED}"),
        *("-blockdev", f"file,node-name=base-file,filename={images[0]},auto-read-only=on"),
        *("-blockdev", "throttle,node-name=slow-file,throttle-group=slow,file=base-file"),
        *("-blockdev", "raw,node-name=base,file=slow-file,read-only=on"),
        *("-blockdev", f"file,node-name=c-file,filename={images[1]}"),
        *("-blockdev", "qcow2,node-name=c,file=c-file,backing=base"),
    ]
    with machine(tmp_path, *arguments, *device("c")) as vm:
        content = Content()
        vm.io(BACKEND, content.put(7, 0, SIZE))
        yield Guest(vm, content)


# --- what is told -------------------------------------------------------------------------------------------------


async def test_a_guest_that_outruns_the_copy_is_told_once_what_helps(guest: Guest) -> None:
    seen: list[Progress] = []
    stuck = asyncio.Event()

    def report(told: Progress) -> None:
        seen.append(told)
        if [told.converging for told in seen].count(False) > 1:
            stuck.set()

    with guest.writing():
        async with qmpmerge.live(guest.vm.target) as target:
            merge = asyncio.ensure_future(qmpmerge.commit(target, report=report))
            await asyncio.wait({merge, asyncio.ensure_future(stuck.wait())}, return_when=asyncio.FIRST_COMPLETED)
            merge.cancel()
            with pytest.raises(asyncio.CancelledError):
                await merge
    *followed, _what_is_left_behind = seen
    assert [told.hint is not None for told in followed].count(True) == 1
    last = followed[-1]
    assert last.seconds_left is None and last.dirty_rate is not None
    assert last.dirty_rate > COPIED / 2
    assert guest.limits() == SIX


async def test_a_quiet_guest_gets_no_help(guest: Guest) -> None:
    seen: list[Progress] = []
    async with qmpmerge.live(guest.vm.target) as target:
        outcome = await qmpmerge.commit(target, report=seen.append, converge=Converge())
    assert (outcome.verdict, outcome.converge) == ("pivoted", ())
    assert False not in [told.converging for told in seen]


# --- the ladder ---------------------------------------------------------------------------------------------------


async def test_our_own_limit_is_taken_off(tmp_path: Path, images: list[Path]) -> None:
    """On quick storage that is all that is needed."""
    with machine(tmp_path, "-drive", f"file={images[1]},if=none,id=vda", *device("vda")) as vm:
        guest = Guest(vm, Content())
        vm.io(BACKEND, guest.content.put(7, 0, SIZE))
        with guest.writing():
            async with qmpmerge.live(vm.target) as target:
                outcome = await qmpmerge.commit(target, "vda", speed=COPIED, ending="hold", converge=Converge())
        assert (outcome.verdict, outcome.converge) == ("ready", ("the job's own limit of 4 MiB/s is taken off",))
        await pivot(guest, images[0])


async def pivot(guest: Guest, base: Path) -> None:
    """
    From a job that is ready, with the guest standing still, all is on the base.

    The bench's writes come in through the human monitor, which no pivot keeps out: QEMU 7.2 aborts over one
    (`child->perm & BLK_PERM_WRITE`), as it does over an NVMe disk's.
    """
    async with qmpmerge.live(guest.vm.target) as target:
        (job,) = await target.jobs()
        assert (await qmpmerge.follow(target, job.id, needs_ready=True)).verdict == "pivoted"
    guest.vm.stop()
    guest.content.check(base)


async def test_the_guest_is_throttled_and_gets_its_own_limits_back(guest: Guest, images: list[Path]) -> None:
    own = {**SIX, "bps_wr": 1024 * MIB, "bps_wr_max": 2048 * MIB, "iops_rd": 5000, "group": "mine"}
    guest.ask("block_set_io_throttle", id=BACKEND, **own)
    before = guest.limits()
    told: list[str] = []
    during: list[dict[str, Any]] = []

    def tell(text: str) -> None:
        told.append(text)

    def report(progress: Progress) -> None:
        if told:
            during.append(guest.limits())

    with guest.writing():
        async with qmpmerge.live(guest.vm.target) as target:
            outcome = await qmpmerge.commit(target, ending="hold", report=report, converge=Converge(tell=tell))
    assert outcome.verdict == "ready"
    assert told == [f"disk0: {rung}" for rung in outcome.converge]
    assert outcome.converge[0].startswith("the guest's writes are limited to ")
    assert 0 < during[-1]["bps_wr"] <= COPIED and during[-1]["iops_rd"] == 5000
    assert during[-1]["group"] == f"qmpmerge-throttle-{os.getpid()}-disk0"
    assert guest.limits() == before
    await pivot(guest, images[0])


async def test_the_guest_is_paused_for_the_rest_and_runs_again(
    guest: Guest, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The floor leaves it as quick as before, so only a pause helps. It counts as too quick at any pace: on a busy host it is not,
    since its writes wait for those of the job.
    """
    monkeypatch.setattr(rates, "HEADWAY", 0.0)
    monkeypatch.setattr(converge, "FLOOR", 1024 * MIB)
    guest.ask(
        "qom-set", path="slow", property="limits", value={"bps-write": COPIED // 4}
    )  # asked each time, it writes less
    guest.stands_still = True
    guest.ask("cont")
    with guest.writing():
        async with qmpmerge.live(guest.vm.target) as target:
            outcome = await qmpmerge.commit(target, converge=Converge(pause=20))
        assert guest.ask("query-status")["running"]
    assert outcome.verdict == "pivoted"
    assert outcome.converge[-1] == "the guest is paused, for 20 s at the most"
    assert guest.limits() == SIX
    guest.vm.stop()
    guest.content.check(images[0])


async def test_a_pause_that_would_not_do_is_not_made(guest: Guest) -> None:
    told: list[str] = []
    watch = Watch()
    watch.rates = Rates(dirty=9.0, copy=8.0, rest=80)
    async with qmpmerge.live(guest.vm.target) as target:
        ladder = Ladder(target.monitor, await target.disk(), "j", watch, Converge(pause=2, tell=told.append))
        await ladder.pause()
        watch.rates = Rates(dirty=9.0, copy=8.0, rest=8)
        await ladder.pause()
    assert told == [
        "disk0: the guest is not paused: 10.0 s are needed, 2 s are allowed",
        "disk0: the guest does not run, so there is nothing to pause",
    ]


async def test_nothing_is_shown_while_it_stands_still(guest: Guest) -> None:
    """A terminal that takes nothing would keep it so."""
    shown: list[tuple[str, bool]] = []

    class Terminal:
        def trace(self, entry: dict[str, Any]) -> None:
            shown.append((entry.get("message", {}).get("execute", entry["kind"]), guest.ask("query-status")["running"]))

    guest.ask("cont")
    watch = Watch()
    watch.rates = Rates(dirty=9.0, copy=8.0, rest=0)
    with record.recorded([], [Screen(Terminal())], warn=print):  # type: ignore[arg-type]
        async with qmpmerge.live(guest.vm.target) as target:
            await Ladder(target.monitor, await target.disk(), "j", watch, Converge(pause=0.1)).pause()
    assert ("stop", True) in shown and all(running for _, running in shown)


async def test_a_guest_that_nobody_can_throttle(tmp_path: Path, images: list[Path]) -> None:
    with storage_daemon(tmp_path, images, Content()) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            ladder = Ladder(target.monitor, await target.disk(), "j", Watch(), Converge())
            for step in ladder.throttling():
                await step()
            await ladder.come_down()
    (rung,) = ladder.rungs
    assert rung.startswith("the guest's writes cannot be limited: ")


async def test_a_job_that_fails_leaves_no_limit(guest: Guest) -> None:
    """Somebody cancels it behind our back."""
    during: list[dict[str, Any]] = []

    def cancel(rung: str) -> None:
        during.append(guest.limits())
        guest.ask("job-cancel", id="qmpmerge-commit-disk0")

    with guest.writing():
        async with qmpmerge.live(guest.vm.target) as target:
            with pytest.raises(JobFailed):
                await qmpmerge.commit(target, converge=Converge(tell=cancel))
    assert [limits["bps_wr"] > 0 for limits in during] == [True]
    assert guest.limits() == SIX


async def test_who_leaves_the_job_takes_the_limit_along(guest: Guest) -> None:
    """As after `--timeout`: nobody is there any more who would take it off later."""
    patience = qmpmerge.Patience()
    during: list[dict[str, Any]] = []

    def leave(rung: str) -> None:
        during.append(guest.limits())
        patience.leave()
        merge.cancel()

    with guest.writing():
        async with qmpmerge.live(guest.vm.target) as target:
            work = qmpmerge.commit(target, converge=Converge(tell=leave), patience=patience)
            merge = asyncio.ensure_future(work)
            with pytest.raises(StillRunning):
                await merge
        assert [limits["bps_wr"] > 0 for limits in during] == [True]
        assert guest.limits() == SIX
        assert guest.ask("query-jobs")


# --- when we are stopped ------------------------------------------------------------------------------------------

TOOL = "from qmpmerge import cli; from qmpmerge.engine.pace import rates; rates.SETTLE_SECONDS = 0.6; cli.main()"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_tool_leaves_no_limit(number: signal.Signals, code: int, guest: Guest) -> None:
    command = [sys.executable, "-c", TOOL, "commit", guest.vm.target, "--converge"]
    with guest.writing():
        tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert tool.stderr is not None
        while "are limited to" not in (line := tool.stderr.readline()):
            assert line
        assert guest.limits()["group"] == f"qmpmerge-throttle-{tool.pid}-disk0"
        tool.send_signal(number)
        tool.communicate(timeout=60)
        assert tool.returncode == code
        assert guest.is_unlimited_within(20)
        assert guest.limits() == SIX
    assert bool(guest.ask("query-jobs")) == (number == signal.SIGKILL), "the job is QEMU's"


# --- what the sightings say -----------------------------------------------------------------------------------------


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def watched(sightings: Callable[[int], tuple[int, int]], seconds: int) -> tuple[Watch, Progress]:
    """One sighting a second; `sightings` says what is done and what the total is, in MiB."""
    clock = Clock()
    watch = Watch(clock)
    told = Progress("vda", Job("j", "commit", "running", 0, 0), "copied")
    for second in range(seconds):
        clock.now = second
        done, total = sightings(second)
        told = watch.read(Job("j", "commit", "running", done * MIB, total * MIB), told)
    return watch, told


def test_rates_are_those_between_updates_of_the_total() -> None:
    """QEMU tells the total of each pass of 16 MiB at its end: 4 MiB/s dirtied, 8 MiB/s copied."""
    watch, told = watched(lambda second: (8 * second, 1000 + 8 * (second // 2)), 12)
    assert watch.rates is not None
    assert (watch.rates.dirty, watch.rates.copy) == (4 * MIB, 8 * MIB)
    assert (told.dirty_rate, type(told.dirty_rate)) == (4 * MIB, int)
    assert told.converging is True and not watch.stuck.is_set()
    assert told.seconds_left == watch.rates.rest / (4 * MIB) == (1040 - 88) / 4


def test_a_rest_that_never_shrinks_is_stuck() -> None:
    watch, told = watched(lambda second: (8 * second, 100 + 8 * second), 12)
    assert (told.converging, told.seconds_left, watch.stuck.is_set()) == (False, None, True)


def test_a_job_that_waits_at_its_limit_shows_no_rest_and_is_stuck_all_the_same() -> None:
    """It copies a pass of 16 MiB, then sleeps; the total grows at its next pass."""
    watch, told = watched(lambda second: (16 + second // 2 * 16, 16 + second // 2 * 16), 12)
    assert (told.converging, watch.stuck.is_set()) == (False, True)
    assert watch.rates is not None and watch.rates.rest == 16 * MIB


def test_nothing_is_said_too_early() -> None:
    """The job starts with 0 of 0, then the whole disk appears at once."""
    assert watched(lambda second: (0, 0), 9)[1].converging is None
    assert watched(lambda second: (0, 1000), 9)[1].converging is None
    assert watched(lambda second: (9 * second, 1000 + 9 * second), 2)[1].converging is None


async def test_a_drive_is_throttled_by_its_id(tmp_path: Path, images: list[Path]) -> None:
    with machine(tmp_path, "-drive", f"file={images[1]},if=none,id=vda", *device("vda")) as vm:
        guest = Guest(vm, Content())
        async with qmpmerge.live(vm.target) as target:
            throttle = Throttle(target.monitor, await target.disk())
            async with throttle.undone():
                await throttle.limit(3 * MIB)
                assert guest.limits()["bps_wr"] == 3 * MIB
        assert guest.limits() == SIX


async def test_a_disk_that_is_gone_cannot_be_throttled(guest: Guest) -> None:
    async with qmpmerge.live(guest.vm.target) as target:
        throttle = Throttle(target.monitor, qmpmerge.Disk("x", "x", "", "c", None, ()))
        with pytest.raises(QemuRefused):
            async with throttle.undone():
                raise AssertionError("not reached")
