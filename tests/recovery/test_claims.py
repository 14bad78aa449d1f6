"""
Records that somebody has forged, moved, copied or linked: no file is changed on their word alone.

`spool` is a folder of ours that others may write to, `home` one of ours that they may not.
"""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rig.command import invoke
from rig.disks import drive
from rig.harms import harm
from rig.left import record
from rig.machines import MIB, Content, fill, make_chain, run

import qmpmerge
from qmpmerge import users
from qmpmerge.chain.state import State
from qmpmerge.errors import ForeignFile, RecordNotBelieved, StillRunning, Unfinished
from qmpmerge.folder import File, Folder
from qmpmerge.journal import merged_files, store
from qmpmerge.journal.record import Record, look
from qmpmerge.recovery import claims
from qmpmerge.targets.target import Target


@dataclass
class Place:
    """Two folders, and in `home` an image that no merge was ever about."""

    spool: Path
    home: Path
    victim: Path
    base: Path
    active: Path

    def files(self) -> dict[str, bytes]:
        """All that lies in `home`, and what is in it."""
        return {file.name: file.read_bytes() for file in sorted(self.home.iterdir())}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    spool, home = tmp_path / "spool", tmp_path / "home"
    for folder in (spool, home):
        folder.mkdir()
    base, active = make_chain(spool, ("base.raw", "c.qcow2"))
    victim = home / "vm 2.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", victim, "8M")
    run("qemu-io", "-c", f"write -P 0x77 0 {MIB}", victim)
    return Place(spool, home, victim, base, active)


def middle(place: Place, **changes: Any) -> Record:
    """The victim was merged from between base and active image, which names base already."""
    return record([place.base, place.victim, place.active], 2, **{"state": State.PROVED, **changes})


def to_be_deleted(place: Place) -> Record:
    """It was compared, and looks as it did then."""
    told = middle(place, policy="delete", verified=True)
    return replace(told, before={2: look(told.chain[2], str(place.victim))})


def another_boot(place: Place) -> Record:
    """The device number cannot be compared then."""
    told = middle(place)
    assert told.tool is not None
    other = replace(told.tool, boot="another")
    return replace(told, tool=other, qemu=other)


def active(place: Place) -> Record:
    """The victim was the active image, and the guest moved off it in another boot."""
    told = record([place.base, place.victim], 2, path=store.path_of(str(place.active)), state=State.SWITCHED)
    assert told.tool is not None
    return replace(told, tool=replace(told.tool, boot="another"))


def given_back(place: Place) -> Record:
    """It has lost its name, and the old chain is right."""
    told = middle(place, state=State.COPYING)
    run("qemu-img", "rebase", "-u", "-b", place.victim, "-F", "qcow2", place.active)
    place.victim.rename(told.away[2])
    return told


def rewritten(place: Place) -> Record:
    """The victim was built on an image of the spool once, and a merge that was cut short has made it name base."""
    evil = place.spool / "evil.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", place.base, "-F", "raw", evil, "8M")
    run("qemu-io", "-c", f"write -P 0x66 0 {MIB}", evil)
    run("qemu-img", "rebase", "-u", "-b", place.base, "-F", "raw", place.victim)
    return record([place.base, evil, place.victim], 2, path=store.path_of(str(place.active)), state=State.COPYING)


FORGED: list[Callable[[Place], Record]] = [middle, to_be_deleted, another_boot, active, given_back, rewritten]


@pytest.fixture(params=FORGED, ids=lambda forged: forged.__name__)
def forged(request: pytest.FixtureRequest, place: Place) -> Record:
    return store.write(request.param(place))


async def test_what_lies_elsewhere_is_not_changed_on_a_records_word(place: Place, forged: Record) -> None:
    before, files_there, hint = place.files(), sorted(os.listdir(place.spool)), ""
    for path in (place.spool, *([place.active] if forged.is_called(str(place.active)) else [])):
        for dry_run in (True, False):
            with pytest.raises(ForeignFile) as refused:
                await qmpmerge.recover(path, dry_run=dry_run)
            assert refused.value.path == forged.path
            hint = refused.value.hint
    assert place.files() == before and sorted(os.listdir(place.spool)) == files_there
    allowed, aside = hint.split("`")[1::2]
    assert shlex.split(allowed)[-2:] == ["--allow", str(place.home)]
    run(*shlex.split(aside))
    assert [one.verdict for one in await qmpmerge.recover(place.spool)] == ["unchanged"]


async def test_the_next_merge_does_not_either(place: Place, forged: Record) -> None:
    before = place.files()
    for arguments in (["--dry-run"], []):
        done = invoke("commit", str(place.active), "--json", *arguments)
        assert done.code in (0, 3), done
    assert place.files() == before


@harm(
    "foreign-file",
    "a file of yours loses its name, wherever it lies, since somebody has put a record beside your image",
)
async def test_on_its_word_any_file_would_lose_its_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(middle(place))
    monkeypatch.setattr("qmpmerge.engine.resume.refuse_foreign", lambda *_arguments: None)
    await qmpmerge.recover(place.spool)
    assert not place.victim.exists()


async def test_the_user_can_allow_it(place: Place) -> None:
    store.write(middle(place))
    with pytest.raises(ForeignFile) as refused:
        await qmpmerge.recover(place.spool)
    typed = invoke(*shlex.split(refused.value.hint.split("`")[1])[1:], "--json")
    assert (typed.code, typed.document["verdict"]) == (0, "done")
    assert [name for name in os.listdir(place.home) if not name.startswith(".")] == ["vm 2.qcow2.merged"]


async def test_a_merge_that_was_to_delete_is_finished_as_one_that_stashes(place: Place) -> None:
    """Whether a file was compared is but the record's word too."""
    store.write(to_be_deleted(place))
    (done,) = await qmpmerge.recover(place.spool, allow=[place.victim])
    assert [(file.action, file.now) for file in done.merged] == [("stash", f"{place.victim}.merged")]
    assert "nothing is deleted" in done.hints[-1]


async def test_the_next_merge_deletes_nothing_either(tmp_path: Path) -> None:
    images = make_chain(tmp_path, ("base.raw", "a.qcow2", "c.qcow2"))
    told = record(images, 2, state=State.PROVED, policy="delete", verified=True)
    store.write(replace(told, before={2: look(told.chain[2], str(images[1]))}))
    run("qemu-img", "rebase", "-u", "-b", "base.raw", "-F", "raw", images[2])
    async with qmpmerge.offline(images[2]) as target:
        await qmpmerge.commit(target, merged_files="delete")
    assert (tmp_path / "a.qcow2.merged").exists()


# --- records that are not believed --------------------------------------------------------------------------------------


def of_another_user(path: Path, elsewhere: Path) -> str:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 65534, 65534)
    return f"belongs to another user ({users.name(65534)})"


def linked(path: Path, elsewhere: Path) -> str:
    """A real one of ours has a second name here."""
    os.rename(path, elsewhere / path.name)
    os.link(elsewhere / path.name, path)
    return "another name elsewhere"


def moved(path: Path, elsewhere: Path) -> str:
    document = path.read_bytes().replace(os.fsencode(path), os.fsencode(elsewhere / path.name))
    path.write_bytes(document)
    return f"was written to lie at {elsewhere}"


def renamed(path: Path, elsewhere: Path) -> str:
    """Beside another image of the same folder."""
    shutil.copy(path, path.with_name(".d.qcow2.qmpmerge-record"))
    path.unlink()
    return "was written to lie at"


def open_to(mode: int) -> Callable[[Path, Path], str]:
    def opened(path: Path, elsewhere: Path) -> str:
        path.chmod(mode)
        return "others than its owner may write"

    opened.__name__ = f"mode-{mode:o}"
    return opened


def symlinked(path: Path, elsewhere: Path) -> str:
    os.rename(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
    return "symlink"


def away_of_base(path: Path, elsewhere: Path) -> str:
    state, _, rest = path.read_bytes().partition(b"\n")
    document = {**json.loads(rest), "away": [[1, str(path.with_name("base.raw.merged"))]]}
    path.write_bytes(state + b"\n" + json.dumps(document).encode() + b"\n")
    return "makes no sense"


SPOILED = [of_another_user, linked, moved, renamed, open_to(0o620), open_to(0o602), symlinked, away_of_base]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
async def test_what_others_may_have_written_is_unknown(
    place: Place, spoil: Callable[[Path, Path], str], tmp_path: Path
) -> None:
    a, c = place.spool / "a.qcow2", place.active
    run("qemu-img", "create", "-qf", "qcow2", "-b", place.base, "-F", "raw", a, "8M")
    told = store.write(record([place.base, a, c], 2, state=State.PROVED))
    reason = spoil(Path(told.path), place.home)
    before = sorted(os.listdir(place.spool))
    with pytest.raises(RecordNotBelieved) as refused:
        await qmpmerge.recover(place.spool)
    assert reason in str(refused.value)
    if spoil is not renamed:  # that lies beside no image of the chain, or beside one that is no more
        assert invoke("commit", str(c), "--json").document["error"]["name"] == "record-not-believed"
    assert sorted(os.listdir(place.spool)) == before


async def test_no_record_is_kept_where_anybody_could_write_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem without modes: what could not be believed is not written, and that is said."""
    put = Folder.put

    def loose(where: Folder, name: str, data: bytes, mode: int = 0o600) -> File:
        file = put(where, name, data, mode)
        file.allow(0o777)
        return file

    monkeypatch.setattr(Folder, "put", loose)
    async with qmpmerge.offline(place.active) as target:
        outcome = await qmpmerge.commit(target)
    assert any("no record could be kept" in hint and "others than its owner" in hint for hint in outcome.hints)
    assert not store.in_folder(str(place.spool))


# --- what stays comfortable -----------------------------------------------------------------------------------------------


@pytest.fixture
def scattered(tmp_path: Path) -> Iterator[tuple[list[Path], Content]]:
    """A golden base, an image on another disk, and the active one at home."""
    for name in ("golden", "fast", "vm"):
        (tmp_path / name).mkdir()
    images = [tmp_path / name for name in ("golden/base.raw", "fast/a.qcow2", "vm/c.qcow2")]
    run("qemu-img", "create", "-qf", "raw", images[0], "8M")
    for below, image in zip(images, images[1:], strict=False):
        run("qemu-img", "create", "-qf", "qcow2", "-b", below, "-F", below.suffix[1:], image, "8M")
    content = Content()
    fill(images, content)
    yield images, content


class Death(BaseException):
    """As SIGKILL does."""


def die(*_arguments: object, **_options: object) -> None:
    raise Death


async def test_a_golden_base_elsewhere_asks_for_nothing(
    scattered: tuple[list[Path], Content], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written to, and keeps its name."""
    images, _content = scattered
    golden, overlay = images[0], images[0].parents[1] / "vm" / "d.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", golden, "-F", "raw", overlay, "8M")
    async with qmpmerge.offline(overlay, allow=[str(golden.parent)]) as target:
        with monkeypatch.context() as patch, pytest.raises(Death):
            patch.setattr(merged_files, "finish", die)
            await qmpmerge.commit(target, base=str(golden), force=["dependents"])
    (done,) = await qmpmerge.recover(overlay)
    assert (done.verdict, done.start_from, overlay.exists()) == ("done", str(golden), False)


@pytest.mark.parametrize("again", ["recover", "commit"])
async def test_a_merged_image_elsewhere_is_asked_about_once_nobody_shows_it(
    again: str, scattered: tuple[list[Path], Content], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, content = scattered
    with drive(images[2].parent, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            with monkeypatch.context() as patch, pytest.raises(Death):
                patch.setattr(Target, "close", die)
                await qmpmerge.commit(target, "vda", base="[1]", top="[2]")
        words = [again, str(images[2])] if again == "recover" else [again, setup.machine.target, "--base", "[1]"]
        words += [] if again == "recover" else ["--top", str(images[1])]
        refused = invoke(*words, "--json")
        assert (refused.code, refused.document["error"]["name"]) == (3, "foreign-file")
        assert refused.document["error"]["facts"]["files"] == [str(images[1])]
        typed = refused.document["error"]["hint"].split("`")[1]
        assert invoke(*shlex.split(typed)[1:]).code == 0
        assert os.path.exists(f"{images[1]}.merged") and not store.in_folder(str(images[2].parent))
        setup.check()


async def test_what_qemu_shows_is_of_the_merge(scattered: tuple[list[Path], Content]) -> None:
    images, content = scattered
    with drive(images[2].parent, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            with pytest.raises(StillRunning):
                patience = qmpmerge.Patience(detach=True)
                await qmpmerge.commit(target, "vda", base="[1]", top="[2]", speed=1, patience=patience)
            outcome = await qmpmerge.commit(target, "vda", base="[1]", top="[2]", speed=0)
        assert [file.now for file in outcome.merged] == [f"{images[1]}.merged"]
        setup.check()


@pytest.mark.parametrize("verb", ["commit", "follow"])
async def test_a_job_at_work_does_not_vouch_for_what_is_not_in_its_chain(
    verb: str, scattered: tuple[list[Path], Content], tmp_path: Path
) -> None:
    images, content = scattered
    victim = tmp_path / "victim.qcow2"
    shutil.copy(images[1], victim)
    with drive(images[2].parent, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            with pytest.raises(StillRunning):
                patience = qmpmerge.Patience(detach=True)
                await qmpmerge.commit(target, "vda", base="[1]", top="[2]", speed=1, patience=patience)
            (told,) = store.believed(store.in_folder(str(images[2].parent)))
            forged = record([images[0], victim, images[2]], 2, path=told.path, job=told.job)
            store.write(replace(forged, tool=told.tool, qemu=told.qemu, target=told.target))
            with pytest.raises((ForeignFile, Unfinished)):
                if verb == "commit":
                    await qmpmerge.commit(target, "vda", base="[1]", top="[2]")
                else:
                    await qmpmerge.follow(target, told.job)
        assert victim.exists()
        setup.check()


def test_nothing_is_foreign_that_need_not_be_changed(place: Place) -> None:
    told = middle(place, policy="keep")
    claims.refuse_foreign(told, ["finish", "leave"], claims.Vouched())
    told = middle(place)
    os.rename(place.victim, told.away[2])
    claims.refuse_foreign(told, ["finish"], claims.Vouched())
    with pytest.raises(ForeignFile):
        claims.refuse_foreign(told, ["back"], claims.Vouched())
