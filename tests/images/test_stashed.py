"""The note beside a stashed file: believed of the very file, as it was, and of no other."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rig.left import note_stashed

from qmpmerge.folder import File, Folder
from qmpmerge.images import stashed
from qmpmerge.images.files import Seen


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One that a merge has stashed."""
    (tmp_path / "base.raw").write_bytes(b"base")
    file = tmp_path / "a\udcff.qcow2.merged"
    file.write_bytes(b"data")
    note_stashed(file, tmp_path / "base.raw")
    return file


def test_it_is_read_as_it_was_written(file: Path, tmp_path: Path) -> None:
    note = note_stashed(file, tmp_path / "base.raw", since=1.5)
    assert stashed.look(str(file)) == replace(note, since=1.5) and stashed.is_stashed(str(file))
    path = stashed.note_path(str(file))
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert list(stashed.noted_in(str(tmp_path))) == [(path, str(file))]
    assert stashed.of(str(tmp_path / "a\udcff.qcow2")) == str(file)
    assert stashed.of(str(tmp_path / "base.raw")) is None


def test_a_note_that_would_not_be_believed_is_not_left(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filesystem that knows no modes."""
    put, note = Folder.put, stashed.look(str(file))

    def loose(place: Folder, name: str, data: bytes, mode: int) -> File:
        written = put(place, name, data, mode)
        written.allow(0o777)
        return written

    monkeypatch.setattr(Folder, "put", loose)
    assert isinstance(note, stashed.Note)
    with pytest.raises(OSError, match="others than its owner"):
        stashed.write(str(file), note)
    assert stashed.look(str(file)) == stashed.NO_NOTE


def test_a_name_is_no_note(tmp_path: Path) -> None:
    (tmp_path / "vm.merged").touch()
    assert stashed.look(str(tmp_path / "vm.merged")) == stashed.NO_NOTE
    assert not stashed.is_stashed(str(tmp_path / "vm.merged"))
    assert stashed.look(str(tmp_path / "vm")) == "it is not called like a stashed file"


def test_after_a_reboot_device_numbers_may_be_others(file: Path, tmp_path: Path) -> None:
    note_stashed(file, tmp_path / "base.raw", inode=(1, file.stat().st_ino))
    assert stashed.is_stashed(str(file))


def replaced(file: Path) -> str:
    shutil.copy2(file, f"{file}.new")
    os.replace(f"{file}.new", file)
    return "is about another file"


def written(file: Path) -> str:
    file.write_bytes(b"date")
    os.utime(file, ns=(0, 0))
    return "it was written to since"


def under_another_name(file: Path) -> str:
    other = file.with_name("vm.merged")
    os.rename(file, other)
    os.rename(stashed.note_path(str(file)), stashed.note_path(str(other)))
    os.symlink(other, file)
    os.link(stashed.note_path(str(other)), stashed.note_path(str(file)))
    os.unlink(stashed.note_path(str(other)))
    return "is about another file"


def edited(change: Callable[[dict[str, object]], object]) -> Callable[[Path], str]:
    def edit(file: Path) -> str:
        path = Path(stashed.note_path(str(file)))
        entry = json.loads(path.read_text())
        change(entry)
        path.write_text(json.dumps(entry))
        return "is not believed"

    return edit


def others(change: Callable[[Path], object]) -> Callable[[Path], str]:
    def spoil(file: Path) -> str:
        note = Path(stashed.note_path(str(file)))
        if change in (Path.mkdir, os.mkfifo):
            note.unlink()
        change(note)
        return "is not believed"

    return spoil


def owned(note: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(note, 65534, -1)


SPOILED = {
    "replaced": replaced,
    "written": written,
    "renamed": under_another_name,
    "schema": edited(lambda entry: entry.update(schema=2)),
    "inode": edited(lambda entry: entry.update(inode=None)),
    "seen": edited(lambda entry: entry.pop("seen")),
    "list": others(lambda note: note.write_text("[]")),
    "cut": others(lambda note: os.truncate(note, 20)),
    "deep": others(lambda note: note.write_text("[" * 60_000)),
    "mode": others(lambda note: note.chmod(0o660)),
    "linked": others(lambda note: os.link(note, f"{note}.2")),
    "folder": others(Path.mkdir),
    "fifo": others(os.mkfifo),
    "large": others(lambda note: os.truncate(note, stashed.LARGEST + 1)),
    "owner": others(owned),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_does_not_agree_is_no_stashed_file(spoil: Callable[[Path], str], file: Path) -> None:
    reason = spoil(file)
    assert reason in str(stashed.look(str(file)))
    assert not stashed.is_stashed(str(file))


def test_a_write_shows_though_size_and_name_are_the_same(file: Path, tmp_path: Path) -> None:
    note_stashed(file, tmp_path / "base.raw", seen=Seen(4, 1))
    assert stashed.look(str(file)) == "it was written to since a merge stashed it"
