"""Our own lock beside the base: two of us never meet, and nothing is left behind."""

import contextlib
import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.nobody import as_nobody, public

from qmpmerge.chain.chain import Image
from qmpmerge.errors import CannotLock, Locked
from qmpmerge.folder import File, Folder
from qmpmerge.journal import locks
from qmpmerge.journal.locks import Note

HOLDER = """
import sys
from qmpmerge.chain.chain import Image
from qmpmerge.journal import locks
with locks.held(Image(sys.argv[1], "raw", 0)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base(tmp_path: Path) -> Image:
    (tmp_path / "base.raw").touch()
    return Image(str(tmp_path / "base.raw"), "raw", 0)


@contextlib.contextmanager
def another_process(base: Image) -> Iterator[subprocess.Popen[bytes]]:
    """A second qmpmerge, so to speak: it holds the lock until its stdin ends."""
    command = [sys.executable, "-c", HOLDER, base.file]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process


def is_free(base: Image) -> bool:
    """Whether the lock can be taken; it is given back at once."""
    try:
        with locks.held(base):
            return True
    except Locked:
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- who waits for whom -------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_has_ended(base: Image) -> None:
    with another_process(base) as process:
        with pytest.raises(Locked) as error, locks.held(base):
            pytest.fail("two hold the lock")
        assert error.value.facts == {"base": base.file, "lock": locks.lock_path(base)}
        end(process)
        assert is_free(base)


def test_a_second_holder_in_the_same_process_is_refused_too(base: Image) -> None:
    with locks.held(base):
        assert not is_free(base)
    assert is_free(base)


def test_a_refusal_leaves_the_holder_its_lock(base: Image) -> None:
    with locks.held(base):
        assert not is_free(base)
        assert not is_free(base)
        assert os.path.exists(locks.lock_path(base))


def test_a_killed_holder_does_not_lock_us_out(base: Image) -> None:
    with another_process(base) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert os.path.exists(locks.lock_path(base))  # nobody was there to remove it
        assert is_free(base)


def test_two_bases_in_one_folder_do_not_keep_each_other_waiting(base: Image) -> None:
    with locks.held(base):
        assert is_free(Image(f"{base.file}2", "raw", 0))


# --- what a pull has found of the image ---------------------------------------------------------------------------


def test_what_is_damaged_stays_so_until_its_merge_is_done_or_another_file_has_its_name(
    base: Image, tmp_path: Path
) -> None:
    def found() -> None:
        with locks.held(base) as lock:
            lock.damaged(base, "it failed")
            lock.partial(base)
            lock.conclude(lock.note.suspect, damaged=lock.note.damaged, partial=lock.note.partial)

    found()
    assert locks.is_damaged(base) and locks.is_partial(base) and locks.noted(base).suspect == "it failed"
    (tmp_path / "other").touch()
    (tmp_path / "other").replace(base.file)
    assert not locks.is_damaged(base) and not locks.is_partial(base)
    found()
    os.unlink(base.file)
    locks.forget_image(base.file)
    assert left(tmp_path) == []


# --- the file -----------------------------------------------------------------------------------------------------


def test_the_lock_lies_beside_the_base_out_of_sight(base: Image, tmp_path: Path) -> None:
    with locks.held(base):
        assert left(tmp_path) == [".base.raw.qmpmerge-lock", "base.raw"]
        assert (tmp_path / ".base.raw.qmpmerge-lock").stat().st_mode & 0o777 == 0o600


def test_no_lock_file_is_left_behind(base: Image, tmp_path: Path) -> None:
    with locks.held(base):
        pass
    assert left(tmp_path) == ["base.raw"]


def test_no_lock_file_is_left_behind_by_a_merge_that_fails(base: Image, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locks.held(base):
        raise ZeroDivisionError
    assert left(tmp_path) == ["base.raw"] and is_free(base)


def test_the_file_of_a_killed_holder_goes_with_the_next_one(base: Image, tmp_path: Path) -> None:
    Path(locks.lock_path(base)).touch()
    assert is_free(base)
    assert left(tmp_path) == ["base.raw"]


def test_a_lock_file_that_was_removed_under_its_holder_does_no_harm(base: Image, tmp_path: Path) -> None:
    with locks.held(base):
        os.unlink(locks.lock_path(base))
    assert left(tmp_path) == ["base.raw"]


def test_a_waiting_process_does_not_take_a_lock_whose_file_has_gone(
    base: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder removes the file between our open and our flock: what we then hold is no lock."""
    path, create = locks.lock_path(base), Folder.create

    def create_then_lose(place: Folder, name: str) -> File:
        file = create(place, name)
        monkeypatch.undo()
        os.unlink(path)
        return file

    monkeypatch.setattr(Folder, "create", create_then_lose)
    with locks.held(base):
        assert os.path.exists(path)
        assert not is_free(base)


# --- which file it is ---------------------------------------------------------------------------------------------


def test_a_symlinked_base_has_the_lock_of_the_file_it_leads_to(base: Image, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "golden").symlink_to(base.file)
    linked = Image(str(elsewhere / "golden"), "raw", 0)
    assert locks.lock_path(linked) == locks.lock_path(base)
    with locks.held(linked):
        assert not is_free(base)
        assert left(elsewhere) == ["golden"]


def test_a_base_in_a_linked_folder_has_the_lock_of_the_file_it_leads_to(base: Image, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(tmp_path)
    with locks.held(Image(str(tmp_path / "linked" / "base.raw"), "raw", 0)):
        assert not is_free(base)


PLANTED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "symlink": (lambda lock, victim: lock.symlink_to(victim), "it is a symlink"),
    "dangling": (lambda lock, victim: lock.symlink_to("nowhere"), "it is a symlink"),
    "hard link": (lambda lock, victim: lock.hardlink_to(victim), "it is a hard link to another file"),
    "fifo": (lambda lock, victim: os.mkfifo(lock), "it is no regular file"),
    "folder": (lambda lock, victim: lock.mkdir(), "it is no regular file"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_in_the_place_of_the_lock_is_refused_and_not_written(
    base: Image, tmp_path: Path, planted: str
) -> None:
    lock, victim = Path(locks.lock_path(base)), tmp_path / "precious"
    victim.write_text("keep me")
    plant, reason = PLANTED[planted]
    plant(lock, victim)
    before = victim.stat()
    with pytest.raises(CannotLock, match=reason) as error, locks.held(base):
        pytest.fail("it was locked")
    after = victim.stat()
    assert (victim.read_text(), after.st_mode, after.st_mtime_ns) == ("keep me", before.st_mode, before.st_mtime_ns)
    assert os.path.lexists(lock)
    subprocess.run(error.value.hint.split("`")[1], shell=True, check=True)
    assert is_free(base)
    assert victim.read_text() == "keep me"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_the_lock_of_somebody_who_has_no_say_in_the_image_is_refused(base: Image) -> None:
    """Whose it is can take back what is noted in it."""
    lock = Path(locks.lock_path(base))
    lock.touch()
    os.chown(lock, 65534, 65534)
    with pytest.raises(CannotLock, match="it belongs to another user"), locks.held(base):
        pytest.fail("it was locked")
    os.chown(base.file, 65534, 65534)
    assert is_free(base)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize("is_held", [True, False])
def test_the_lock_of_another_user_is_not_taken_for_none(is_held: bool) -> None:
    with public() as folder:
        folder.chmod(0o777)
        base = Image(str(folder / "base.raw"), "raw", 0)
        Path(base.file).touch(0o600)
        with another_process(base) if is_held else contextlib.nullcontext():
            if not is_held:
                Path(locks.lock_path(base)).touch(0o600)
            with as_nobody(), pytest.raises(Locked if is_held else CannotLock), locks.held(base):
                pytest.fail("two hold the lock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_who_may_write_the_image_may_lock_it(base: Image) -> None:
    """An image that is shared by a group, or that root merges for its owner: what was left is theirs."""
    os.chown(base.file, 65534, 65533)
    for mode, expected in ((0o664, 0o660), (0o644, 0o600), (0o600, 0o600)):
        os.chmod(base.file, mode)
        with locks.held(base):
            status = os.stat(locks.lock_path(base))
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (65534, 65533, expected)


def test_a_note_that_there_is_no_room_for_is_an_error(base: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what there was room for once there is room for later, however much is to be said."""
    with locks.held(base) as lock:
        lock.point_to("/vm/.c.qcow2.qmpmerge-record")
        before = os.stat(locks.lock_path(base))
        lock.suspect("storage " * 5000)
        after = os.stat(locks.lock_path(base))
        assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
        write = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: write(descriptor, data[:9], at) + len(data) - 9)
        with pytest.raises(OSError, match="does not read back"):
            lock.suspect("storage")
        monkeypatch.undo()
        lock.conclude(None)


# --- where there is none ------------------------------------------------------------------------------------------


def test_a_base_without_a_path_has_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remote = Image("nbd://host/base", "raw", 0)
    with locks.held(remote):
        assert is_free(remote)
        assert left(tmp_path) == []


def test_a_folder_that_is_gone_has_no_lock(tmp_path: Path) -> None:
    with locks.held(Image(str(tmp_path / "missing" / "base.raw"), "raw", 0)):
        assert left(tmp_path) == []


UNPRIVILEGED = """
import os, sys
from qmpmerge.chain.chain import Image
from qmpmerge.journal import locks
if os.getuid() == 0:
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
with locks.held(Image(sys.argv[1], "raw", 0)):
    print(sorted(os.listdir(os.path.dirname(sys.argv[1]))))
"""


def test_a_folder_where_we_may_not_write_has_no_lock() -> None:
    with tempfile.TemporaryDirectory() as folder:  # that another user may look into, unlike pytest's
        os.chmod(folder, 0o555)
        nobody = str(pwd.getpwnam("nobody").pw_uid)
        command = [sys.executable, "-c", UNPRIVILEGED, f"{folder}/base.raw", nobody]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        os.chmod(folder, 0o755)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_note_is_read_by_who_comes_next(base: Image) -> None:
    with locks.held(base) as lock:
        lock.suspect("long reason " * 100)
        lock.suspect("storage")
        lock.point_to("/vm/.c.qcow2.qmpmerge-record")
    assert locks.noted(base) == Note("/vm/.c.qcow2.qmpmerge-record", "storage")
    with locks.held(base) as lock:
        assert lock.note == locks.noted(base)
        lock.conclude("storage")
    assert locks.noted(base) == Note(suspect="storage")
    with locks.held(base) as lock:
        lock.conclude(None)
    assert locks.noted(base) == Note() and [file.name for file in Path(base.file).parent.iterdir()] == ["base.raw"]


def test_all_images_that_are_written_are_locked(base: Image, tmp_path: Path) -> None:
    other = Image(str(tmp_path / "c.qcow2"), "qcow2", 0)
    with locks.held(base, other), pytest.raises(Locked), locks.held(other):
        pass
    with locks.held(other), pytest.raises(Locked), locks.held(base, other):
        pass
    with locks.held(base):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["base.raw"]
