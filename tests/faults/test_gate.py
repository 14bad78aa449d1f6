"""The gate sees every change to a file, in order and with its data, and can make it fail or be the last."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from rig.machines import run

from faults import gate
from faults.gate import Gate
from faults.log import Fault, Log, Operation

pytestmark = pytest.mark.skipif(bool(gate.available()), reason=gate.available() or "here is one")

CHANGES = """
import os, sys
os.chdir(sys.argv[1])
file = os.open("one", os.O_RDWR | os.O_CREAT)
os.write(file, b"written")
os.pwrite(file, b"W", 0)
os.pwritev(file, [b"ri", b"tt"], 1)
os.fsync(file)
os.ftruncate(file, 3)
os.rename("one", "two")
os.link("two", "three")
os.unlink("two")
"""


def changed(folder: Path, log: Log, what: str = "names") -> "subprocess.CompletedProcess[str]":
    with Gate(folder, log) as watched:
        line = [*watched.before(what), sys.executable, "-c", CHANGES, str(folder)]
        return subprocess.run(line, capture_output=True, text=True)


def test_all_changes_are_seen_in_order_and_done(tmp_path: Path) -> None:
    log = Log()
    assert changed(tmp_path, log).stderr == ""
    seen = [(one.kind, one.file, one.offset, one.data) for one in log.operations if one.kind not in ("rename", "link")]
    assert seen == [
        ("create", "one", 0, b""), ("write", "one", 0, b"written"), ("write", "one", 0, b"W"), ("write", "one", 1, b"ritt"),
        ("flush", "one", 0, b""), ("truncate", "one", 3, b""), ("unlink", "two", 0, b""),
    ]  # fmt: skip
    assert [(one.file, one.target) for one in log.operations if one.target] == [("one", "two"), ("two", "three")]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"three": b"Wri"}


def test_without_names_only_storage_is_seen(tmp_path: Path) -> None:
    log = Log()
    changed(tmp_path, log, "storage")
    assert [one.kind for one in log.operations] == ["write", "write", "flush", "truncate"]


def test_a_stashed_file_is_the_same_file(tmp_path: Path) -> None:
    log = Log()
    stashing = CHANGES.replace("os.fsync(file)", 'os.rename("one", "one.merged"); os.fsync(file)').replace(
        '"one", "two"', '"one.merged", "two"'
    )
    with Gate(tmp_path, log) as watched:
        line = [*watched.before("storage"), sys.executable, "-c", stashing, str(tmp_path)]
        subprocess.run(line, check=True)
    assert [(one.kind, one.file) for one in log.operations[-2:]] == [("flush", "one"), ("truncate", "one")]


@pytest.mark.parametrize("for_ever", [False, True])
def test_an_operation_fails_with_the_errno_that_was_asked_for(for_ever: bool, tmp_path: Path) -> None:
    log = Log(Fault(5, errno=errno.EDQUOT, for_ever=for_ever))
    assert f"[Errno {errno.EDQUOT}]" in changed(tmp_path, log).stderr
    assert [one.failed for one in log.operations] == [False] * 4 + [True]
    assert (tmp_path / "one").read_bytes() == b"Written"


@pytest.mark.parametrize("number", [1, 3, 6])
def test_a_killed_process_does_nothing_more(number: int, tmp_path: Path) -> None:
    log = Log(Fault(number))
    assert changed(tmp_path, log).returncode == -9
    assert len(log.operations) == number


def test_other_folders_are_none_of_our_business(tmp_path: Path) -> None:
    (tmp_path / "watched").mkdir()
    log = Log(Fault(1, errno=errno.EIO))
    with Gate(tmp_path / "watched", log) as watched:
        line = [*watched.before("names"), sys.executable, "-c", CHANGES, str(tmp_path)]
        assert subprocess.run(line, capture_output=True).returncode == 0
    assert log.operations == []


def test_qemu_has_no_way_around_it(tmp_path: Path) -> None:
    """io_uring would not be seen: behind the gate there is none."""
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "raw", image, "1M")
    for way in ("threads", "io_uring"):
        log = Log()
        with Gate(tmp_path, log) as watched:
            line = ["qemu-io", "-f", "raw", "-t", "none", "-i", way, "-c", "write 0 64k", "-c", "flush", str(image)]
            done = subprocess.run([*watched.before(), *line], capture_output=True)
        writes = [one for one in log.operations if one.kind == "write"]
        assert done.returncode != 0 or writes == [
            Operation("image", "write", 0, 65536, b"\xcd" * 65536, pid=writes[0].pid, changed=writes[0].changed)
        ]
