"""`clean` removes what a note or a comparison proves to be merged, and leaves what is only called so."""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig.command import invoke
from rig.disks import drive
from rig.folder import live, names
from rig.headers import raw_header
from rig.left import note_stashed, record
from rig.machines import MIB, Content, fill, make_chain, run

import qmpmerge
from qmpmerge.errors import CannotRecover, NoSuchStash
from qmpmerge.folder import Folder
from qmpmerge.images import dependents, files, stashed
from qmpmerge.images.notes import put_on
from qmpmerge.journal import merged_files, spared, store

STASHED = [f"{name}.qcow2.merged" for name in "abc"]


async def merged(images: list[Path], **options: Any) -> qmpmerge.Outcome:
    async with qmpmerge.offline(images[-1]) as target:
        return await qmpmerge.commit(target, **options)


async def kept(*paths: Path, **options: Any) -> dict[str, str | None]:
    return {os.path.basename(one.file): one.obstacle for one in await qmpmerge.clean(paths, **options)}


def notes(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob(".*.qmpmerge-stashed*"))


@pytest.mark.parametrize("way", ["live", "offline"])
async def test_a_merge_leaves_a_note_beside_each_file(
    way: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    if way == "live":
        with drive(tmp_path, images, content) as setup:
            await live(setup)
            setup.write(1, 0, MIB)
    else:
        await merged(images)
    found = [stashed.look(str(tmp_path / name)) for name in STASHED]
    assert [(note.original, note.base, note.format) for note in found if isinstance(note, stashed.Note)] == [
        (str(image), str(images[0]), "qcow2") for image in images[1:]
    ]
    assert await kept(tmp_path) == dict.fromkeys(STASHED)
    assert (names(tmp_path), notes(tmp_path)) == (["base.raw"], [])


async def test_without_extended_attributes_it_is_no_stranger_either(tmp_path: Path, images: list[Path]) -> None:
    """So the next merge need not be told that it is no dependent."""
    await merged(images, top="[3]")
    assert [os.listxattr(tmp_path / name) for name in STASHED[:2]] == [[], []]
    chain = qmpmerge.Chain((dependents.image_at(str(images[0])),))
    assert (
        dependents.look_now(
            chain.images, qmpmerge.Chain((*chain.images, dependents.image_at(str(images[3]))))
        ).dependents
        == ()
    )


# --- strangers ------------------------------------------------------------------------------------------------------------


def older_data(folder: Path) -> Path:
    """Somebody's overlay, with data that no base has."""
    image = folder / "vm2.qcow2.merged"
    run("qemu-img", "create", "-qf", "qcow2", "-b", "base.raw", "-F", "raw", image, "8M", cwd=folder)
    run("qemu-io", "-c", f"write -P 0xee 0 {MIB}", image)
    return image


def alone(folder: Path) -> Path:
    image = folder / "vm2.qcow2.merged.2"
    run("qemu-img", "create", "-qf", "qcow2", image, "8M")
    return image


def elsewhere(folder: Path) -> Path:
    (folder / "sub").mkdir()
    image = folder / "sub" / "vm2.qcow2.merged"
    run("qemu-img", "create", "-qf", "qcow2", "-b", folder / "base.raw", "-F", "raw", image, "8M")
    return image


def written_to(folder: Path) -> Path:
    """A stashed one that somebody has brought to life under that name."""
    image = older_data(folder)
    note_stashed(image, folder / "base.raw")
    run("qemu-io", "-c", f"write -P 0xee {MIB} {MIB}", image)
    return image


STRANGERS: dict[Callable[[Path], Path], str] = {
    older_data: "nothing but its name says that a merge has stashed it, and {}/base.raw does not show what it shows",
    alone: "nothing but its name says that a merge has stashed it, and there is no image below it",
    elsewhere: "nothing but its name says that a merge has stashed it, and it cannot be compared: ",
    written_to: "it was written to since a merge stashed it, and {}/base.raw does not show what it shows",
}


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.__name__)
async def test_what_is_only_called_so_stays_however_it_is_named(
    stranger: Callable[[Path], Path], tmp_path: Path, images: list[Path]
) -> None:
    image = stranger(tmp_path)
    reason = (await kept(image))[image.name] or ""
    assert reason.startswith(STRANGERS[stranger].format(tmp_path)), reason
    assert await kept(image.parent) == {image.name: reason} and image.exists()
    assert [one.name for one in await qmpmerge.examine(tmp_path) if one.name == "stashed"] == []
    told = invoke("clean", str(image), "--json")
    assert (told.code, told.document["verdict"], told.document["stashed"][0]["obstacle"]) == (0, "unchanged", reason)
    run(*shlex.split(reason.split("`")[-2]))
    assert not image.exists()


async def test_a_vm_that_runs_on_the_base_cannot_be_compared_with(tmp_path: Path, images: list[Path]) -> None:
    image = older_data(tmp_path)
    with drive(tmp_path, images[:1], Content()):
        (reason,) = (await kept(image)).values()
    assert reason is not None and "cannot be compared with" in reason and "in use by" in reason


async def test_a_stranger_on_the_base_is_a_dependent(tmp_path: Path, images: list[Path]) -> None:
    image = older_data(tmp_path)
    with pytest.raises(qmpmerge.errors.Dependents, match=image.name):
        await merged(images)


# --- a base that is no more -----------------------------------------------------------------------------------------------


def truncated(base: Path) -> str:
    os.truncate(base, 0)
    return "has become smaller since, and {}/base.raw does not show what it shows"


def moved_away(base: Path) -> str:
    base.rename(base.with_suffix(".bak"))
    return "cannot be looked at (No such file or directory), and it cannot be compared: "


def replaced(base: Path) -> str:
    os.replace(base.with_suffix(".old"), base)
    return "is another file now, and {}/base.raw does not show what it shows"


def restored(base: Path) -> str:
    """With its time, into the same file, as `cp -p` and `rsync --inplace` do."""
    run("cp", "-p", base.with_suffix(".old"), base)
    return "is older than the merge, and {}/base.raw does not show what it shows"


@pytest.mark.parametrize("lose", [truncated, moved_away, replaced, restored], ids=lambda lose: str(lose.__name__))
async def test_without_the_base_that_has_their_data_all_stay(
    lose: Callable[[Path], str], tmp_path: Path, images: list[Path], content: Content
) -> None:
    shutil.copy2(images[0], tmp_path / "base.old")
    await merged(images)
    reason = f"{images[0]}, which has its data since, {lose(images[0]).format(tmp_path)}"
    told = await kept(tmp_path)
    assert sorted(told) == STASHED and (told[STASHED[2]] or "").startswith(reason), told
    assert [told[name] for name in STASHED[:2]] == [f"{tmp_path}/{name} is built on it" for name in STASHED[1:]]
    assert set(STASHED) <= set(names(tmp_path))


async def test_a_base_that_was_merged_itself_is_where_that_went(tmp_path: Path, images: list[Path]) -> None:
    await merged(images, base="[2]")
    await merged(images[:2])
    assert names(tmp_path) == ["a.qcow2.merged", "b.qcow2.merged", "base.raw", "c.qcow2.merged"]
    images[0].rename(tmp_path / "elsewhere.raw")
    assert None not in (await kept(tmp_path)).values()
    (tmp_path / "elsewhere.raw").rename(images[0])
    assert await kept(tmp_path) == dict.fromkeys(STASHED)


async def test_a_guest_that_writes_to_the_base_is_no_reason(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    await merged(images)
    with drive(tmp_path, images[:1], content) as setup:
        setup.write(9, 0, MIB)
    assert await kept(tmp_path) == dict.fromkeys(STASHED)


# --- what is built on them ------------------------------------------------------------------------------------------------


async def test_what_stays_keeps_all_that_it_is_built_on(tmp_path: Path, images: list[Path]) -> None:
    """Also where only the upper one is built on by an image that is alive."""
    await merged(images, top="[3]")
    over = tmp_path / "over.qcow2"
    run("qemu-img", "create", "-quf", "qcow2", "-b", "b.qcow2.merged", "-F", "qcow2", over, "8M", cwd=tmp_path)
    built = {STASHED[0]: f"{tmp_path}/{STASHED[1]} is built on it", STASHED[1]: f"{over} is built on it"}
    assert await kept(tmp_path) == built
    assert await kept(tmp_path / STASHED[0]) == {STASHED[0]: built[STASHED[0]]}
    over.unlink()
    (tmp_path / "loop").symlink_to("loop")
    assert await kept(tmp_path / STASHED[0]) == {STASHED[0]: None}


async def test_a_young_one_keeps_what_it_is_built_on(tmp_path: Path, images: list[Path]) -> None:
    await merged(images, top="[3]")
    note_stashed(tmp_path / STASHED[0], images[0], since=time.time() - 7 * 86400)
    told = await kept(tmp_path, older_than=86400.0)
    assert told[STASHED[0]] == f"{tmp_path}/{STASHED[1]} is built on it"


@pytest.mark.parametrize("form", ["qed", "riddle"])
async def test_overlays_of_every_kind_keep_them(form: str, tmp_path: Path, images: list[Path]) -> None:
    await merged(images, top="[2]")
    over = tmp_path / "over"
    if form == "qed":
        run("qemu-img", "create", "-qf", "qed", "-b", STASHED[0], "-F", "qcow2", over, cwd=tmp_path)
    else:
        over.write_bytes(raw_header(f"json:{{'file.filename':'{tmp_path}/{STASHED[0]}'}}".encode(), b"qcow2"))
    reason = (await kept(tmp_path))[STASHED[0]] or ""
    assert str(over) in reason and "built on" in reason


async def test_an_overlay_in_another_folder_keeps_them(tmp_path: Path, images: list[Path]) -> None:
    """Only a note beside the image tells of it; where that leads nowhere, nobody knows."""
    far = tmp_path / "far" / "d.qcow2"
    far.parent.mkdir()
    run("qemu-img", "create", "-qf", "qcow2", "-b", images[3], "-F", "qcow2", far)
    await merged(images)
    images[3].touch()  # a note is put beside a file that is there
    noted = Path(put_on(str(images[3]), files.inode(str(images[3])), str(far)))
    images[3].unlink()
    assert (await kept(tmp_path))[STASHED[2]] == f"{far} is built on it"
    far.unlink()
    told = await kept(tmp_path)
    assert None not in told.values() and f"{far} is not there" in (told[STASHED[2]] or "")
    run(*shlex.split((told[STASHED[2]] or "").split("`")[1]))
    assert not os.path.lexists(noted)
    assert await kept(tmp_path) == dict.fromkeys(STASHED)


async def test_what_is_written_to_after_it_was_proved_stays(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    await merged(images, top="[2]")
    in_use = spared.in_use

    def late(path: str) -> str | None:
        user = in_use(path)
        run("qemu-io", "-c", f"write -P 0xee 0 {MIB}", path)
        return user

    monkeypatch.setattr(spared, "in_use", late)
    assert await kept(tmp_path) == {STASHED[0]: "it has been written to meanwhile"}
    assert (tmp_path / STASHED[0]).exists()


# --- proved by comparison -------------------------------------------------------------------------------------------------


async def test_without_notes_what_the_base_shows_is_proved(tmp_path: Path) -> None:
    """The upper one by itself, the lower one since it lies below that."""
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    await merged(images, top="[3]")
    for note in notes(tmp_path):
        (tmp_path / note).unlink()
    assert await kept(tmp_path, dry_run=True) == dict.fromkeys(STASHED[:2])
    (reason,) = (await kept(tmp_path / STASHED[0])).values()
    assert reason is not None and "b.qcow2.merged is built on it" in reason
    assert await kept(tmp_path) == dict.fromkeys(STASHED[:2])
    assert names(tmp_path) == ["base.raw", "c.qcow2"]
    content.check(images[3])


async def test_two_of_one_name_are_not_chosen_from(tmp_path: Path) -> None:
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    await merged(images, top="[3]")
    for note in notes(tmp_path):
        (tmp_path / note).unlink()
    (tmp_path / "a.qcow2.merged.2").write_bytes((tmp_path / "a.qcow2.merged").read_bytes())
    assert all(reason is not None for reason in (await kept(tmp_path)).values())


# --- notes and kills ------------------------------------------------------------------------------------------------------


class Death(BaseException):
    """As SIGKILL does."""


@pytest.mark.parametrize("at", ["remove", "sync"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
async def test_killed_anywhere_the_next_one_finishes(
    at: str, step: int, tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    await merged(images, top="[3]")
    steps = iter(range(1, 99))
    function = getattr(Folder, at)

    def dies(*arguments: object) -> None:
        if next(steps) == step:
            raise Death
        function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, at, dies)
        try:
            await qmpmerge.clean([tmp_path])
        except Death:
            assert step < 5
    left = await kept(tmp_path)
    assert set(left.values()) <= {None}
    assert (names(tmp_path), notes(tmp_path)) == (["base.raw", "c.qcow2"], [])


async def test_a_note_whose_file_is_gone_goes_quietly(tmp_path: Path, images: list[Path]) -> None:
    await merged(images, top="[3]")
    (tmp_path / STASHED[0]).unlink()
    (tmp_path / STASHED[1]).rename(tmp_path / "b.qcow2")
    (tmp_path / ".theirs.merged.qmpmerge-stashed").symlink_to(images[0])
    assert await kept(tmp_path, dry_run=True) == {} and len(notes(tmp_path)) == 3
    assert await kept(tmp_path) == {}
    assert notes(tmp_path) == [".theirs.merged.qmpmerge-stashed"]


async def test_a_merge_killed_before_its_record_goes_has_its_notes(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_arguments: object) -> None:
        raise Death

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(store, "remove", die)
        await merged(images, top="[3]")
    assert set((await kept(tmp_path)).values()) == {"a merge that was not finished may need it"}
    await qmpmerge.recover(tmp_path)
    assert await kept(tmp_path) == dict.fromkeys(STASHED[:2])


async def test_a_note_that_cannot_be_kept_is_said(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, note: stashed.Note) -> Folder:
        raise OSError(28, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr(stashed, "put", full)
        outcome = await merged(images, top="[3]")
    assert sum("no note could be kept beside" in hint and "No space left" in hint for hint in outcome.hints) == 2
    assert await kept(tmp_path) == dict.fromkeys(STASHED[:2])


async def test_nothing_is_noted_while_the_guest_is_paused(
    tmp_path: Path, images: list[Path], content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    with drive(tmp_path, images, content) as setup:
        setup.machine.session.execute("cont")
        put, states = stashed.put, []

        def noted(path: str, note: stashed.Note) -> Folder:
            states.append(setup.machine.session.execute("query-status")["status"])
            return put(path, note)

        monkeypatch.setattr(stashed, "put", noted)
        assert (await live(setup)).paused_seconds is not None
    assert states == ["running"] * 3


async def test_a_name_that_is_given_back_has_no_note(tmp_path: Path, images: list[Path]) -> None:
    told = record(images, 4)
    os.rename(images[3], told.away[4])
    note_stashed(Path(told.away[4]), images[0])
    assert merged_files.give_back(told, 4)
    assert notes(tmp_path) == []


@pytest.mark.parametrize("top", ["[2]", "[3]"])
async def test_an_image_that_kept_its_name_is_put_out_of_the_way_and_its_note_goes(
    top: str, tmp_path: Path, images: list[Path]
) -> None:
    """It keeps the next merge from being made, which names the command that ends that."""
    await merged(images, top=top, merged_files="keep")
    error = invoke("commit", str(images[3]), "--base", str(images[0]), "--json").document["error"]
    for part in [error] if error["name"] == "dependents" else error["facts"]["refusals"]:
        for command in part["hint"].split("`")[1::2]:
            if not command.startswith("qmpmerge pull"):  # the other way to shorten the chain
                subprocess.run(["sh", "-c", command], check=True)
    assert invoke("commit", str(images[3]), "--base", str(images[0])).code == 0
    assert list(tmp_path.glob(".*.qmpmerge-merged"))
    assert invoke("clean", str(tmp_path)).code == 0
    noted = {
        file.name.removeprefix(".").removesuffix(".qmpmerge-merged") for file in tmp_path.glob(".*.qmpmerge-merged")
    }
    assert noted == {name for name in ("a.qcow2", "b.qcow2")[: int(top[1]) - 1] if (tmp_path / name).exists()}


# --- what was asked for -------------------------------------------------------------------------------------------------


async def test_only_what_was_stashed_so_long_ago(tmp_path: Path, images: list[Path]) -> None:
    await merged(images, top="[3]")
    note_stashed(tmp_path / STASHED[1], images[0], since=time.time() - 7 * 86400)
    young = invoke("clean", str(tmp_path), "--older-than", "7d", "--json").document["stashed"]
    assert [one["obstacle"] is None for one in young] == [False, True]
    assert "it was stashed at 2" in young[0]["obstacle"]
    for none in ("soon", "5"):  # is it days or seconds?
        assert invoke("clean", str(tmp_path), "--older-than", none).code == 2


async def test_when_is_not_known_without_a_note(tmp_path: Path, images: list[Path]) -> None:
    await merged(images, top="[2]")
    (tmp_path / notes(tmp_path)[0]).unlink()
    assert await kept(tmp_path, older_than=0.0) == {STASHED[0]: "when it was stashed is not known"}


async def test_a_file_that_is_none_is_named(tmp_path: Path, images: list[Path]) -> None:
    with pytest.raises(NoSuchStash):
        await qmpmerge.clean([images[3]])
    with pytest.raises(NoSuchStash):
        await qmpmerge.clean([tmp_path / "nothing.merged"])


async def test_what_cannot_be_removed_is_told(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: Folder, name: str, inode: object) -> None:
        raise OSError(30, "Read-only file system", name)

    await merged(images, top="[3]")
    monkeypatch.setattr(Folder, "remove", refuse)
    with pytest.raises(CannotRecover, match="Read-only"):
        await qmpmerge.clean([tmp_path])
