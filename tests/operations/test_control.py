"""
Every verb in every state of a block job, on a real QEMU: done where it is legal, else refused with what is.

How a job is held in its state:

    running     a limit of 1 KiB a second: QEMU copies a first piece, then sleeps
    paused      paused by hand
    ready       an active commit that nobody ends
    standby     the same, paused
    pending     `auto-finalize` off
    waiting     a grouped transaction whose other job is slow
    concluded   `auto-dismiss` off
    null        the job is gone

``created`` and ``aborting`` last for as long as QEMU's main loop is busy with them, so nobody outside can ask meanwhile:
that they come and go is pinned by their events.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig.disks import device
from rig.machines import Content, Machine, fill, machine, make_chain, run
from rig.wire import heard

import qmpmerge
from qmpmerge.chain.outcome import Outcome
from qmpmerge.errors import Busy, JobVerb, NoSuchJob, NotProven, QemuRefused, StillRunning
from qmpmerge.operations.control import VERBS, Verb
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job

ID = "qmpmerge-commit-vda"
SLOW = 1024


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Machine]:
    """``base.raw <-- a.qcow2 <-- b.qcow2`` under a drive."""
    images = make_chain(tmp_path, ["base.raw", "a.qcow2", "b.qcow2"])
    fill(images, Content())
    with machine(tmp_path, "-drive", f"file={images[-1]},if=none,id=vda", *device("vda")) as running:
        yield running


def intermediate(vm: Machine, **options: object) -> None:
    top = str(vm.folder / "a.qcow2")
    options = {"backing_file": "base.raw", "auto_dismiss": False, "auto_finalize": False, **options}
    vm.session.execute("block-commit", job_id=ID, device="vda", top=top, **options)


def active(vm: Machine) -> None:
    vm.session.execute("block-commit", job_id=ID, device="vda", auto_dismiss=False)


def running(vm: Machine) -> None:
    intermediate(vm, speed=SLOW)
    vm.wait_for_job("running")


def paused(vm: Machine) -> None:
    running(vm)
    vm.session.execute("job-pause", id=ID)
    vm.wait_for_job("paused")


def ready(vm: Machine) -> None:
    active(vm)
    vm.wait_for_job("ready")


def standby(vm: Machine) -> None:
    ready(vm)
    vm.session.execute("job-pause", id=ID)
    vm.wait_for_job("standby")


def pending(vm: Machine) -> None:
    intermediate(vm)
    vm.wait_for_job("pending")


def concluded(vm: Machine) -> None:
    running(vm)
    vm.session.execute("job-cancel", id=ID)
    while vm.session.execute("query-jobs")[0]["status"] != "concluded":
        pass


def null(vm: Machine) -> None:
    concluded(vm)
    vm.session.execute("job-dismiss", id=ID)


STATES = {
    "running": running,
    "paused": paused,
    "ready": ready,
    "standby": standby,
    "pending": pending,
    "concluded": concluded,
}
OF_QEMU = {"job-cancel", "job-pause", "job-resume", "job-finalize", "job-dismiss"}
LEGAL = {
    "running": {"follow", "cancel", "pause", "speed"},
    "paused": {"follow", "cancel", "resume", "speed"},
    "ready": {"follow", "pivot", "keep", "cancel", "pause", "speed"},
    "standby": {"follow", "cancel", "resume", "speed"},
    "pending": {"follow", "cancel", "finalize"},
    "concluded": {"follow", "dismiss"},
}


async def control(vm: Machine, verb: Verb) -> Outcome | Job | None:
    async with qmpmerge.live(vm.target) as target:
        return await qmpmerge.control(target, ID, verb, speed=SLOW * 2)


@pytest.mark.parametrize("state", STATES)
async def test_what_a_state_does_not_allow_is_refused_with_what_it_does(vm: Machine, state: str) -> None:
    STATES[state](vm)
    for verb in VERBS:
        if verb in LEGAL[state]:
            continue
        with pytest.raises(JobVerb) as refused:
            await control(vm, verb)
        assert state in str(refused.value) and set(refused.value.verbs) == LEGAL[state]
        if f"job-{verb}" in OF_QEMU:
            assert "error" in vm.session.ask(f"job-{verb}", id=ID), "QEMU would refuse it too"
        (job,) = vm.session.execute("query-jobs")
        assert job["status"] == state, verb


@pytest.mark.parametrize(
    ("state", "verb", "then"),
    [
        ("running", "pause", "paused"),
        ("running", "speed", "running"),
        ("paused", "resume", "running"),
        ("paused", "speed", "paused"),
        ("ready", "pause", "standby"),
        ("ready", "speed", "ready"),
        ("standby", "resume", "ready"),
        ("standby", "speed", "standby"),
    ],
)
async def test_a_job_is_controlled(vm: Machine, state: str, verb: Verb, then: str) -> None:
    STATES[state](vm)
    job = await control(vm, verb)
    assert isinstance(job, Job)
    vm.wait_for_job(then)
    if verb == "speed":
        assert job.speed == SLOW * 2


@pytest.mark.parametrize("state", ["running", "paused", "ready", "standby", "pending"])
async def test_a_job_can_be_cancelled_in_every_state(vm: Machine, state: str) -> None:
    STATES[state](vm)
    assert await control(vm, "cancel") is None
    assert vm.session.execute("query-jobs") == []
    async with qmpmerge.live(vm.target) as target:
        assert str((await target.chain()).chain) == "base.raw <-- a.qcow2 <-- b.qcow2"


@pytest.mark.parametrize("verb", ["finalize", "follow"])
async def test_a_pending_merge_is_flushed_and_compared_before_it_is_finalized(vm: Machine, verb: Verb) -> None:
    """A plain `job-finalize` would rewrite the header before base is durable."""
    pending(vm)
    said: list[str] = []
    async with heard(lambda direction, text: said.append(text)), qmpmerge.live(vm.target) as target:
        outcome = await qmpmerge.control(target, ID, verb)
    assert isinstance(outcome, Outcome)
    assert (outcome.verdict, outcome.verified) == ("merged", True)
    commands = [json.loads(text)["execute"] for text in said if text.startswith('{"execute"')]
    assert commands.index("blockdev-reopen") < commands.index("job-finalize")


@pytest.mark.parametrize(("verb", "verdict"), [("pivot", "pivoted"), ("keep", "kept"), ("follow", "pivoted")])
async def test_a_ready_merge_is_ended_and_its_outcome_told_from_the_graph(
    vm: Machine, verb: Verb, verdict: str
) -> None:
    """QEMU reports a kept overlay exactly like a pivot: completed, without an error."""
    ready(vm)
    outcome = await control(vm, verb)
    assert isinstance(outcome, Outcome)
    assert outcome.verdict == verdict
    (disk,) = vm.session.execute("query-block")
    assert disk["inserted"]["file"].endswith("b.qcow2" if verb == "keep" else "base.raw")


async def test_a_verb_that_waits_for_the_end_waits_no_longer_than_it_may(vm: Machine) -> None:
    running(vm)
    async with qmpmerge.live(vm.target, force=["libvirt"]) as target:
        with pytest.raises(StillRunning):
            await qmpmerge.control(target, ID, "follow", timeout=0.5)
        assert [job.id for job in await target.jobs()] == [ID]


async def test_a_job_that_is_gone_takes_no_verb(vm: Machine) -> None:
    null(vm)
    for verb in VERBS:
        with pytest.raises(NoSuchJob):
            await control(vm, verb)


async def test_a_job_that_waits_for_another_can_be_cancelled_and_nothing_else(vm: Machine) -> None:
    """Jobs of other people may be grouped: the one that is done waits for the others."""
    for name, form in (("quick", "qcow2"), ("slow", "qcow2"), ("empty", "raw")):
        file = str(vm.folder / name)
        run("qemu-img", "create", "-qf", form, file, "8M")
        storage = {"driver": "file", "filename": file}
        vm.session.execute("blockdev-add", driver=form, node_name=name, file=storage)
    (disk,) = vm.session.execute("query-block")
    sources = {"quick": "empty", "slow": disk["inserted"]["node-name"]}
    actions = [
        {
            "type": "blockdev-backup",
            "data": {"job-id": name, "device": source, "target": name, "sync": "full", "speed": 0 if name == "quick" else SLOW},
        }
        for name, source in sources.items()
    ]  # fmt: skip
    vm.session.execute("transaction", actions=actions, properties={"completion-mode": "grouped"})
    status = ""
    while status != "waiting":
        status = next(job["status"] for job in vm.session.execute("query-jobs") if job["id"] == "quick")
    async with qmpmerge.live(vm.target) as target:
        for verb in set(VERBS) - {"cancel"}:
            with pytest.raises(JobVerb) as refused:
                await qmpmerge.control(target, "quick", verb)
            assert refused.value.verbs == ["cancel"]
        assert await qmpmerge.control(target, "quick", "cancel") is None


def test_the_states_that_cannot_be_held_come_and_go(vm: Machine) -> None:
    concluded(vm)
    statuses = [event["data"]["status"] for event in vm.session.events if event["event"] == "JOB_STATUS_CHANGE"]
    assert statuses[:2] == ["created", "running"] and statuses[-2:] == ["aborting", "concluded"]
    assert set(jobs.VERBS) == set(statuses) | {*STATES, "waiting", "null"}


# --- a stream of somebody else's ---------------------------------------------------------------------------------------


async def test_a_stream_of_somebody_else_ends_without_a_moment_in_which_qemu_would_crash(vm: Machine) -> None:
    """A hint names what its state allows; finalized it is dismissed too: before that QEMU 7.2 and 10.0 cannot be asked."""
    held = {"auto_finalize": False, "auto_dismiss": False}
    vm.session.execute("block-stream", job_id="mine", device="vda", **held)
    vm.wait_for_job("pending")
    (found,) = [one for one in await qmpmerge.examine(vm.target) if one.where == "mine"]
    assert found.fix == f"qmpmerge job {vm.target} mine finalize"
    async with qmpmerge.live(vm.target) as target:
        with pytest.raises(Busy) as busy:
            await qmpmerge.pull(target)
        assert (
            "mine cancel" in busy.value.hint and "mine finalize" in busy.value.hint and "follow" not in busy.value.hint
        )
        assert await qmpmerge.control(target, "mine", "finalize") is None
        assert vm.session.execute("query-jobs") == []
        assert (await target.chain("vda")).chain.files == [str(vm.folder / "b.qcow2")]


async def test_a_stream_whose_last_step_fails_is_not_proven(vm: Machine) -> None:
    held = {
        "auto_finalize": False,
        "auto_dismiss": False,
        "base": str(vm.folder / "base.raw"),
        "backing_file": "x" * 1100,
    }
    vm.session.execute("block-stream", job_id="mine", device="vda", **held)
    vm.wait_for_job("pending")
    async with qmpmerge.live(vm.target) as target:
        with pytest.raises(NotProven, match="Invalid argument|too"):
            await qmpmerge.control(target, "mine", "finalize")
        assert vm.session.execute("query-jobs") == []


# --- what QEMU would rather not be asked any more ----------------------------------------------------------------------


async def test_no_command_that_this_qemu_calls_deprecated_is_sent(tmp_path: Path, vm: Machine) -> None:
    """By its schema, and not by its version: with every verb, and a whole merge of each kind."""
    said: list[str] = []
    async with heard(lambda direction, text: said.append(text)), qmpmerge.live(vm.target) as target:
        await qmpmerge.commit(target, top="[2]", ending="pivot")
        await qmpmerge.commit(target, ending="hold")
        for verb in ("pause", "resume", "speed", "keep"):
            await qmpmerge.control(target, ID, verb, speed=SLOW)
            if verb != "keep":
                vm.wait_for_job("standby" if verb == "pause" else "ready")
        await qmpmerge.commit(target)
    sent = {json.loads(text)["execute"] for text in said if text.startswith('{"execute"')}
    schema: Any = vm.session.execute("query-qmp-schema")
    known = {entry["name"]: entry for entry in schema if entry["meta-type"] == "command"}
    assert {"job-complete", "job-pause", "block-job-cancel", "block-job-set-speed"} < sent <= set(known)
    assert [name for name in sent if "deprecated" in known[name].get("features", [])] == []


@pytest.mark.parametrize("speed", [1, 2**40, 2**63 - 1])
async def test_any_speed_that_qemu_takes_can_be_set(vm: Machine, speed: int) -> None:
    running(vm)
    async with qmpmerge.live(vm.target) as target:
        job = await qmpmerge.control(target, ID, "speed", speed=speed)
        assert job is None or (isinstance(job, Job) and job.speed == speed)


async def test_a_speed_that_qemu_does_not_take_is_refused_and_the_old_one_stays(vm: Machine) -> None:
    running(vm)
    async with qmpmerge.live(vm.target) as target:
        for speed in (2**63, 2**70):
            with pytest.raises(QemuRefused, match="speed"):
                await qmpmerge.control(target, ID, "speed", speed=speed)
            (job,) = await target.jobs()
            assert (job.speed, job.status) == (SLOW, "running")
