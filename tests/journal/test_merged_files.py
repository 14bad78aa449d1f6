"""What becomes of merged files: only the names that the plan lists, only the files that it means, nothing overwritten."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import folder
from rig.command import invoke
from rig.disks import KINDS, Setup, drive, nbd_server
from rig.machines import MIB, Content, fill, make_chain, run
from rig.wire import heard

import qmpmerge
from qmpmerge.chain.outcome import Outcome, Policy
from qmpmerge.errors import NoSuchStash, NotVerified, OptionsConflict, RecordFailed, SessionLost, Unfinished
from qmpmerge.folder import Folder, Inode
from qmpmerge.images import qemuimg, stashed
from qmpmerge.journal import merged_files, store
from qmpmerge.journal.record import Record


@pytest.fixture
def setup(tmp_path: Path, images: list[Path], content: Content) -> Iterator[Setup]:
    """A -drive disk of a guest that runs."""
    with drive(tmp_path, images, content) as setup:
        setup.machine.session.execute("cont")
        yield setup


async def offline(image: Path, **options: Any) -> Outcome:
    async with qmpmerge.offline(image) as target:
        return await qmpmerge.commit(target, **options)


def told(outcome: Outcome) -> list[tuple[str, str, str | None]]:
    return [
        (os.path.basename(file.file), file.action, os.path.basename(file.now) if file.now else None)
        for file in outcome.merged
    ]


STASHED = [(f"{name}.qcow2", "stash", f"{name}.qcow2.merged") for name in "abc"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_start_from_the_old_path_fails(kind: str, tmp_path: Path, images: list[Path], content: Content) -> None:
    """The guest is paused for the pivot and runs again; a storage daemon has none."""
    with KINDS[kind](tmp_path, images, content) as setup:
        if kind != "storage-daemon":
            setup.machine.session.execute("cont")
        outcome = await folder.live(setup)
        assert (outcome.verdict, told(outcome)) == ("pivoted", STASHED)
        assert (outcome.paused_seconds is None) == (kind == "storage-daemon")
        if kind != "storage-daemon":
            assert setup.machine.session.execute("query-status")["status"] == "running"
        setup.check()
        setup.machine.stop()
    assert folder.names(tmp_path) == ["a.qcow2.merged", "b.qcow2.merged", "base.raw", "c.qcow2.merged"]
    content.check(images[0])
    assert not store.in_folder(str(tmp_path))


async def test_a_paused_guest_stays_paused(setup: Setup) -> None:
    setup.machine.session.execute("stop")
    outcome = await folder.live(setup)
    assert (outcome.verdict, outcome.paused_seconds) == ("pivoted", None)
    assert setup.machine.session.execute("query-status")["status"] == "paused"


async def test_without_a_pause(setup: Setup) -> None:
    with pytest.raises(OptionsConflict):
        await folder.live(setup, pause=False, verify=True)
    outcome = await folder.live(setup, pause=False)
    assert (outcome.verdict, outcome.paused_seconds, told(outcome)) == ("pivoted", None, STASHED)


async def test_nothing_is_overwritten(tmp_path: Path, images: list[Path], content: Content) -> None:
    (tmp_path / "a.qcow2.merged").write_text("theirs")
    outcome = await offline(images[3], top="[2]")
    assert told(outcome) == [("a.qcow2", "stash", "a.qcow2.merged.2")]
    assert (tmp_path / "a.qcow2.merged").read_text() == "theirs"
    content.check(images[3])


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_kept_files_keep_their_names(top: str, setup: Setup, tmp_path: Path) -> None:
    before = folder.names(tmp_path)
    outcome = await folder.live(setup, top=top, merged_files="keep")
    assert {action for _, action, _ in told(outcome)} == {"keep"}
    assert folder.names(tmp_path) == before
    assert top == "[3]" or "shows older data" in outcome.hints[0]


# --- delete -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_deleted_files_were_compared(top: str, setup: Setup, tmp_path: Path, images: list[Path]) -> None:
    outcome = await folder.live(setup, top=top, merged_files="delete")
    assert outcome.verified and {action for _, action, _ in told(outcome)} == {"delete"}
    assert folder.names(tmp_path) == (["base.raw", "c.qcow2"] if top == "[3]" else ["base.raw"])
    setup.check()


async def test_what_cannot_be_compared_is_not_deleted(tmp_path: Path, images: list[Path], content: Content) -> None:
    """Who exports the disk can write at any time."""
    with KINDS["storage-daemon"](tmp_path, images, content) as setup:
        outcome = await folder.live(setup, merged_files="delete")
    assert told(outcome) == STASHED
    assert sum("was not compared" in hint for hint in outcome.hints) == 3


async def test_what_was_changed_since_is_not_deleted(setup: Setup, images: list[Path]) -> None:
    def touch(direction: str, text: str) -> None:
        if direction == "->" and "job-finalize" in text:
            os.utime(images[1])

    async with heard(touch), qmpmerge.live(setup.machine.target) as target:
        outcome = await qmpmerge.commit(target, top="[3]", merged_files="delete")
    assert [action for _, action, _ in told(outcome)] == ["stash", "delete"]
    assert any("was changed since" in hint for hint in outcome.hints)


async def test_a_difference_while_the_guest_is_paused_stops_the_pivot(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder.names(tmp_path)

    async def differ(*_of: object) -> int:
        assert setup.machine.session.execute("query-status")["status"] == "paused"
        return 0

    monkeypatch.setattr(qemuimg, "differs_at", differ)
    with pytest.raises(NotVerified):
        await folder.live(setup, verify=True)
    assert setup.machine.session.execute("query-status")["status"] == "running"
    assert (folder.names(tmp_path), store.in_folder(str(tmp_path))) == (before, [])


async def test_a_file_that_somebody_holds_is_not_deleted(setup: Setup, images: list[Path]) -> None:
    with contextlib.ExitStack() as stack:

        def hold(direction: str, text: str) -> None:
            if direction == "->" and "job-finalize" in text:
                stack.enter_context(held(images[1]))

        async with heard(hold), qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.commit(target, top="[3]", merged_files="delete")
        assert [action for _, action, _ in told(outcome)] == ["stash", "delete"]
        (kept,) = await qmpmerge.clean([images[1].parent])
        assert kept.obstacle is not None and "in use by sleep" in kept.obstacle
    assert [one.obstacle for one in await qmpmerge.clean([f"{images[1]}.merged"])] == [None]


@contextlib.contextmanager
def held(file: Path) -> Iterator[None]:
    """Some process has it open."""
    with open(file, "rb") as stream, subprocess.Popen(["sleep", "60"], stdin=stream) as reader:
        try:
            yield
        finally:
            reader.kill()


# --- links ------------------------------------------------------------------------------------------------------------


def linked(image: Path) -> Path:
    """Move an image into a folder of its own, with a symlink in its place; returns where it is now."""
    real = image.with_name("store") / f"real-{image.name}"
    real.parent.mkdir(exist_ok=True)
    image.rename(real)
    image.symlink_to(real)
    return real


def starts(image: Path) -> bool:
    """Whether a VM would start from this name."""
    return subprocess.run(["qemu-img", "info", image], capture_output=True, check=False).returncode == 0


LINKED = [("live", "stash"), ("live", "delete"), ("offline", "stash"), ("offline", "delete")]


@pytest.mark.parametrize(("way", "policy"), LINKED)
async def test_what_a_symlink_leads_to_loses_its_name(
    way: str, policy: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """Else it would open under its own name and, by the link, under the old one, and show older data."""
    reals = [linked(images[2]), linked(images[3])]
    (tmp_path / "hard.qcow2").hardlink_to(images[1])
    if way == "offline":
        outcome = await offline(images[3], merged_files=policy)
    else:
        with drive(tmp_path, images, content) as setup:
            outcome = await folder.live(setup, merged_files=policy)
            setup.check()
    stashed = [f"{real}.merged" if policy == "stash" else None for real in reals]
    assert [(file.file, file.now) for file in outcome.merged[1:]] == list(
        zip(map(str, images[2:]), stashed, strict=True)
    )
    assert sum("leads nowhere now" in hint for hint in outcome.hints) == 2
    assert not any(starts(name) for name in (*images[2:], *reals))
    assert (tmp_path / "hard.qcow2").is_file()  # another name of it is not ours
    content.check(images[0])


async def test_the_commands_follow_a_symlink_that_leads_nowhere(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    real = linked(images[3])
    await offline(images[3], top="[4]")
    for command in ("commit", "disks"):
        done = invoke(command, str(images[3]), "--json")
        assert (done.code, done.document["error"]["facts"]["now"]) == (3, f"{real}.merged")
    assert f"{real}.merged was put aside" in invoke("recover", str(images[3])).out
    (cleaned,) = await qmpmerge.clean([real.parent])
    assert (cleaned.file, cleaned.obstacle, cleaned.allocated > 0, os.listdir(real.parent)) == (
        f"{real}.merged",
        None,
        True,
        [],
    )


@pytest.mark.parametrize("name", ["link", "real"])
async def test_a_merge_of_a_symlinked_image_is_recovered_by_both_names(
    name: str, tmp_path: Path, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU dies when the file has lost its name."""
    real, take_away = linked(images[3]), merged_files.take_away

    def die(record: Record, index: int) -> str:
        place = take_away(record, index)
        setups[0].machine.kill()
        return place

    with monkeypatch.context() as patched, drive(tmp_path, images, content) as setup:
        setups = [setup]
        patched.setattr(merged_files, "take_away", die)
        with pytest.raises(SessionLost):
            await folder.live(setup)
    (stays,) = await qmpmerge.clean([real.parent], dry_run=True)
    assert (stays.file, stays.obstacle) == (f"{real}.merged", "a merge that was not finished may need it")
    with pytest.raises(Unfinished):
        async with qmpmerge.open(images[3]):
            pass
    (found,) = await qmpmerge.recover(images[3] if name == "link" else real)
    assert (found.verdict, found.start_from) == ("done", str(images[0]))
    content.check(images[0])


async def test_a_symlink_under_a_stashed_name_stays(tmp_path: Path, images: list[Path], content: Content) -> None:
    """No merge puts one aside."""
    (tmp_path / "old.merged").symlink_to(images[3])
    (tmp_path / "gone.merged").symlink_to(tmp_path / "nowhere")
    found = {os.path.basename(one.file): one.obstacle for one in await qmpmerge.clean([tmp_path])}
    assert all(reason is not None and reason.startswith("it is a symlink") for reason in found.values())
    assert (images[3].is_file(), os.path.lexists(tmp_path / "gone.merged")) == (True, True)


async def test_what_is_built_on_a_symlink_needs_what_was_stashed(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    real = linked(images[1])
    await offline(images[3], top="[3]")
    late = real.with_name("late.qcow2")
    run("qemu-img", "create", "-qf", "qcow2", "-u", "-b", images[1], "-F", "qcow2", late, "8M")
    assert [one.obstacle for one in await qmpmerge.clean([real.parent])] == [f"{late} is built on it"]


# --- external data files ----------------------------------------------------------------------------------------------


@pytest.fixture
def with_data(tmp_path: Path) -> tuple[list[Path], Content]:
    """a.qcow2 and c.qcow2 have their data in other files."""
    images = make_chain(tmp_path)
    below = images[0]
    for image in images[1:]:
        own = ["-o", f"data_file={tmp_path}/{image.stem}.data"] if image.stem != "b" else []
        form = below.suffix[1:]
        run("qemu-img", "create", "-qf", "qcow2", *own, "-b", below.name, "-F", form, image.name, "8M", cwd=tmp_path)
        below = image
    content = Content()
    fill(images, content)
    return images, content


async def merged(way: str, folder_: Path, images: list[Path], content: Content, **options: Any) -> Outcome:
    if way == "offline":
        return await offline(images[3], **options)
    with drive(folder_, images, content) as setup:
        return await folder.live(setup, **options)


@pytest.mark.parametrize("way", ["live", "offline"])
async def test_data_files_are_told_and_deleted_with_their_images(
    way: str, tmp_path: Path, with_data: tuple[list[Path], Content]
) -> None:
    """They stay beside a stashed image, which would not open without."""
    images, content = with_data
    outcome = await merged(way, tmp_path, images, content, top="[3]")
    assert told(outcome) == [("a.data", "keep", "a.data"), *STASHED[:2]]
    assert any("a.data holds the data of" in hint for hint in outcome.hints)
    (a, data, b) = await qmpmerge.clean([tmp_path], dry_run=True)
    assert [(Path(one.file).name, one.obstacle is None) for one in (a, data, b)] == [
        ("a.qcow2.merged", True),
        ("a.data", False),
        ("b.qcow2.merged", True),
    ]
    content.check(images[3])
    outcome = await merged(way, tmp_path, images, content, merged_files="delete")
    assert told(outcome) == [("c.data", "delete", None), ("c.qcow2", "delete", None)]
    assert (tmp_path / "a.data").exists() and not (tmp_path / "c.data").exists()
    content.check(images[0])


async def test_data_that_another_image_names_stays(tmp_path: Path, with_data: tuple[list[Path], Content]) -> None:
    images, content = with_data
    shutil.copy(images[1], tmp_path / "copy.qcow2")
    outcome = await offline(images[3], top="[2]", merged_files="delete", force=["dependents"])
    assert told(outcome) == [("a.data", "keep", "a.data"), ("a.qcow2", "delete", None)]
    assert any("a.data, which held" in hint and "copy.qcow2 names it" in hint for hint in outcome.hints)
    content.check(images[3])


async def test_a_write_to_the_data_alone_is_a_change(
    tmp_path: Path, with_data: tuple[list[Path], Content], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's own file does not tell of it."""
    images, _content = with_data
    remove = merged_files._dealt_with

    def write(record: Record, index: int, aside: dict[int, str], hints: list[str]) -> Any:
        place = Path(record.away[index])
        before = place.stat()
        if index == 2:
            run("qemu-io", "-f", "raw", "-c", "write 0 512", tmp_path / "a.data")
        assert place.stat() == before
        return remove(record, index, aside, hints)

    monkeypatch.setattr(merged_files, "_dealt_with", write)
    outcome = await offline(images[3], top="[2]", merged_files="delete")
    assert told(outcome) == [("a.data", "keep", "a.data"), STASHED[0]]
    assert any("was changed since" in hint for hint in outcome.hints)


@pytest.mark.parametrize("top", ["[2]", "[3]"])
async def test_a_folder_is_synced_once_for_all_names(
    top: str, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage may take long over it: once for the names, once for the notes, and when the record comes and goes or changes."""
    synced: list[str] = []
    really = Folder.sync

    def sync(place: Folder) -> None:
        synced.append(place.path)
        really(place)

    monkeypatch.setattr(Folder, "sync", sync)
    outcome = await offline(images[3], top=top)
    assert [file.action for file in outcome.merged] == ["stash"] * (int(top[1]) - 1)
    assert len(synced) == 6
    content.check(images[3])


# --- where it is not possible -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_file_that_cannot_be_renamed_stays_and_that_is_said(
    top: str, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: Folder, old: str, new: str, inode: Inode) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Folder, "rename", refuse)
    before = folder.names(tmp_path)
    outcome = await folder.live(setup, top=top)
    assert outcome.verdict in ("merged", "pivoted")
    assert ({action for _, action, _ in told(outcome)}, folder.names(tmp_path)) == ({"keep"}, before)
    assert any("could not be renamed" in hint for hint in outcome.hints)
    assert not store.in_folder(str(tmp_path))


async def test_no_place_for_a_record_is_said(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Folder, name: str, data: bytes, mode: int = 0) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Folder, "put", refuse)
    outcome = await folder.live(setup)
    assert outcome.verdict == "pivoted"
    assert any("no record could be kept" in hint for hint in outcome.hints)


async def test_a_record_that_cannot_be_marked_stops_the_pivot(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(told: Record) -> Record:
        raise OSError(5, "Input/output error")

    before = folder.names(tmp_path)
    monkeypatch.setattr(store, "mark", refuse)
    with pytest.raises(RecordFailed, match="Input/output error"):
        await folder.live(setup)
    assert (folder.names(tmp_path), store.in_folder(str(tmp_path))) == (before, [])
    setup.check()


async def test_an_image_that_another_is_built_on_stays(tmp_path: Path, images: list[Path], content: Content) -> None:
    run("qemu-img", "create", "-qf", "qcow2", "-b", "b.qcow2", "-F", "qcow2", "other.qcow2", cwd=tmp_path)
    outcome = await offline(images[3], force=["dependents"])
    assert told(outcome) == [("a.qcow2", "keep", "a.qcow2"), ("b.qcow2", "keep", "b.qcow2"), STASHED[2]]
    assert sum("other.qcow2 is built on it" in hint for hint in outcome.hints) == 2
    run("qemu-img", "check", tmp_path / "other.qcow2")


async def test_a_base_on_the_network(tmp_path: Path, images: list[Path], content: Content) -> None:
    """It has no name here and no time of its last write: the files that have names are stashed all the same."""
    with nbd_server(tmp_path, images[0]) as uri:
        top = tmp_path / "top.qcow2"
        run("qemu-img", "create", "-qf", "qcow2", "-b", uri, "-F", "raw", top, "8M")
        with drive(tmp_path, [top], Content()) as setup:
            outcome = await folder.live(setup, base=uri)
    assert told(outcome) == [("top.qcow2", "stash", "top.qcow2.merged")]


# --- clean ------------------------------------------------------------------------------------------------------------


async def test_clean_removes_what_nobody_needs(tmp_path: Path, images: list[Path], content: Content) -> None:
    await offline(images[3], top="[3]")
    (tmp_path / "text.merged").write_text("no image")
    run("qemu-img", "create", "-qf", "qcow2", tmp_path / "vm2.merged", "8M")
    run("qemu-img", "create", "-qf", "qcow2", "-u", "-b", "b.qcow2", "-F", "qcow2", "late.qcow2", "8M", cwd=tmp_path)
    reasons = {os.path.basename(one.file): one.obstacle for one in await qmpmerge.clean([tmp_path], dry_run=True)}
    assert reasons == {
        "a.qcow2.merged": f"{tmp_path}/b.qcow2.merged is built on it",
        "b.qcow2.merged": f"{tmp_path}/late.qcow2 is built on it",
        "text.merged": "it is no qcow2 image",
        "vm2.merged": "nothing but its name says that a merge has stashed it, and there is no image below it that it could "
        f"have been merged into: `rm -- {tmp_path}/vm2.merged` if you know better",
    }
    assert (tmp_path / "a.qcow2.merged").exists()
    (tmp_path / "late.qcow2").unlink()
    await qmpmerge.clean([tmp_path])
    assert sorted(name for name in os.listdir(tmp_path) if "merged" in name) == ["text.merged", "vm2.merged"]
    assert [one.obstacle for one in await qmpmerge.clean([tmp_path / "vm2.merged"])] == [reasons["vm2.merged"]]
    with pytest.raises(NoSuchStash):
        await qmpmerge.clean([images[3]])


@pytest.mark.parametrize("policy", ["stash", "delete"])
async def test_what_qemu_still_had_in_memory_of_the_old_active_image_is_no_change(
    policy: Policy, setup: Setup, tmp_path: Path, images: list[Path]
) -> None:
    """Its tables are written when it is closed, after the switch: so it is stashed with a note, and deleted."""
    async with setup.target() as target:
        await qmpmerge.snapshot(target, {setup.disk: tmp_path / "d.qcow2"})
        setup.write(0x77, 0, MIB)
        outcome = await qmpmerge.commit(target, setup.disk, merged_files=policy)
    assert not [hint for hint in outcome.hints if "changed" in hint or "no note" in hint]
    assert {action for _, action, _ in told(outcome)} == {policy}
    assert all(stashed.is_stashed(str(path)) for path in tmp_path.glob("*.merged"))


# --- deleted, and what stays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "policy"), [("drive", "delete"), ("blockdev", "delete"), ("blockdev", "stash")])
def test_what_a_guest_has_not_flushed_is_no_change(
    kind: str, policy: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """
    It was paused before we came, so QEMU has the tables of its active image in its caches: compared was what is on disk, and
    the image was changed by QEMU itself as it closed it.
    """
    with KINDS[kind](tmp_path, images, content) as setup:
        setup.write(0x77, 7 * MIB, 65536)  # a cluster that no image has yet
        said = invoke("commit", setup.machine.target, setup.disk, "--merged-files", policy, "--json")
        assert (said.code, said.document["verified"]) == (0, policy == "delete")
        assert [file["action"] for file in said.document["merged"]] == [policy] * 3
        assert not [hint for hint in said.document["hints"] if "changed since" in hint]
        setup.check()
        setup.off()
    content.check(images[0])


def test_what_was_to_be_deleted_and_stays_is_in_the_verdicts_line(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """The exports of a daemon can be written to at any time, so nothing can be compared."""
    with KINDS["storage-daemon"](tmp_path, images, content) as setup:
        said = invoke("commit", setup.machine.target, setup.disk, "--merged-files", "delete")
    assert "3 of 3 merged files not deleted\n" in said.out
