"""Which image is right after a crash, and what `recover` does about it: one test for each state that a merge can be left in."""

import contextlib
import errno
import json
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from rig import advice
from rig.command import Begun, invoke
from rig.disks import KINDS, drive
from rig.folder import live, names
from rig.left import chain_of, record
from rig.machines import MIB, Content, fill, make_chain, run
from rig.nobody import as_nobody, public

import qmpmerge
from qmpmerge.chain.outcome import Policy
from qmpmerge.chain.plan import Plan
from qmpmerge.chain.state import State
from qmpmerge.cli.commands import group
from qmpmerge.engine import blockjob, resume
from qmpmerge.engine.resume import Recovery
from qmpmerge.errors import (
    CannotRecover,
    InUse,
    Locked,
    NothingThere,
    NotSeen,
    Overtaken,
    SessionLost,
    Stashed,
    StillRunning,
    Undecided,
    Unfinished,
)
from qmpmerge.folder import Folder
from qmpmerge.images import files, stashed
from qmpmerge.journal import locks, merged_files, store
from qmpmerge.journal.locks import Lock
from qmpmerge.journal.record import Record
from qmpmerge.qemu import jobs
from qmpmerge.targets.target import unfinished

BASE, C = "base.raw", "c.qcow2"
STASHED = [f"{name}.qcow2.merged" for name in "abc"]


class Template:
    """A chain of four with data in each, and what its upper two show."""

    def __init__(self, folder: Path) -> None:
        self.images, content = make_chain(folder), Content()
        fill(self.images[:3], content)
        self.views = {3: content.copy()}
        fill(self.images[3:], content)
        self.views[4] = content


class Left:
    """A folder of a chain of four, as a merge has left it."""

    def __init__(self, folder: Path, template: "Template") -> None:
        self.folder, self.template, self.content = folder, template, template.views[4].copy()
        self.images = [Path(shutil.copy(image, folder)) for image in template.images]

    def merge(self, top: str = "[4]", policy: Policy = "stash") -> Record:
        """A record of somebody who is dead by now; base holds all data, and nothing was switched."""
        chain = chain_of(self.images)
        last = chain.index(chain.find(top))
        self.commit_data(last)
        told = record(self.images, last, policy=policy)
        return store.write(told)

    def commit_data(self, top: int) -> None:
        """What the job does: base shows what the image at `top` shows, the images above are as they were."""
        with open(self.images[0], "r+b") as base:
            base.write(self.template.views[top].data)

    def switching(self, told: Record) -> Record:
        seen = {index: files.seen(str(self.images[index - 1])) for index in (told.base, told.top)}
        return store.mark(replace(told, state=State.SWITCHING, seen=seen))

    def away(self, told: Record) -> Record:
        told = self.switching(told)
        merged_files.take_away(told, told.top)
        return told

    def header(self) -> None:
        """The overlay's header names base."""
        run("qemu-img", "rebase", "-u", "-b", BASE, "-F", "raw", self.images[3])

    def write(self, image: str, pattern: int) -> None:
        """A guest that has this image writes."""
        form = "raw" if image == BASE else "qcow2"
        run("qemu-io", "-f", form, "-c", self.content.put(pattern, 2 * MIB, 4096), self.folder / image)

    def unchecked(self, image: str) -> None:
        """Write into an image that is not the right one."""
        before = self.content.copy()
        self.write(image, 0x99)
        self.content.take(before)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def left(tmp_path: Path, template: Template) -> Left:
    return Left(tmp_path, template)


def copying(left: Left) -> None:
    left.merge()


def ready(left: Left) -> None:
    store.mark(replace(left.merge(), was_left_ready=True))


def name_still_there(left: Left) -> None:
    left.switching(left.merge())
    left.write(C, 1)


def equal(left: Left) -> None:
    left.away(left.merge())


def guest_wrote_to_base(left: Left) -> None:
    left.away(left.merge())
    left.write(BASE, 2)


def guest_wrote_to_top(left: Left) -> None:
    left.away(left.merge())
    with moved(left, STASHED[2], C):
        left.write(C, 3)


def switched(left: Left) -> None:
    store.mark(replace(left.away(left.merge()), state=State.SWITCHED))
    left.write(BASE, 4)


def proved_in_part(left: Left) -> None:
    told = store.mark(replace(left.away(left.merge()), state=State.PROVED))
    merged_files.take_away(told, 3)
    left.write(BASE, 5)


def header_old(left: Left) -> None:
    left.switching(left.merge("[3]"))


def header_new(left: Left) -> None:
    left.switching(left.merge("[3]"))
    left.header()


def header_new_too_early_but_equal(left: Left) -> None:
    left.merge("[3]")
    left.header()


def header_new_too_early(left: Left) -> None:
    """QEMU died between the header and base's tables: what base shows is not all."""
    left.merge("[3]")
    left.header()
    with open(left.images[0], "r+b") as base:
        base.seek(MIB)
        base.write(bytes(MIB))


@contextlib.contextmanager
def moved(left: Left, old: str, new: str) -> Any:
    (left.folder / old).rename(left.folder / new)
    yield
    (left.folder / new).rename(left.folder / old)


STATES: dict[Callable[[Left], None], tuple[str, list[str]]] = {
    copying: (C, ["a.qcow2", "b.qcow2", BASE, C]),
    ready: (C, ["a.qcow2", "b.qcow2", BASE, C]),
    name_still_there: (C, ["a.qcow2", "b.qcow2", BASE, C]),
    equal: (BASE, [*STASHED[:2], BASE, STASHED[2]]),
    guest_wrote_to_base: (BASE, [*STASHED[:2], BASE, STASHED[2]]),
    guest_wrote_to_top: (C, ["a.qcow2", "b.qcow2", BASE, C]),
    switched: (BASE, [*STASHED[:2], BASE, STASHED[2]]),
    proved_in_part: (BASE, [*STASHED[:2], BASE, STASHED[2]]),
    header_old: (C, ["a.qcow2", "b.qcow2", BASE, C]),
    header_new: (C, [*STASHED[:2], BASE, C]),
    header_new_too_early_but_equal: (C, [*STASHED[:2], BASE, C]),
    header_new_too_early: (C, ["a.qcow2", "b.qcow2", BASE, C]),
}
"""How a merge was left, the image that is right then, and the files that are to be there at the end."""


def look(left: Left, state: Callable[[Left], None], found: list[Recovery]) -> None:
    right, there = STATES[state]
    assert [Path(one.start_from or "").name for one in found] == [right]
    assert names(left.folder) == sorted(there)
    assert not store.in_folder(str(left.folder))
    assert [
        name for name in there if name.endswith(".merged") and not stashed.is_stashed(f"{left.folder}/{name}")
    ] == []
    left.content.check(left.folder / right)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_recover(state: Callable[[Left], None], left: Left) -> None:
    state(left)
    before = names(left.folder)
    (planned,) = await qmpmerge.recover(left.images[3], dry_run=True)
    assert (planned.verdict, names(left.folder)) == ("planned", before)
    found = await qmpmerge.recover(left.images[3])
    assert found[0].verdict == "done"
    look(left, state, found)
    (again,) = await qmpmerge.recover(left.folder)
    assert again.verdict == "unchanged"


class Death(BaseException):
    """Ends everything where it is, as SIGKILL does; a lock is dropped too."""


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_recover_can_be_killed_before_each_step(
    state: Callable[[Left], None], tmp_path: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_done, step = 1, 0
    while steps_done:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        left = Left(folder, template)
        state(left)
        with monkeypatch.context() as patch:
            countdown = Countdown(step)
            for name in ("rename", "remove", "sync", "put"):
                patch.setattr(Folder, name, countdown.watching(getattr(Folder, name)))
            patch.setattr(files, "sync", countdown.watching(files.sync))
            patch.setattr(store, "mark", countdown.watching(store.mark))
            try:
                found = await qmpmerge.recover(left.images[3])
                steps_done = 0
            except Death:
                found = []
        found = found or await qmpmerge.recover(folder)
        if found[0].verdict == "done":
            look(left, state, found)
        else:  # its last step was done
            assert not store.in_folder(str(folder)) and names(folder) == sorted(STATES[state][1])
    assert step > 2


class Countdown:
    def __init__(self, steps: int) -> None:
        self.left = steps

    def watching(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise Death
            return function(*arguments)

        return watched


@pytest.mark.parametrize("what", ["mark", "remove"])
@pytest.mark.parametrize("left_as", [copying, switched, header_new])
async def test_a_record_that_stays_is_no_recovery(
    left_as: Callable[[Left], None], what: str, left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the storage takes no word of it, nothing is called done, and the next one finds it all."""

    def refuse(record: Record) -> Record:
        raise OSError(errno.EROFS, "Read-only file system", record.path)

    left_as(left)
    path = store.path_of(str(left.images[3]))
    if (left_as, what) != (copying, "mark"):  # of one that goes back nothing is marked
        with monkeypatch.context() as patch:
            patch.setattr(store, what, refuse)
            with pytest.raises(CannotRecover, match="Read-only"):
                await qmpmerge.recover(left.images[3])
        assert isinstance(store.read(path), Record)
        if what == "mark":
            assert not (left.folder / STASHED[0]).exists()
    (done,) = await qmpmerge.recover(left.images[3])
    assert (done.verdict, store.read(path)) == ("done", None)


# --- where it cannot be known -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["base", "top"])
async def test_two_that_were_written_to_are_shown_and_not_chosen_from(use: Any, left: Left) -> None:
    left.away(left.merge())
    with moved(left, STASHED[2], C):
        left.write(C, 6) if use == "top" else left.unchecked(C)
    left.write(BASE, 7) if use == "base" else left.unchecked(BASE)
    before = names(left.folder)
    with pytest.raises(Undecided) as undecided:
        await qmpmerge.recover(left.images[3])
    assert undecided.value.evidence == [
        "base.raw and c.qcow2 show different data",
        "base.raw was written to since both were equal",
        "c.qcow2 was written to since both were equal",
    ]
    assert names(left.folder) == before
    with pytest.raises(Unfinished, match="written to since"):
        await resume.settle_image(str(left.images[3]))
    (chosen,) = await qmpmerge.recover(left.images[3], use=use)
    assert Path(chosen.start_from or "").name == (BASE if use == "base" else C)
    left.content.check(chosen.start_from or "")


@pytest.mark.parametrize("use", ["base", "top"])
async def test_an_image_that_was_brought_back_is_asked_about(use: Any, left: Left) -> None:
    """The move was written down, and then somebody gave the old image its name again, and may have started a VM from it."""
    switched(left)
    (left.folder / STASHED[2]).rename(left.images[3])
    before = names(left.folder)
    with pytest.raises(Undecided, match=r"c\.qcow2 was given its name back since"):
        await qmpmerge.recover(left.folder)
    async with qmpmerge.offline(left.images[3]) as target:
        with pytest.raises(Unfinished, match="given its name back"):
            await qmpmerge.commit(target)
    assert names(left.folder) == before
    (chosen,) = await qmpmerge.recover(left.folder, use=use)
    assert Path(chosen.start_from or "").name == (BASE if use == "base" else C)
    assert names(left.folder) == (["a.qcow2", "b.qcow2", BASE, C] if use == "top" else [*STASHED[:2], BASE, STASHED[2]])


def both_written(left: Left) -> None:
    left.away(left.merge())
    with moved(left, STASHED[2], C):
        left.unchecked(C)
    left.write(BASE, 7)


def top_gone(left: Left) -> None:
    both_written(left)
    (left.folder / STASHED[2]).unlink()


def base_gone(left: Left) -> None:
    both_written(left)
    left.images[0].unlink()


def other_base(left: Left) -> None:
    both_written(left)
    shutil.copy(left.images[0], left.folder / "copy")
    (left.folder / "copy").rename(left.images[0])


def other_top(left: Left) -> None:
    switched(left)
    shutil.copy(left.template.images[3], left.images[3])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("leave", "choices"),
    [
        (both_written, ["base", "top"]),
        (top_gone, ["base"]),
        (base_gone, []),
        (other_base, ["base", "top"]),
        (other_top, ["base"]),
    ],
)
def test_only_what_can_be_chosen_is_offered(
    leave: Callable[[Left], None], choices: list[str], number: int, left: Left
) -> None:
    leave(left)
    error = invoke("recover", str(left.folder), "--json").document["error"]
    assert (error["name"], error["facts"]["choices"]) == ("undecided", choices)
    assert all((f"--use {choice}" in error["hint"]) == (choice in choices) for choice in ("base", "top"))
    for choice in choices[number : number + 1]:
        assert invoke("recover", str(left.images[3]), "--use", choice).code == 0


def test_one_that_cannot_be_put_right_stops_no_other(left: Left) -> None:
    both_written(left)
    store.write(record(make_chain(left.folder, ("x.raw", "y.qcow2")), 2))
    done = invoke("recover", str(left.folder), "--json")
    assert (done.code, done.document["error"]["name"]) == (6, "undecided")
    merges = {one["file"]: one["verdict"] for one in done.document["merges"]}
    assert merges == {str(left.images[3]): "unknown", f"{left.folder}/y.qcow2": "done"}
    said = invoke("recover", str(left.folder))
    assert said.code == 6 and "--use base" in said.err, "one alone is raised"


async def test_after_a_power_cut_the_old_name_is_there_again_by_itself(left: Left) -> None:
    switched(left)
    (told,) = store.believed(store.in_folder(str(left.folder)))
    assert told.tool is not None
    store.write(replace(told, tool=replace(told.tool, boot="before")))
    (left.folder / STASHED[2]).rename(left.images[3])
    assert [one.start_from for one in await qmpmerge.recover(left.folder)] == [str(left.images[0])]
    left.content.check(left.images[0])


async def test_a_backup_in_the_place_of_the_old_image_is_asked_about(left: Left) -> None:
    switched(left)
    shutil.copy(left.template.images[3], left.images[3])
    with pytest.raises(Undecided, match=r"another file is called .*c\.qcow2 since"):
        await qmpmerge.recover(left.folder)


async def test_an_image_that_a_vm_runs_from_keeps_its_name_whatever_the_record_says(left: Left, tmp_path: Path) -> None:
    """The merge was done in another QEMU; its record must not win over the one that has the old chain now."""
    told = left.switching(replace(left.merge(policy="keep"), away={}))
    store.write(replace(told, state=State.SWITCHED))
    before = names(left.folder)
    with drive(tmp_path, left.images, left.content) as setup:
        with pytest.raises(InUse, match=r"c\.qcow2 is in use by") as used:
            await qmpmerge.recover(left.folder)
        async with qmpmerge.live(setup.machine.target) as target:
            for options in ({}, {"top": "[3]"}, {"dry_run": True}):
                with pytest.raises(InUse, match=r"c\.qcow2 is in use by"):
                    await qmpmerge.commit(target, **options)
        assert set(before) <= set(names(left.folder))
        setup.write(0x66, 0, MIB)
        setup.off()
    typed = invoke(*used.value.hint.split("`")[1].split()[1:], "--json").document["error"]
    assert typed["facts"]["evidence"][-1] == "c.qcow2 was written to since"
    (chosen,) = await qmpmerge.recover(left.images[3], use="top")
    left.content.check(chosen.start_from or "")


async def test_without_a_quiet_moment_times_are_no_evidence(left: Left) -> None:
    told = left.away(left.merge())
    store.mark(replace(told, seen={}))
    left.write(BASE, 8)
    with pytest.raises(Undecided):
        await qmpmerge.recover(left.folder)


async def test_a_merged_image_that_is_gone_is_named(left: Left) -> None:
    left.merge()
    left.images[2].rename(left.folder / "moved")
    with pytest.raises(CannotRecover, match=r"b\.qcow2"):
        await qmpmerge.recover(left.folder)
    (left.folder / "moved").rename(left.images[2])
    assert (await qmpmerge.recover(left.folder))[0].verdict == "done"


async def test_nothing_is_suspected_without_proof(left: Left) -> None:
    for path in (left.folder, left.images[0], left.images[3]):
        assert [one.verdict for one in await qmpmerge.recover(path)] == ["unchanged"]
    with pytest.raises(NothingThere):
        await qmpmerge.recover(left.folder / "nothing.qcow2")


async def test_somebody_at_work_is_not_disturbed(left: Left) -> None:
    told = left.merge()
    with locks.held(told.chain.base), pytest.raises(Locked):
        await qmpmerge.recover(left.folder)


@pytest.mark.parametrize("settle", [qmpmerge.recover, resume.settle_image])
async def test_what_another_has_ended_while_we_waited_is_left_as_it_is(
    left: Left, monkeypatch: pytest.MonkeyPatch, settle: Callable[[Path], Awaitable[object]]
) -> None:
    """The VM may be running from the base by now: what the record said when it was read is not taken back."""
    left.merge()
    taken = locks.taken_for

    def late(plan: Plan) -> AbstractContextManager[Lock]:
        monkeypatch.undo()
        assert invoke("commit", str(left.images[3]), "-q").code == 0
        return taken(plan)

    monkeypatch.setattr(locks, "taken_for", late)
    told = await settle(left.images[3])
    assert names(left.folder) == sorted([BASE, *STASHED])
    if isinstance(told, list):
        assert [(one.verdict, one.start_from) for one in told] == [("unchanged", None)]
    else:
        assert told is None


async def test_a_merge_that_another_has_begun_while_we_waited_is_not_ours(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    left.merge()
    taken = locks.taken_for

    def late(plan: Plan) -> AbstractContextManager[Lock]:
        left.merge("[3]")
        return taken(plan)

    monkeypatch.setattr(locks, "taken_for", late)
    with pytest.raises(Overtaken):
        await qmpmerge.recover(left.folder)
    (found,) = store.in_folder(str(left.folder))
    assert isinstance(found, Record) and found.top == 3


def test_a_golden_base_in_another_folder_tells_of_the_merge(tmp_path: Path) -> None:
    (tmp_path / "golden").mkdir()
    images = make_chain(tmp_path, ("golden/base.raw", "a.qcow2", "b.qcow2"))
    content = Content()
    fill(images, content)
    with drive(tmp_path, images, content) as setup:
        begun = Begun("commit", setup.machine.target, "--speed", "1")
        begun.process.kill()
        begun.end()
        told = invoke("recover", str(images[0]), "--json")
        (merge,) = told.document["merges"]
        assert (told.document["verdict"], merge["file"]) == ("running", str(images[-1]))
        assert invoke("commit", setup.machine.target, "--speed", "1G").code == 0
    assert invoke("recover", str(images[0]), "--json").document["verdict"] == "unchanged"


# --- the next merge finds it -------------------------------------------------------------------------------------------


async def test_an_image_whose_name_was_taken_away_is_no_misspelt_vm(left: Left) -> None:
    left.away(left.merge())
    with pytest.raises(Unfinished, match=r"c\.qcow2\.merged now") as unfinished:
        async with qmpmerge.open(left.images[3]):
            pass
    assert unfinished.value.hint == f"run `qmpmerge recover {left.images[3]}`"


async def test_a_stashed_image_is_no_misspelt_vm(left: Left) -> None:
    equal(left)
    await qmpmerge.recover(left.folder)
    with pytest.raises(Stashed, match=r"c\.qcow2\.merged now"):
        async with qmpmerge.open(left.images[3]):
            pass
    (told,) = await qmpmerge.recover(left.images[3])
    assert told.verdict == "unchanged" and "base.raw" in told.reasons[0]


async def test_the_next_merge_puts_it_right_first(left: Left) -> None:
    header_new(left)
    async with qmpmerge.offline(left.images[3]) as target:
        assert [odd.name for odd in (await target.chain()).oddities] == ["unfinished"]
        assert [odd.name for odd in unfinished(await target.disk())] == ["unfinished"]
        outcome = await qmpmerge.commit(target, top=str(left.images[2]))
        assert (outcome.verdict, outcome.after.files) == ("merged", [str(left.images[0]), str(left.images[3])])
        assert names(left.folder) == [*STASHED[:2], BASE, C]
        assert (await qmpmerge.commit(target)).verdict == "pivoted"
    left.content.check(left.images[0])


# --- a QEMU that lives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_live_merge_that_was_left_is_read_from_the_graph(kind: str, top: str, tmp_path: Path) -> None:
    """The tool dies once QEMU has switched; nodes that it would have closed look like the old chain."""
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    with KINDS[kind](tmp_path, images, content) as setup:
        with pytest.MonkeyPatch.context() as patch:

            def die(*_arguments: object) -> None:
                raise Death

            patch.setattr(qmpmerge.Target, "close", die)
            with pytest.raises(Death):
                await live(setup, top=top)
        (told,) = store.believed(store.in_folder(str(tmp_path)))
        assert told.state is (State.SWITCHING if top == "[3]" else State.SWITCHED)
        store.mark(replace(told, state=State.SWITCHING))
        setup.write(0x44, 3 * MIB, 4096)
        async with setup.target() as target:
            disk = None if (kind, top) == ("storage-daemon", "[4]") else setup.disk
            outcome = await qmpmerge.commit(target, disk, top=None if top == "[4]" else str(images[2]))
            left = {node.info.get("drv") for node in (await target.layout()).nodes.values()}
        assert outcome.verdict == ("merged" if top == "[3]" else "pivoted")
        assert names(tmp_path) == [*STASHED[:2], BASE, *([C] if top == "[3]" else STASHED[2:])]
        assert top == "[3]" or "qcow2" not in left
        setup.check()


async def test_a_job_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    with drive(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            with pytest.raises(StillRunning):
                await qmpmerge.commit(target, "vda", speed=1, patience=qmpmerge.Patience(detach=True))
            assert (await target.chain()).oddities == ()
        (found,) = await qmpmerge.recover(tmp_path)
        assert found.verdict == "running" and "follow" in found.hints[0]
        setup.machine.kill()
        (found,) = await qmpmerge.recover(tmp_path)
        assert (found.verdict, found.start_from) == ("done", str(images[3]))
        content.check(images[3])


async def test_a_killed_qemu_leaves_the_right_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    with drive(tmp_path, images, content) as setup:
        take_away = merged_files.take_away

        def kill(told: Record, index: int) -> str:
            setup.machine.kill()
            return take_away(told, index)

        monkeypatch.setattr(merged_files, "take_away", kill)
        with pytest.raises(SessionLost):
            await live(setup)
    assert not images[3].exists()
    (found,) = await qmpmerge.recover(images[3])
    content.check(found.start_from or "")


async def test_a_job_is_followed_though_the_name_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool dies before it has told the job to complete; the next one knows the file by the record alone."""
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    with drive(tmp_path, images, content) as setup:
        with monkeypatch.context() as patch:

            async def die(*_arguments: object, **_options: object) -> None:
                raise Death

            patch.setattr(blockjob, "tell_to_end", die)
            with pytest.raises(Death):
                await live(setup)
        assert not images[3].exists()
        setup.write(0x45, 3 * MIB, 4096)
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.follow(target, "qmpmerge-commit-vda")
        assert (outcome.verdict, names(tmp_path)) == ("pivoted", [*STASHED[:2], BASE, STASHED[2]])
        setup.check()
    assert not store.in_folder(str(tmp_path))


async def test_a_shared_image_below_the_base_is_no_part_of_the_merge(left: Left) -> None:
    """Another VM on the same golden image has nothing to do with it."""
    told = left.merge()
    store.write(replace(told, base=2, top=3, away={}))
    assert not store.about(qmpmerge.Chain((told.chain.base,)))
    assert store.about(qmpmerge.Chain(told.chain.images[:2]))


async def test_a_cancelled_job_leaves_nothing_odd(tmp_path: Path) -> None:
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    with drive(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            with pytest.raises(StillRunning):
                await qmpmerge.commit(target, "vda", speed=1, patience=qmpmerge.Patience(detach=True))
            await jobs.control(target.monitor, "qmpmerge-commit-vda", "cancel")
            assert (await target.chain()).oddities == ()
            assert (await qmpmerge.commit(target, "vda")).verdict == "pivoted"
    assert not store.in_folder(str(tmp_path))


# --- a record that lies elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["[1]", "[2]"])
def test_a_merge_of_snapshots_in_another_folder_is_found_from_the_base(base: str, tmp_path: Path) -> None:
    """A unit that starts the VM knows the base, and its folder: `active` refuses, so these two must not see nothing."""
    for folder in ("vm", "snaps"):
        (tmp_path / folder).mkdir()
    images, content = make_chain(tmp_path, ("vm/base.raw",)), Content()
    with drive(tmp_path, images, content) as setup:
        for number, name in enumerate("abc"):
            assert invoke("snapshot", setup.machine.target, f"vda={tmp_path}/snaps/{name}.qcow2").code == 0
            setup.write(0x21 + number, number * MIB, MIB)
        begun = Begun("commit", setup.machine.target, "--base", base, "--speed", "1")
        begun.process.kill()
        begun.end()
        setup.off()
    for lock in tmp_path.rglob("*.qmpmerge-lock"):
        lock.unlink()
    assert invoke("active", str(images[0])).code == 6
    for path in (images[0], images[0].parent):
        (found,) = [one for one in advice.findings(path) if one["name"] == "unsettled"]
        assert found["where"] == store.path_of(f"{tmp_path}/snaps/c.qcow2")
        assert invoke("recover", str(path), "--dry-run", "--json").document["verdict"] == "planned"
    assert invoke("recover", str(images[0].parent), "--json").document["verdict"] == "done"
    assert invoke("active", str(images[0])).out == f"{tmp_path}/snaps/c.qcow2\n"
    content.check(tmp_path / "snaps" / "c.qcow2")


@pytest.mark.parametrize("what", ["folder", "image", "one of two"])
async def test_what_may_not_be_read_is_not_said_to_be_well(what: str) -> None:
    with public() as folder:
        images = make_chain(folder, ("base.raw", "a.qcow2"))
        path = images[1] if what == "image" else folder
        await qmpmerge.recover(path)  # nobody may not import what is needed
        await qmpmerge.examine(folder)
        unread = images[:1] if what == "one of two" else images
        for image in unread:
            image.chmod(0o600)
        with as_nobody():
            found = await qmpmerge.examine(folder)
            if what == "one of two":
                (told,) = await qmpmerge.recover(path)
                assert told.reasons == (f"{images[0]} may not be read, and was not looked at",)
            else:
                with pytest.raises(NotSeen):
                    await qmpmerge.recover(path)
        assert {one.where for one in found if one.name == "not-looked-at"} == set(map(str, unread))


def test_what_may_not_be_listed_is_no_usage_error() -> None:
    """The command itself says who may, and not click."""
    context = click.Context(group.cli)
    for name in ("recover", "active", "clean"):
        command = group.cli.get_command(context, name)
        assert command is not None
        path = command.params[0].type
        assert isinstance(path, click.Path) and not path.readable


async def test_a_recording_has_the_evidence_and_the_headers(left: Left) -> None:
    """They are what one wants to read afterwards; files are found under whatever names they have."""
    guest_wrote_to_base(left)
    with qmpmerge.record(left.folder / "rec"):
        (done,) = await qmpmerge.recover(left.folder)
    told = [json.loads(line) for line in (left.folder / "rec").read_text().splitlines()]
    steps = [(line["name"], line["text"]) for line in told if line["kind"] == "step"]
    evidence = [("evidence", f"because {reason}") for reason in done.reasons]
    decided = ("decided", f"{done.message}; {left.folder / BASE} is right")
    assert evidence and steps[: len(evidence) + 2] == [
        ("left", f"commit of {left.folder / C} into {left.folder / BASE} was left at SWITCHING"), *evidence, decided
    ]  # fmt: skip
    headers = [(line["when"], Path(line["file"]).name) for line in told if line["kind"] == "header"]
    before, after = [BASE, "a.qcow2", "b.qcow2", STASHED[2]], [BASE, *STASHED]
    assert headers == [*(("before", name) for name in before), *(("after", name) for name in after)]
