"""The record's file: written whole, read with suspicion."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rig import command
from rig.machines import Content

from qmpmerge.chain.chain import Chain, Image, Slice
from qmpmerge.chain.state import State
from qmpmerge.errors import RecordNotBelieved
from qmpmerge.folder import Folder
from qmpmerge.images.files import Seen
from qmpmerge.images.stashed import original_of
from qmpmerge.journal import stash, store
from qmpmerge.journal.record import Record
from qmpmerge.journal.store import Disbelieved
from qmpmerge.processes import proc
from qmpmerge.processes.proc import Process


@pytest.fixture
def told(tmp_path: Path) -> Record:
    """Of a chain of three whose files are there."""
    images: list[Image] = []
    for number, name in enumerate(("base.raw", "a.qcow2", "b\udcff.qcow2")):
        path = str(tmp_path / name)
        Path(path).write_bytes(bytes(number))
        status = os.stat(path)
        below = images[-1] if images else None
        backing, form = (below.name, "qcow2") if below else (None, "raw")
        part = None if below else Slice(512)
        images.append(Image(path, form, 4096, backing=backing, inode=(status.st_dev, status.st_ino), slice=part))
    chain = Chain(tuple(images))
    return Record(
        path=store.path_of(chain.active.file),
        target="/run/vm.sock",
        disk="vda",
        job="qmpmerge-commit-vda",
        chain=chain,
        base=1,
        top=3,
        qemu=proc.process(os.getpid()),
        tool=proc.process(os.getpid()),
        away={index: stash.stash_of(chain[index].file) for index in (2, 3)},
        was_left_ready=True,
        seen={1: Seen(2**63, 2**62), 3: Seen(0, 1)},
        before={2: Seen(1, 2)},
    )


def test_it_is_read_as_it_was_written(told: Record) -> None:
    assert store.write(told) == store.beside(told.chain.active.file) == told
    assert os.stat(told.path).st_mode & 0o777 == 0o600
    assert store.in_folder(os.path.dirname(told.path)) == store.about(told.chain) == [told]
    assert not store.about(Chain((replace(told.chain.base, inode=(0, 0)),)))
    store.remove(told)
    store.remove(told)
    assert os.listdir(os.path.dirname(told.path)) and not store.in_folder(os.path.dirname(told.path))


def test_a_mark_changes_the_first_line_only(told: Record) -> None:
    store.write(told)
    before = Path(told.path).read_bytes()
    marked = store.mark(replace(told, state=State.SWITCHED, verified=True, seen={}))
    after = Path(told.path).read_bytes()
    assert store.read(told.path) == marked
    assert (len(after), after[256:], after[255:256]) == (len(before), before[256:], b"\n")


def reason(told: Record) -> str:
    """Why what lies there now is not believed."""
    found = store.read(told.path)
    assert isinstance(found, Disbelieved), found
    assert (found.path, found.image) == (told.path, told.chain.active.file)
    return found.reason


def test_what_is_not_whole_is_not_believed(told: Record) -> None:
    store.write(told)
    data = Path(told.path).read_bytes()
    for length in range(0, len(data), 3):
        Path(told.path).write_bytes(data[:length])
        assert reason(told) == "it was cut short", length
    for place in range(0, len(data), 3):
        Path(told.path).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert store.read(told.path) is not None  # whatever it makes of it


@pytest.mark.parametrize(
    "change",
    [
        {"state": "done"},
        {"state": "safe"},
        {"policy": "shred"},
        {"base": 0},
        {"base": 3},
        {"top": 4},
        {"images": []},
        {"away": [[3, "/etc/passwd"]]},
        {"away": [[9, "x.merged"]]},
        {"away": [[1, "/vm/base.raw.merged"]]},
        {"tool": {"pid": 1}},
        {"seen": [[1, 2]]},
        {"since": "soon"},
    ],
    ids=str,
)
def test_what_cannot_be_is_not_believed(change: dict[str, object], told: Record) -> None:
    """Names above all: nobody can have us rename a file to anything but its own stashed name."""
    store.write(told)
    state, _, rest = Path(told.path).read_bytes().partition(b"\n")
    document = {**json.loads(rest), **json.loads(state), **change}
    Path(told.path).write_bytes(json.dumps(document).encode() + b"\n{}\n")
    assert reason(told) == "it makes no sense"


def test_another_schema_is_named(told: Record) -> None:
    store.write(told)
    state, _, rest = Path(told.path).read_bytes().partition(b"\n")
    Path(told.path).write_bytes(state + b"\n" + json.dumps({**json.loads(rest), "schema": 1}).encode() + b"\n")
    assert reason(told) == "it is of schema 1, this qmpmerge reads schema 5"


def test_what_is_not_ours_is_not_believed(told: Record, tmp_path: Path) -> None:
    store.write(told)
    os.rename(told.path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", told.path)
    assert reason(told) == "it is a symlink"
    os.unlink(told.path)
    os.mkfifo(told.path)
    assert reason(told) == "it is no regular file"
    os.unlink(told.path)
    os.mkdir(told.path)
    assert reason(told) == "it is no regular file"
    os.rmdir(told.path)
    if os.geteuid() == 0:
        store.write(told)
        os.chown(told.path, 12345, -1)
        assert reason(told) == "it belongs to another user (12345)"


def test_what_is_larger_than_any_record_is_neither_read_nor_written(
    told: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LARGEST", 1000)
    with pytest.raises(OSError, match="File too large"):
        store.write(told)
    assert store.read(told.path) is None
    Path(told.path).write_bytes(bytes(1001))
    assert reason(told) == "it has 1001 bytes, which is too many"


def test_a_record_of_a_thousand_layers_is_read(told: Record) -> None:
    """0.1 wrote what it did not read: 4 MiB were its limit."""
    name = told.chain.active.file
    images = [replace(told.chain.base, file=f"{name}.{number:->3000}", inode=(1, number)) for number in range(2000)]
    large = replace(told, chain=Chain(tuple(images)), top=2000, away={})
    assert store.write(large) == large
    assert os.stat(large.path).st_size > 4 * 1024 * 1024


def test_a_write_that_a_full_disk_cuts_short_is_noticed(told: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def in_part(descriptor: int, data: bytes, offset: int) -> int:
        if offset == 0:
            return write(descriptor, data[:100], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", in_part)
    before = os.listdir(os.path.dirname(told.path))
    with pytest.raises(OSError, match="No space left"):
        store.write(told)
    assert os.listdir(os.path.dirname(told.path)) == before


def test_what_does_not_read_back_is_no_record(told: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one that was there stays."""
    write, folder = os.pwrite, os.path.dirname(told.path)
    before = os.listdir(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda descriptor, data, at: write(descriptor, data[:-1], at) + 1)
        with pytest.raises(OSError, match="does not read back"):
            store.write(told)
    assert os.listdir(folder) == before
    store.write(told)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda descriptor, data, at: write(descriptor, data[:-1], at) + 1)
        with pytest.raises(OSError, match="does not read back"):
            store.write(replace(told, disk="another"))
    assert store.read(told.path) == told


def test_a_name_that_is_not_durable_is_taken_away_again(told: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(place: Folder) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = os.listdir(os.path.dirname(told.path))
    monkeypatch.setattr(Folder, "sync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        store.write(told)
    assert os.listdir(os.path.dirname(told.path)) == before


def test_what_is_not_believed_may_concern_us(told: Record) -> None:
    """Unless it lies beside an image that is there, and is no part of the chain."""
    Path(told.path).write_text("garbage")
    assert [type(found) for found in store.about(told.chain)] == [Disbelieved]
    below = Chain(told.chain.images[:2])
    assert store.about(below) == []
    os.rename(told.chain.active.file, told.away[3])
    assert len(store.about(below)) == 1
    with pytest.raises(RecordNotBelieved, match="cut short"):
        store.believed(store.about(below))


def test_it_is_not_written_through_a_link(told: Record, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.symlink(victim, told.path)
    os.symlink(victim, f"{told.path}.new")
    store.write(told)
    assert (victim.read_text(), store.read(told.path)) == ("precious", told)


def test_files_are_known_by_their_inodes(told: Record) -> None:
    active, stashed = told.chain.active.file, told.away[3]
    assert told.place(3) == active
    os.rename(active, stashed)
    assert told.place(3) == stashed
    Path(active).write_bytes(b"another")
    assert told.place(3) == stashed
    os.unlink(stashed)
    assert told.place(3) is None


def test_after_a_reboot_device_numbers_may_be_others(told: Record) -> None:
    moved = Chain(tuple(replace(image, inode=(1, image.inode[1] if image.inode else 0)) for image in told.chain))
    assert replace(told, chain=moved).place(3) is None
    assert told.tool is not None
    earlier = replace(told, chain=moved, tool=replace(told.tool, boot="another"))
    assert earlier.place(3) == told.chain.active.file


def test_a_process_is_not_taken_for_a_later_one() -> None:
    mine = proc.process(os.getpid())
    assert mine is not None and mine.is_alive
    assert not Process(mine.pid, mine.started - 1, mine.boot).is_alive
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert proc.process(child.pid) is None, "a zombie"


def test_stashed_names(tmp_path: Path) -> None:
    file = str(tmp_path / "a.qcow2")
    names = []
    for _ in range(3):
        names.append(stash.stash_of(file))
        Path(names[-1]).touch()
    assert [os.path.basename(name) for name in names] == ["a.qcow2.merged", "a.qcow2.merged.2", "a.qcow2.merged.3"]
    assert [original_of(name) for name in names] == [file] * 3
    assert [original_of(name) for name in ("a.2", "merged", "a.merged.x", "a.qcow2")] == [None] * 4


@pytest.mark.parametrize("planted", ["mkdir {0}", "mkdir {0} {0}/full", "mkfifo {0}", "ln -s nowhere {0}", "touch {0}"])
def test_what_has_a_records_name_is_moved_away_by_the_hint(planted: str, images: list[Path], content: Content) -> None:
    """Nothing is begun until then, and nothing of what lies there is lost."""
    record = images[3].parent / ".c.qcow2.qmpmerge-record"
    subprocess.run(planted.format(record), shell=True, check=True)
    before = {image: image.read_bytes() for image in images}
    refused = command.invoke("commit", str(images[3]), "--json")
    error = refused.document["error"]
    assert (refused.code, error["name"]) == (3, "record-not-believed")
    assert {image: image.read_bytes() for image in images} == before
    (moving,) = [line for line in error["hint"].split("`")[1::2] if line.startswith("mv ")]
    subprocess.run(moving, shell=True, check=True)
    assert not os.path.lexists(record) and len(list(record.parent.glob(f"{record.name}.*"))) == 1
    assert command.invoke("commit", str(images[3]), "--json").document["verdict"] == "pivoted"
    content.check(images[0])


def test_a_folder_in_the_way_of_a_new_record_is_named(images: list[Path], content: Content) -> None:
    """Before the job is started."""
    obstacle = images[3].parent / ".c.qcow2.qmpmerge-record.new"
    obstacle.mkdir()
    refused = command.invoke("commit", str(images[3]), "--json")
    error = refused.document["error"]
    assert (refused.code, error["name"]) == (3, "cannot-record")
    assert obstacle.name in error["message"]
    obstacle.rmdir()
    assert command.invoke("commit", str(images[3])).code == 0
    content.check(images[0])


@pytest.mark.parametrize("planted", ["fifo", "symlink", "another"])
def test_what_is_planted_under_its_name_is_neither_waited_for_nor_written(
    told: Record, tmp_path: Path, planted: str
) -> None:
    """While a guest stands still: the record is what was written, whatever has its name."""
    written, victim = store.write(told), tmp_path / "victim"
    victim.write_text("precious")
    os.rename(told.path, f"{told.path}.moved")
    make: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(told.path),
        "symlink": lambda: os.symlink(victim, told.path),
        "another": lambda: shutil.copyfile(victim, told.path),
    }
    make[planted]()
    marked = store.mark(replace(written, state=State.SWITCHING))
    store.sync(marked)
    with pytest.raises(FileNotFoundError, match="is another file now"):
        store.remove(marked)
    assert isinstance(store.read(told.path), Disbelieved)
    assert victim.read_text() == "precious"
    os.replace(f"{told.path}.moved", told.path)
    assert store.read(told.path) == marked
    store.remove(marked)
    assert store.read(told.path) is None
