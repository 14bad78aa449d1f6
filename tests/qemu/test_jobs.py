"""Jobs: what is told of them, and how they are controlled, on jobs of a real QEMU."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig.machines import MIB, Content, Machine, fill, machine, make_chain

from qmpmerge.engine.pace.course import Course
from qmpmerge.engine.pace.progress import Meter, Progress, Shortage
from qmpmerge.errors import JobVerb, NoSuchJob, QemuRefused, StillRunning
from qmpmerge.images.qemuimg import Extent
from qmpmerge.qemu import connect, jobs
from qmpmerge.qemu.jobs import VERBS, Job
from qmpmerge.qemu.monitor import Monitor

# --- progress -----------------------------------------------------------------------------------------------------


class Bench:
    """A meter under a fake clock."""

    counts = "copied"
    shortage: Shortage | None = None

    def __init__(self) -> None:
        self.now = 1000.0
        self.meter = Meter("vda", clock=lambda: self.now)

    def see(self, after: float, done: int, total: int = 100 * MIB, **facts: str) -> Progress:
        """What is told of a sighting `after` so many seconds."""
        self.now += after
        job = Job("j", "commit", facts.pop("status", "running"), done, total, **facts)  # type: ignore[arg-type]
        return self.meter.read(job, self.counts, self.shortage)


def test_the_first_second_says_nothing_about_the_rest() -> None:
    bench = Bench()
    for after, done in ((0.0, 0), (0.5, 40 * MIB), (0.49, 80 * MIB)):
        told = bench.see(after, done)
        assert (told.rate, told.seconds_left) == (None, None)
    assert bench.see(0.01, 80 * MIB).rate == 80 * MIB


def test_rate_and_time_left_are_told_after_a_second() -> None:
    bench = Bench()
    bench.see(0, 10 * MIB)
    told = bench.see(2, 30 * MIB)
    assert (told.rate, told.seconds_left, told.percent) == (10 * MIB, 7.0, 30.0)


def test_a_rate_is_whole_bytes() -> None:
    bench = Bench()
    bench.see(0, 0)
    rate = bench.see(3, MIB).rate
    assert (rate, type(rate)) == (349525, int)


def test_the_rate_is_that_of_the_last_seconds_only() -> None:
    bench = Bench()
    bench.see(0, 0)
    bench.see(1, 50 * MIB)
    rates = [bench.see(1, 50 * MIB + second * MIB).rate for second in range(1, 12)]
    assert rates[0] == 25.5 * MIB and rates[-1] == MIB


def test_a_job_that_stands_still_has_no_rate_and_no_end_in_sight() -> None:
    bench = Bench()
    bench.see(0, 50 * MIB)
    told = bench.see(5, 50 * MIB)
    assert (told.rate, told.seconds_left) == (None, None)


def test_a_job_that_waits_for_space_has_no_rate_and_no_end_in_sight() -> None:
    bench = Bench()
    bench.see(0, 0)
    bench.shortage = Shortage("/vm", MIB)
    told = bench.see(2, 50 * MIB)
    assert (told.rate, told.seconds_left) == (None, None)


def test_once_something_else_is_counted_the_rate_is_measured_anew() -> None:
    bench = Bench()
    bench.counts = "scanned"
    bench.see(0, 90 * MIB)
    bench.counts = "copied"
    assert bench.see(2, MIB).rate is None
    assert bench.see(2, 5 * MIB).rate == 2 * MIB


@pytest.mark.parametrize(
    ("offset", "done"), [(0, 0), (4, 0), (10, 0), (12, 2), (15, 5), (19, 5), (20, 5), (22, 7), (90, 10)]
)
def test_what_of_the_way_was_copied(offset: int, done: int) -> None:
    course = Course([Extent(10, 5), Extent(20, 5)])
    assert (course.done(offset), course.total) == (done, 10)
    assert Course([]).done(offset) == 0


def test_after_a_long_silence_the_rate_is_measured_anew() -> None:
    bench = Bench()
    bench.see(0, 0)
    assert bench.see(60, 60 * MIB).rate is None
    assert bench.see(2, 64 * MIB).rate == 2 * MIB


def test_a_total_that_grows_while_the_guest_writes_moves_the_end_away() -> None:
    bench = Bench()
    bench.see(0, 0)
    assert bench.see(2, 20 * MIB).seconds_left == 8.0
    assert bench.see(2, 40 * MIB, total=140 * MIB).seconds_left == 10.0


def test_a_job_that_did_more_than_it_thought_has_nothing_left() -> None:
    bench = Bench()
    bench.see(0, 0)
    told = bench.see(2, 120 * MIB)
    assert (told.seconds_left, told.percent) == (0.0, 100.0)


def test_nothing_of_nothing_is_no_percentage() -> None:
    told = Bench().see(0, 0, total=0)
    assert told.percent is None and told.seconds_left is None


def test_only_a_job_that_stands_still_has_no_space() -> None:
    """QEMU keeps the I/O status until the job is resumed."""
    assert Job("j", "commit", "paused", 0, 0, io_status="nospace").has_no_space
    assert Job("j", "commit", "standby", 0, 0, io_status="nospace").has_no_space
    assert not Job("j", "commit", "running", 0, 0, io_status="nospace").has_no_space
    assert not Job("j", "commit", "paused", 0, 0).has_no_space


def test_what_is_told_names_disk_job_and_what_is_counted() -> None:
    told = Bench().see(0, MIB)
    assert (told.disk, told.job.id, told.counts, told.done, told.total) == ("vda", "j", "copied", MIB, 100 * MIB)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1000), st.integers(0, 1000)), min_size=1))
def test_whatever_a_job_does_nothing_absurd_is_told(sightings: list[tuple[float, int, int]]) -> None:
    bench = Bench()
    for after, done, total in sightings:
        told = bench.see(after, done, total)
        assert told.rate is None or told.rate > 0
        assert told.seconds_left is None or told.seconds_left >= 0
        assert told.percent is None or 0 <= told.percent <= 100


# --- names and verbs ----------------------------------------------------------------------------------------------

QEMU_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


@given(st.text(st.characters(exclude_categories=())))
def test_a_job_id_is_legal_and_ours_whatever_the_disk_is_called(disk: str) -> None:
    name = jobs.job_id(disk)
    assert QEMU_ID.fullmatch(name)
    assert Job(name, "commit", "running", 0, 0).ours


@pytest.mark.parametrize(
    ("disk", "name"),
    [
        ("vda", "qmpmerge-commit-vda"),
        ("drive-virtio_0.1", "qmpmerge-commit-drive-virtio_0.1"),
        ("#block123", "qmpmerge-commit--block123-3fb3514f"),
        ("/machine/unattached/device[3]", "qmpmerge-commit--machine-unattached-device-3--5973adde"),
        ("größe٣", "qmpmerge-commit-gr--e--1bb7fd66"),
    ],
)
def test_a_job_id_says_what_it_does_and_to_which_disk(disk: str, name: str) -> None:
    assert jobs.job_id(disk) == name


def test_a_job_of_somebody_else_is_not_ours() -> None:
    assert not Job("virtio0-commit", "commit", "running", 0, 0).ours


@pytest.mark.parametrize("status", VERBS)
def test_only_commit_jobs_can_be_brought_to_a_proved_end(status: str) -> None:
    commit, stream = Job("j", "commit", status, 0, 0), Job("j", "stream", status, 0, 0)
    assert not {"follow", "pivot", "keep"} & set(stream.verbs)
    assert set(commit.verbs) - set(stream.verbs) <= {"follow", "pivot", "keep"}


def test_a_status_that_we_do_not_know_allows_nothing() -> None:
    assert Job("j", "commit", "a-new-one", 0, 0).verbs == []


# --- controlling a real job ------------------------------------------------------------------------------------------

ID = "qmpmerge-commit-vda"
SLOW = 1024
"""Bytes a second: after its first 512 KiB an intermediate merge sleeps for minutes. An active one would heed no limit here:
it has all of so small a disk under way before it looks."""


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Machine]:
    """A QEMU on ``base.raw <-- a.qcow2 <-- b.qcow2``, with more than a MiB of data in each layer."""
    images = make_chain(tmp_path, ["base.raw", "a.qcow2", "b.qcow2"])
    fill(images, Content())
    with machine(tmp_path, "-drive", f"file={images[-1]},format=qcow2,if=none,id=vda") as running:
        yield running


@pytest.fixture
async def session(vm: Machine) -> AsyncIterator[Monitor]:
    async with connect.connected(vm.target) as connected:
        yield connected


def begin(vm: Machine, job: str = ID, *, dismiss: bool = False) -> None:
    """Start to merge a.qcow2 into its base, slowly."""
    top = str(vm.folder / "a.qcow2")
    vm.session.execute("block-commit", job_id=job, device="vda", top=top, auto_dismiss=dismiss, speed=SLOW)


def depth(vm: Machine) -> int:
    """How many images the active one is built on."""
    (disk,) = vm.session.execute("query-block")
    assert disk["inserted"]["file"].endswith("b.qcow2")
    return int(disk["inserted"]["backing_file_depth"])


async def seen(session: Monitor, *statuses: str, job: str = ID) -> Job | None:
    """The job once it has one of the statuses, None once it is gone."""
    async with session.listening() as doorbell, asyncio.timeout(60):
        return await jobs.follow(session, doorbell, job, statuses, tell=lambda told: None)


async def test_a_job_is_told_as_qemu_tells_it(vm: Machine, session: Monitor) -> None:
    assert await jobs.query(session) == []
    begin(vm)
    job = await seen(session, "running")
    assert job is not None and job == replace(job, id=ID, type="commit", status="running", speed=SLOW)
    assert job.ours and not job.ready and job.reason is None and job.io_status == "ok"
    assert await jobs.look(session, "another") is None


async def test_a_job_can_be_paused_and_resumed(vm: Machine, session: Monitor) -> None:
    begin(vm)
    await seen(session, "running")
    assert await jobs.control(session, ID, "pause") is not None
    paused = await seen(session, "paused")
    assert paused is not None and "resume" in paused.verbs and "pause" not in paused.verbs
    assert await jobs.control(session, ID, "resume") is not None
    resumed = await seen(session, "running")
    assert resumed is not None and "pause" in resumed.verbs


async def test_the_speed_of_a_job_can_be_set_and_set_free(vm: Machine, session: Monitor) -> None:
    begin(vm)
    job = await jobs.control(session, ID, "speed", 123 * 1024)
    assert job is not None and job.speed == 123 * 1024
    job = await jobs.control(session, ID, "speed", 0)
    assert job is not None and job.speed == 0
    job = await seen(session, "concluded")
    assert job is not None and job.reason is None and depth(vm) == 1


async def test_a_cancelled_job_is_gone_when_control_returns_and_the_old_chain_is_in_use(
    vm: Machine, session: Monitor
) -> None:
    begin(vm)
    assert await jobs.control(session, ID, "cancel") is None
    assert vm.session.execute("query-jobs") == [] and depth(vm) == 2


async def test_a_paused_job_can_be_cancelled(vm: Machine, session: Monitor) -> None:
    begin(vm)
    await jobs.control(session, ID, "pause")
    await seen(session, "paused")
    assert await jobs.control(session, ID, "cancel") is None
    assert vm.session.execute("query-jobs") == []


async def test_a_ready_job_can_be_cancelled(vm: Machine, session: Monitor) -> None:
    vm.session.execute("block-commit", job_id=ID, device="vda", auto_dismiss=False)
    ready = await seen(session, "ready")
    assert ready is not None and ready.ready and {"pivot", "keep"} < set(ready.verbs)
    assert await jobs.control(session, ID, "cancel") is None
    assert vm.session.execute("query-jobs") == [] and depth(vm) == 2


async def test_cancel_does_not_mind_a_job_that_leaves_by_itself(vm: Machine, session: Monitor) -> None:
    begin(vm, job="theirs", dismiss=True)
    assert await jobs.control(session, "theirs", "cancel") is None


async def test_an_ended_job_can_be_dismissed(vm: Machine, session: Monitor) -> None:
    begin(vm)
    vm.session.execute("job-cancel", id=ID)
    ended = await seen(session, "concluded")
    assert ended is not None and ended.verbs == ["follow", "dismiss"]
    assert await jobs.control(session, ID, "dismiss") is None
    assert vm.session.execute("query-jobs") == []


@pytest.mark.parametrize("verb", ["resume", "dismiss", "pivot"])
async def test_a_verb_that_a_running_job_cannot_take_is_refused_with_those_it_can(
    vm: Machine, session: Monitor, verb: str
) -> None:
    begin(vm)
    await seen(session, "running")
    with pytest.raises(JobVerb) as error:
        await jobs.control(session, ID, verb)
    assert error.value.facts == {
        "job": ID,
        "verb": verb,
        "status": "running",
        "verbs": ["follow", "pause", "speed", "cancel"],
    }
    job = await jobs.look(session, ID)
    assert job is not None and job.status == "running"


async def test_a_verb_that_an_ended_job_cannot_take_is_refused(vm: Machine, session: Monitor) -> None:
    begin(vm)
    vm.session.execute("job-cancel", id=ID)
    await seen(session, "concluded")
    for verb in ("cancel", "pause", "speed"):
        with pytest.raises(JobVerb) as error:
            await jobs.control(session, ID, verb)
        assert error.value.verbs == ["follow", "dismiss"]


async def test_a_job_that_is_not_there_is_refused_with_those_that_are(vm: Machine, session: Monitor) -> None:
    with pytest.raises(NoSuchJob) as error:
        await jobs.control(session, "other", "cancel")
    assert error.value.facts == {"job": "other", "target": vm.target, "known": [], "is_disk": False}
    begin(vm)
    with pytest.raises(NoSuchJob) as error:
        await jobs.control(session, "other", "cancel")
    assert error.value.known == [ID]


async def test_what_qemu_refuses_is_told_with_its_words(vm: Machine, session: Monitor) -> None:
    begin(vm)
    with pytest.raises(QemuRefused) as error:
        await jobs.control(session, ID, "speed", -1)
    assert error.value.command == "block-job-set-speed" and "speed" in error.value.reason


async def test_dismissing_a_job_that_somebody_else_dismissed_is_fine(vm: Machine, session: Monitor) -> None:
    begin(vm)
    vm.session.execute("job-cancel", id=ID)
    await seen(session, "concluded")
    vm.session.execute("job-dismiss", id=ID)
    await jobs.dismiss(session, ID)


async def test_following_a_job_that_is_gone_says_that_it_is_gone(session: Monitor) -> None:
    assert await seen(session, "concluded", job="never-was") is None


async def test_following_tells_every_sighting_and_stops_waiting_when_asked_to(vm: Machine, session: Monitor) -> None:
    begin(vm)
    sightings: list[Job] = []
    async with session.listening() as doorbell:
        with pytest.raises(StillRunning) as error:
            await jobs.follow(session, doorbell, ID, ("ready",), tell=sightings.append, deadline=0.0)
    assert error.value.facts == {"target": vm.target, "job": ID, "option": ""}
    assert [job.id for job in sightings] == [ID]
    assert await jobs.look(session, ID) is not None
