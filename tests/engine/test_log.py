"""What the library tells the logger `qmpmerge`: each step, and nothing while the guest stands still."""

import logging
import subprocess
import sys
import time

import pytest
from rig.command import JOB
from rig.disks import Setup

import qmpmerge
from qmpmerge.engine.log import held, log
from qmpmerge.errors import JobFailed


async def test_each_step_of_a_merge_is_logged(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qmpmerge")
    async with setup.target() as target:
        await qmpmerge.commit(target, top="[3]")
    a, b = (f"{setup.machine.folder}/{name}.qcow2" for name in "ab")
    base, c = f"{setup.machine.folder}/base.raw", f"{setup.machine.folder}/c.qcow2"
    steps = (
        f"{setup.machine.folder}/.c.qcow2.qmpmerge-record says what is begun",
        "planned to copying",
        f"started: {b} into {base}",
        "what is begun is recorded durably",
        f"{base} is durable",
        f"{base} shows what {b} shows",
        "copying to safe",
        "safe to switching",
        "pending, told to end",
        f"the header of {c} is durable",
        "graph and headers show base.raw <-- c.qcow2",
        "switching to switched",
        "switched to proved",
        f"{a}: stash, now {a}.merged",
        f"{b}: stash, now {b}.merged",
        "proved to done",
    )
    assert [record.getMessage() for record in caplog.records if record.name == "qmpmerge"] == [
        "vda: nothing speaks against base.raw <-- c.qcow2",
        *(f"{JOB}: {step}" for step in steps),
    ]


async def test_a_failure_is_logged_to_its_end(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qmpmerge")

    def cancel(progress: qmpmerge.Progress) -> None:
        setup.machine.session.ask("job-cancel", id=JOB)

    async with setup.target() as target:
        with pytest.raises(JobFailed):
            await qmpmerge.commit(target, top="[3]", speed=1, report=cancel)
    assert caplog.messages[-1] == f"{JOB}: copying to undone"


async def test_a_handler_is_not_waited_for_while_the_guest_is_paused(setup: Setup) -> None:
    """It may write to a disk that is full, or ask somebody."""
    told: list[tuple[str, bool]] = []

    class Asking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append((record.getMessage(), setup.machine.session.execute("query-status")["running"]))

    setup.machine.session.execute("cont")
    handler, level = Asking(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        async with setup.target() as target:
            outcome = await qmpmerge.commit(target)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert outcome.paused_seconds is not None
    steps = [text.removeprefix(f"{JOB}: ") for text, _ in told]
    paused = steps.index("the guest is paused")
    runs = next(number for number, step in enumerate(steps) if step.startswith("the guest runs again, after"))
    assert "safe to switching" in steps[paused:runs]  # it was logged
    assert all(running for _, running in told)


def test_a_line_that_is_held_keeps_its_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qmpmerge")
    with held():
        log.info("first")
        with held():
            log.info("second")
        logged = time.time()
        assert not caplog.records
    first, second = caplog.records
    assert (first.getMessage(), second.getMessage()) == ("first", "second")
    assert first.created <= second.created <= logged


def test_nothing_is_printed_unless_somebody_wants_it() -> None:
    program = "from qmpmerge.engine.log import log; log.warning('to be seen by nobody')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("raised", [TimeoutError("mine"), ValueError("mine")])
async def test_a_handler_that_raises_ends_no_merge(
    raised: Exception, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    class Raising(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise raised

    setup.machine.session.execute("cont")
    handler, level = Raising(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        async with setup.target() as target:
            outcome = await qmpmerge.commit(target)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert outcome.verdict == "pivoted"
    assert str(raised) in capsys.readouterr().err


async def test_a_time_limit_of_the_callers_own_is_none_of_ours(setup: Setup) -> None:
    """Said to be still running, it would say so of a job that may have ended."""

    def report(progress: qmpmerge.Progress) -> None:
        raise TimeoutError("mine")

    async with setup.target() as target:
        with pytest.raises(TimeoutError, match="mine"):
            await qmpmerge.commit(target, top="[3]", speed=1, report=report)
