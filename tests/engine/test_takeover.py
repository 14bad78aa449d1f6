"""
What an earlier qmpmerge has begun: taken over, read, proved, or told; and the note beside the base that says so.
"""

import json
from pathlib import Path

import pytest
from rig.disks import KINDS, Setup
from rig.machines import Content

import qmpmerge
from qmpmerge.engine.progress import Progress
from qmpmerge.errors import Busy, JobFailed, NoSuchLayer, StillRunning
from qmpmerge.journal import locks

JOB = "qmpmerge-commit-vda"


async def leave(setup: Setup, top: str) -> None:
    """Begin a merge that takes for ever, and go away."""
    async with setup.host() as host:
        with pytest.raises(StillRunning):
            patience = qmpmerge.Patience(detach=True)
            await qmpmerge.commit(host, setup.disk, top=top, speed=1, patience=patience)


async def commit(setup: Setup, top: str | None = None, **options: object) -> tuple[qmpmerge.Outcome, list[Progress]]:
    told: list[Progress] = []
    async with setup.host() as host:
        return await qmpmerge.commit(host, setup.disk, top=top, report=told.append, **options), told  # type: ignore[arg-type]


def notes(told: list[Progress]) -> list[str]:
    return [progress.note for progress in told if progress.note]


def beside(images: list[Path]) -> list[str]:
    return [file.name for file in images[0].parent.glob(".*qmpmerge*")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top", "verdict"), [("[3]", "merged"), ("[4]", "pivoted")])
async def test_the_same_command_goes_on_from_where_the_job_stands(
    kind: str, top: str, verdict: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    with KINDS[kind](tmp_path, images, content) as setup:
        await leave(setup, top)
        outcome, told = await commit(setup, top)
        assert outcome.verdict == verdict
        assert "at work on this already (begun 20" in notes(told)[0] and len(notes(told)) == 1
        assert told[0].status in ("created", "running", "ready")
        setup.check()
    assert beside(images) == []


async def test_the_same_merge_in_other_words_is_the_same_merge(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    outcome, _ = await commit(setup, str(images[2]), base=str(images[0]))
    assert outcome.verdict == "merged"


async def test_since_when_is_since_it_was_begun(setup: Setup, images: list[Path]) -> None:
    lock = images[0].parent / ".base.raw.qmpmerge-lock"
    await leave(setup, "[3]")
    begun = json.loads(lock.read_text())["since"]
    async with setup.host() as host:
        with pytest.raises(StillRunning):
            await qmpmerge.follow(host, JOB, patience=qmpmerge.Patience(detach=True))
    assert json.loads(lock.read_text())["since"] == begun


async def test_a_job_that_is_cancelled_by_its_verb_leaves_no_note(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    async with setup.host() as host:
        await qmpmerge.steer(host, JOB, "cancel")
    assert beside(images) == []


@pytest.mark.parametrize(("top", "base"), [("[3]", "[2]"), ("[4]", None), (None, None)])
async def test_another_range_is_busy_and_leaves_the_job_alone(setup: Setup, top: str | None, base: str | None) -> None:
    await leave(setup, "[3]")
    with pytest.raises(Busy) as busy:
        await commit(setup, top, base=base)
    assert f"{JOB} follow" in busy.value.hint
    (job,) = setup.machine.session.execute("query-block-jobs")
    assert (job["device"], job["speed"], job["paused"]) == (JOB, 1, False)


async def test_a_dry_run_only_says_that_the_disk_is_busy(setup: Setup) -> None:
    await leave(setup, "[3]")
    with pytest.raises(Busy):
        await commit(setup, "[3]", dry_run=True)


@pytest.mark.parametrize("top", ["[3]", None])
async def test_a_strangers_job_is_not_taken_over(setup: Setup, images: list[Path], top: str | None) -> None:
    options = {"top": str(images[2])} if top else {}
    setup.machine.session.execute("block-commit", job_id="theirs", device="vda", speed=1, auto_dismiss=False, **options)
    with pytest.raises(Busy):
        await commit(setup, top)
    assert len(setup.machine.session.execute("query-jobs")) == 1


async def test_a_paused_job_is_taken_over_and_said_to_wait(setup: Setup) -> None:
    await leave(setup, "[3]")
    setup.machine.session.execute("job-pause", id=JOB)
    told: list[Progress] = []
    async with setup.host() as host:
        with pytest.raises(StillRunning):
            await qmpmerge.commit(host, "vda", top="[3]", report=told.append, timeout=0.5)
    assert "it is paused, where it waits to be resumed" in notes(told)[0]
    assert setup.machine.session.execute("query-jobs")[0]["status"] == "paused"


# --- jobs that ended while nobody looked -------------------------------------------------------------------------------


async def test_a_job_that_failed_unseen_is_told_and_dismissed_and_the_merge_made(
    setup: Setup, images: list[Path]
) -> None:
    await leave(setup, "[3]")
    setup.machine.session.execute("job-cancel", id=JOB)
    outcome, told = await commit(setup, "[3]")
    assert outcome.verdict == "merged"
    assert "had failed (Operation canceled) while nobody looked (begun" in notes(told)[0]
    assert beside(images) == []


async def test_a_pivot_that_nobody_saw_is_proved(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[4]")
    end(setup, "job-complete")
    outcome, told = await commit(setup)
    assert (outcome.verdict, outcome.after.files) == ("pivoted", [str(images[0])])
    assert outcome.before.files == [str(image) for image in images]
    assert "had ended while nobody looked" in notes(told)[0]
    assert (await commit(setup))[0].verdict == "unchanged"
    assert beside(images) == []


async def test_a_merge_that_somebody_else_finalized_is_proved_and_made_durable(
    setup: Setup, images: list[Path], content: Content
) -> None:
    await leave(setup, "[3]")
    end(setup, "job-finalize")
    outcome, _ = await commit(setup, str(images[2]))
    assert (outcome.verdict, str(outcome.after)) == ("merged", "base.raw <-- c.qcow2")
    with pytest.raises(NoSuchLayer):
        await commit(setup, str(images[2]))
    setup.check()
    setup.off()
    content.check(images[3])


async def test_follow_proves_what_the_note_tells_too(setup: Setup) -> None:
    await leave(setup, "[3]")
    end(setup, "job-finalize")
    async with setup.host() as host:
        assert (await qmpmerge.follow(host, JOB)).verdict == "merged"
        assert not await host.jobs()


async def test_a_job_that_let_the_overlay_go_unseen_is_begun_again(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[4]")
    end(setup, "block-job-cancel")
    outcome, _ = await commit(setup, ending="keep")
    assert (outcome.verdict, len(outcome.after)) == ("kept", 4)


async def test_a_snapshot_does_not_mind_a_job_that_has_ended(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    setup.machine.session.execute("job-cancel", id=JOB)
    async with setup.host() as host:
        await qmpmerge.snapshot(host, {"vda": f"{images[0].parent}/new.qcow2"})
        assert not await host.jobs()


def end(setup: Setup, command: str) -> None:
    """Somebody else ends the job, or we did and died: it concludes, and nobody dismisses it."""
    session = setup.machine.session
    session.execute("block-job-set-speed", device=JOB, speed=0)
    wanted = "pending" if command == "job-finalize" else "ready"
    while session.execute("query-jobs")[0]["status"] != wanted:
        pass
    session.execute(command, **({"device": JOB} if command.startswith("block") else {"id": JOB}))
    while session.execute("query-jobs")[0]["status"] != "concluded":
        pass


# --- what is shown -----------------------------------------------------------------------------------------------------


async def test_disks_and_chain_show_the_job(setup: Setup) -> None:
    await leave(setup, "[3]")
    async with setup.host() as host:
        (disk,) = await host.disks()
        view = await host.chain()
    assert disk.job is not None and view.disk.job is not None
    assert (disk.job.id, view.disk.job.status) == (JOB, "running")


# --- the note ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "note", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema": 1}', b'{"schema": 1, "images": 7}', b"[" * 100_000, b"null"]
)
async def test_a_note_that_makes_no_sense_is_none(setup: Setup, images: list[Path], note: bytes) -> None:
    await leave(setup, "[3]")
    (images[0].parent / ".base.raw.qmpmerge-lock").write_bytes(note)
    outcome, told = await commit(setup, "[3]")
    assert outcome.verdict == "merged" and "begun" not in notes(told)[0]


@pytest.mark.parametrize("change", [{"base": 9}, {"top": 1}, {"job": "theirs"}, {"images": []}, {"since": "soon"}])
async def test_a_note_that_was_tampered_with_proves_nothing(
    setup: Setup, images: list[Path], change: dict[str, object]
) -> None:
    await leave(setup, "[4]")
    end(setup, "job-complete")
    lock = images[0].parent / ".base.raw.qmpmerge-lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), **change}))
    (images[0].parent / ".c.qcow2.qmpmerge-witness").unlink()  # which would tell by itself
    assert (await commit(setup))[0].verdict == "unchanged"


async def test_a_refusal_leaves_the_note_to_who_comes_next(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    before = (images[0].parent / ".base.raw.qmpmerge-lock").read_bytes()
    with pytest.raises(Busy):
        await commit(setup)
    assert (images[0].parent / ".base.raw.qmpmerge-lock").read_bytes() == before


def test_a_note_is_read_by_who_comes_next(tmp_path: Path) -> None:
    base = qmpmerge.Image(str(tmp_path / "base.raw"), "raw", 0)
    with locks.held(base) as lock:
        lock.note({"a": "long note " * 100})
        lock.note({"a": 1})
    assert locks.noted(base) == {"a": 1}
    with locks.held(base):
        pass
    assert locks.noted(base) == {"a": 1}
    with locks.held(base) as lock:
        lock.clear()
    assert locks.noted(base) is None and list(tmp_path.iterdir()) == []


async def test_an_error_that_is_dismissed_by_hand_is_not_forgotten(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    lock = images[0].parent / ".base.raw.qmpmerge-lock"
    setup.machine.session.execute("job-cancel", id=JOB)
    async with setup.host() as host:
        with pytest.raises(JobFailed, match="canceled"):
            await qmpmerge.follow(host, JOB)
    assert json.loads(lock.read_text())["suspect"] is None  # a cancelled job says nothing about the storage
