"""
What an earlier qmpmerge has begun: taken over, read, proved, or told; and the note beside the base that says so.
"""

import errno
import os
import shlex
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from rig.disks import KINDS, Setup
from rig.folder import litter
from rig.machines import Content

import qmpmerge
from qmpmerge.chain.outcome import Policy
from qmpmerge.chain.plan import Plan
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.engine.pace.progress import Progress
from qmpmerge.errors import Busy, CannotRecord, JobFailed, NoSuchLayer, Overtaken, RecordNotBelieved, StillRunning
from qmpmerge.folder import Folder
from qmpmerge.journal import locks, store
from qmpmerge.journal.encoding import SCHEMA
from qmpmerge.journal.locks import Note
from qmpmerge.journal.record import Record
from qmpmerge.qemu import jobs

JOB = "qmpmerge-commit-vda"


async def leave(setup: Setup, top: str, **options: Any) -> None:
    """Begin a merge that takes for ever, and go away."""
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            patience = qmpmerge.Patience(detach=True)
            await qmpmerge.commit(target, setup.disk, top=top, speed=1, patience=patience, **options)


async def commit(setup: Setup, top: str | None = None, **options: Any) -> tuple[qmpmerge.Outcome, list[Progress]]:
    """The same command again, without the limit that would have it take for ever."""
    told: list[Progress] = []
    async with setup.target() as target:
        return await qmpmerge.commit(target, setup.disk, top=top, speed=0, report=told.append, **options), told


def notes(told: list[Progress]) -> list[str]:
    return [progress.note for progress in told if progress.note]


def beside(images: list[Path]) -> list[str]:
    return [name for name in litter(images[0].parent) if "qmpmerge" in name]


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


@pytest.mark.parametrize(("asked", "limit"), [(None, 4096), (0, 0), (2048, 2048)])
async def test_a_limit_that_somebody_has_set_stays_unless_another_is_asked_for(
    setup: Setup, asked: int | None, limit: int
) -> None:
    await leave(setup, "[3]")
    told: list[Progress] = []
    async with setup.target() as target:
        await qmpmerge.control(target, JOB, "speed", speed=4096)
        again = qmpmerge.commit(
            target, "vda", top="[3]", speed=asked, patience=Patience(detach=True), report=told.append
        )
        with pytest.raises(StillRunning):
            await again
    running = setup.machine.session.execute("query-block-jobs")
    assert [job["speed"] for job in running] == [limit] or limit == 0  # without one it may have ended already
    assert ("limited to 4096 bytes a second" in notes(told)[0]) == (asked is None)


async def test_the_same_merge_in_other_words_is_the_same_merge(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    outcome, _ = await commit(setup, str(images[2]), base=str(images[0]))
    assert outcome.verdict == "merged"


async def test_since_when_is_since_it_was_begun(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    begun = since(images)
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            await qmpmerge.follow(target, JOB, patience=qmpmerge.Patience(detach=True))
    assert since(images) == begun


def since(images: list[Path]) -> float:
    record = store.beside(str(images[3]))
    assert isinstance(record, Record)
    return record.since


async def test_a_job_that_is_cancelled_by_its_verb_leaves_no_note(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    async with setup.target() as target:
        await qmpmerge.control(target, JOB, "cancel")
    assert beside(images) == []


@pytest.mark.parametrize(("top", "base"), [("[3]", "[2]"), ("[4]", None), (None, None)])
async def test_another_range_is_busy_and_leaves_the_job_alone(setup: Setup, top: str | None, base: str | None) -> None:
    await leave(setup, "[3]")
    with pytest.raises(Busy) as busy:
        await commit(setup, top, base=base)
    assert f"{JOB} cancel" in busy.value.hint and "follow" in busy.value.hint
    (job,) = setup.machine.session.execute("query-block-jobs")
    assert (job["device"], job["speed"], job["paused"]) == (JOB, 1, False)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
async def test_a_record_that_cannot_be_taken_over_leaves_the_job(
    code: int, setup: Setup, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the pivot would be made under one that says that it was never asked for."""

    def refuse(place: Folder, name: str, data: bytes) -> None:
        raise OSError(code, os.strerror(code))

    await leave(setup, "[4]")
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", refuse)
        with pytest.raises(CannotRecord, match=os.strerror(code)):
            await commit(setup)
    assert [job["id"] for job in setup.machine.session.execute("query-jobs")] == [JOB]
    (record,) = store.in_folder(str(images[0].parent))
    assert isinstance(record, Record) and record.job == JOB
    assert (await commit(setup))[0].verdict == "pivoted"


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
    setup.machine.wait_for_job("paused")
    told: list[Progress] = []
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            await qmpmerge.commit(target, "vda", top="[3]", report=told.append, patience=Patience(detach=True))
    assert "it is paused, where it waits to be resumed" in notes(told)[0]
    assert setup.machine.session.execute("query-jobs")[0]["status"] == "paused"


# --- jobs that ended while nobody looked -------------------------------------------------------------------------------


async def test_a_job_that_failed_unseen_is_told_and_dismissed_and_the_merge_made(
    setup: Setup, images: list[Path]
) -> None:
    await leave(setup, "[3]")
    setup.machine.session.execute("job-cancel", id=JOB)
    setup.machine.wait_for_job("concluded")
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


@pytest.mark.parametrize("top", ["vda[3]", "-2", "b.qcow2"])
async def test_whatever_words_the_same_merge_was_asked_for_in_it_is_not_made_of_what_is_left(
    setup: Setup, top: str
) -> None:
    """What index 3 is once the merge is done, is not there, or would be the active image."""
    await leave(setup, top)
    end(setup, "job-finalize")
    outcome, told = await commit(setup, top)
    assert (outcome.verdict, str(outcome.after)) == ("merged", "base.raw <-- c.qcow2")
    assert "had ended while nobody looked" in notes(told)[0]


async def test_follow_proves_what_the_note_tells_too(setup: Setup) -> None:
    await leave(setup, "[3]")
    end(setup, "job-finalize")
    async with setup.target() as target:
        assert (await qmpmerge.follow(target, JOB)).verdict == "merged"
        assert not await target.jobs()


@pytest.mark.parametrize(("policy", "asked", "then"), [("keep", None, "keep"), ("keep", "stash", "stash")])
async def test_what_becomes_of_the_files_is_as_it_was_asked_for_at_first(
    setup: Setup, policy: Policy, asked: Policy | None, then: str
) -> None:
    await leave(setup, "[3]", merged_files=policy)
    async with setup.target() as target:
        job = await target.job(JOB)
        await jobs.set_speed(target.monitor, job, 0)
        outcome = await qmpmerge.follow(target, JOB, merged_files=asked)
    assert {file.action for file in outcome.merged} == {then}


async def test_a_job_that_another_has_ended_meanwhile_is_not_gone_on_with(
    setup: Setup, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record goes with the merge; what was read of it before we had the lock is not believed any more."""
    await leave(setup, "[3]")
    taken = locks.taken_for

    def late(plan: Plan) -> AbstractContextManager[locks.Lock]:
        os.remove(store.path_of(str(images[3])))
        return taken(plan)

    monkeypatch.setattr(locks, "taken_for", late)
    async with setup.target() as target:
        with pytest.raises(Overtaken):
            await qmpmerge.follow(target, JOB)
        assert (await target.job(JOB)).status == "running"


async def test_a_job_that_let_the_overlay_go_unseen_is_begun_again(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[4]")
    end(setup, "block-job-cancel")
    outcome, _ = await commit(setup, ending="keep")
    assert (outcome.verdict, len(outcome.after)) == ("kept", 4)


async def test_a_snapshot_does_not_mind_a_job_that_has_ended(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    setup.machine.session.execute("job-cancel", id=JOB)
    setup.machine.wait_for_job("concluded")
    async with setup.target() as target:
        await qmpmerge.snapshot(target, {"vda": f"{images[0].parent}/new.qcow2"})
        assert not await target.jobs()


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
    async with setup.target() as target:
        (disk,) = await target.disks()
        view = await target.chain()
    assert disk.job is not None and view.disk.job is not None
    assert (disk.job.id, view.disk.job.status) == (JOB, "running")


# --- the lock's note, and the record ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "note", [b"{", b"[]", b"\xff\xfe", b'{"record": 1, "suspect": null}', b'{"record": null}', b"[" * 100_000, b"null"]
)
async def test_after_a_note_that_makes_no_sense_base_is_compared(setup: Setup, images: list[Path], note: bytes) -> None:
    """It may have said just that."""
    await leave(setup, "[3]")
    (images[0].parent / ".base.raw.qmpmerge-lock").write_bytes(note)
    outcome, _ = await commit(setup, "[3]", verify=False)
    assert outcome.verdict == "merged" and outcome.verified
    assert beside(images) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.write_bytes(record.read_bytes()[:300]),
        lambda record: record.write_bytes(b"garbage"),
        lambda record: record.write_bytes(b""),
        lambda record: record.write_bytes(record.read_bytes().replace(b'"schema": %d' % SCHEMA, b'"schema": 1')),
        lambda record: os.truncate(record, store.LARGEST + 1),
        lambda record: os.chown(record, 12345, -1),
    ],
    ids=["cut", "garbage", "empty", "schema", "large", "owner"],
)
async def test_a_record_that_is_not_believed_is_unknown_and_not_nothing(
    setup: Setup, images: list[Path], spoil: Callable[[Path], object], content: Content
) -> None:
    """After a pivot that nobody has proved: 0.1 called the merge unchanged, finished or clean, and let it be."""
    await leave(setup, "[4]")
    end(setup, "job-complete")
    record = images[0].parent / ".c.qcow2.qmpmerge-record"
    spoil(record)
    os.rename(images[3], f"{images[3]}.merged")
    with pytest.raises(RecordNotBelieved) as refused:
        await commit(setup)
    with pytest.raises(RecordNotBelieved):
        await commit(setup, dry_run=True)
    for path in (images[3], images[0].parent):
        with pytest.raises(RecordNotBelieved):
            await qmpmerge.recover(path)
    assert refused.value.path == str(record)
    (cleaned,) = await qmpmerge.clean([f"{images[3]}.merged"])
    assert "is not believed" in (cleaned.obstacle or "")
    async with setup.target() as target:
        assert "record-not-believed" in [odd.name for odd in (await target.chain()).oddities]
        with pytest.raises(RecordNotBelieved):
            await qmpmerge.snapshot(target, {setup.disk: str(images[0].parent / "new.qcow2")})
    assert record.exists() and Path(f"{images[3]}.merged").exists()
    assert subprocess.run(shlex.split(refused.value.hint.rpartition("`")[0].rpartition("`")[2])).returncode == 0
    assert (await commit(setup))[0].verdict == "unchanged"
    setup.check()


async def test_a_refusal_leaves_the_note_to_who_comes_next(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    before = (images[0].parent / ".base.raw.qmpmerge-lock").read_bytes()
    with pytest.raises(Busy):
        await commit(setup)
    assert (images[0].parent / ".base.raw.qmpmerge-lock").read_bytes() == before


async def test_an_error_that_is_dismissed_by_hand_is_not_forgotten(setup: Setup, images: list[Path]) -> None:
    await leave(setup, "[3]")
    lock = images[0].parent / ".base.raw.qmpmerge-lock"
    setup.machine.session.execute("job-cancel", id=JOB)
    setup.machine.wait_for_job("concluded")
    async with setup.target() as target:
        with pytest.raises(JobFailed, match="canceled"):
            await qmpmerge.follow(target, JOB)
    assert locks.read(str(lock)) == Note(
        store.path_of(str(images[3]))
    )  # a cancelled job says nothing about the storage
