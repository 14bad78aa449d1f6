"""The witness's file: written whole, read with suspicion."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.journal import stash, store
from qmpmerge.journal.record import Seen, Witness
from qmpmerge.processes import proc
from qmpmerge.processes.proc import Process


@pytest.fixture
def told(tmp_path: Path) -> Witness:
    """Of a chain of three whose files are there."""
    images: list[Image] = []
    for number, name in enumerate(("base.raw", "a.qcow2", "b\udcff.qcow2")):
        path = str(tmp_path / name)
        Path(path).write_bytes(bytes(number))
        status = os.stat(path)
        below = images[-1] if images else None
        backing, form = (below.name, "qcow2") if below else (None, "raw")
        images.append(Image(path, form, 4096, backing=backing, inode=(status.st_dev, status.st_ino)))
    chain = Chain(tuple(images))
    return Witness(
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
        seen={1: Seen(2**63, 2**62), 3: Seen(0, 1)},
        before={2: Seen(1, 2)},
    )


def test_it_is_read_as_it_was_written(told: Witness) -> None:
    assert store.write(told) == store.beside(told.chain.active.file) == told
    assert os.stat(told.path).st_mode & 0o777 == 0o600
    assert store.found(os.path.dirname(told.path)) == store.about(told.chain) == [told]
    assert not store.about(Chain((replace(told.chain.base, inode=(0, 0)),)))
    store.remove(told)
    store.remove(told)
    assert os.listdir(os.path.dirname(told.path)) and not store.found(os.path.dirname(told.path))


def test_a_mark_changes_the_first_line_only(told: Witness) -> None:
    store.write(told)
    before = Path(told.path).read_bytes()
    marked = store.mark(replace(told, phase="switched", verified=True, seen={}))
    after = Path(told.path).read_bytes()
    assert store.read(told.path) == marked
    assert (len(after), after[256:], after[255:256]) == (len(before), before[256:], b"\n")


def test_what_is_not_whole_is_not_believed(told: Witness) -> None:
    store.write(told)
    data = Path(told.path).read_bytes()
    for length in range(0, len(data), 3):
        Path(told.path).write_bytes(data[:length])
        assert store.read(told.path) is None, length
    for place in range(0, len(data), 3):
        Path(told.path).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        store.read(told.path)  # whatever it makes of it, it does not fail


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "done"},
        {"policy": "shred"},
        {"base": 0},
        {"base": 3},
        {"top": 4},
        {"images": []},
        {"away": [[3, "/etc/passwd"]]},
        {"away": [[9, "x.merged"]]},
        {"tool": {"pid": 1}},
        {"seen": [[1, 2]]},
    ],
    ids=str,
)
def test_what_cannot_be_is_not_believed(change: dict[str, object], told: Witness) -> None:
    """Names above all: nobody can have us rename a file to anything but its own stashed name."""
    store.write(told)
    state, _, rest = Path(told.path).read_bytes().partition(b"\n")
    document = {**json.loads(rest), **json.loads(state), **change}
    Path(told.path).write_bytes(json.dumps(document).encode() + b"\n{}")
    assert store.read(told.path) is None


def test_what_is_not_ours_is_not_believed(told: Witness, tmp_path: Path) -> None:
    store.write(told)
    os.rename(told.path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", told.path)
    assert store.read(told.path) is None
    os.unlink(told.path)
    os.mkfifo(told.path)
    assert store.read(told.path) is None
    if os.geteuid() == 0:
        os.unlink(told.path)
        store.write(told)
        os.chown(told.path, 12345, -1)
        assert store.read(told.path) is None


def test_it_is_not_written_through_a_link(told: Witness, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.symlink(victim, told.path)
    os.symlink(victim, f"{told.path}.new")
    store.write(told)
    assert (victim.read_text(), store.read(told.path)) == ("precious", told)


def test_files_are_known_by_their_inodes(told: Witness) -> None:
    active, stashed = told.chain.active.file, told.away[3]
    assert told.place(3) == active
    os.rename(active, stashed)
    assert told.place(3) == stashed
    Path(active).write_bytes(b"another")
    assert told.place(3) == stashed
    os.unlink(stashed)
    assert told.place(3) is None


def test_after_a_reboot_device_numbers_may_be_others(told: Witness) -> None:
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
    assert [stash.original_of(name) for name in names] == [file] * 3
    assert [stash.original_of(name) for name in ("a.2", "merged", "a.merged.x", "a.qcow2")] == [None] * 4
