"""The file of a recording: whose it may be, what it holds at the most, and a disk that does not take it."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmpmerge.errors import RecordingUnwritable
from qmpmerge.recording import file as recording_file
from qmpmerge.recording.entry import Entry
from qmpmerge.recording.file import Recording

BIG = 64 * 1024


def step(number: int = 0) -> Entry:
    return Entry("ab", float(number), "step", {"name": "state", "number": number})


def message(kind: str, command: str | None, size: int = 100) -> Entry:
    body = json.dumps({"return": "x" * size}).encode()
    return Entry("ab", 0.0, kind, {"session": 1}, body, command)


def recorded(path: Path, *entries: Entry, largest: int = BIG) -> list[dict[str, Any]]:
    recording = Recording(str(path), largest)
    for entry in entries:
        recording.take(entry)
    recording.close()
    assert recording.problem is None
    return lines(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_for_its_owner_alone_and_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "rec"
    recorded(path, step(1))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [line["number"] for line in recorded(path, step(2), step(3))] == [1, 2, 3]


def test_the_line_that_a_crash_has_torn_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rec"
    recorded(path, step(1), step(2))
    os.truncate(path, path.stat().st_size - 9)
    recording = Recording(str(path))
    recording.take(step(3))
    recording.close()
    kept, _torn, new = path.read_text().splitlines()
    assert [json.loads(line)["number"] for line in (kept, new)] == [1, 3]


def another_text(path: Path) -> None:
    path.write_text("the only copy of somebody's notes\n")


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "it is no recording": another_text,
    "it is a symlink": lambda path: path.symlink_to(path.parent / "other"),
    "it is no regular file": os.mkfifo,
    "Is a directory": Path.mkdir,
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_is_no_recording_is_left_alone(reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rec"
    OBSTACLES[reason](path)
    before = path.lstat()
    content = path.read_text() if path.is_file() else None
    with pytest.raises(RecordingUnwritable) as error:
        Recording(str(path))
    assert error.value.facts == {"file": str(path), "reason": reason}
    assert (path.lstat().st_mtime_ns, content) == (before.st_mtime_ns, path.read_text() if path.is_file() else None)
    assert os.listdir(tmp_path) == ["rec"]


def test_where_there_is_no_folder_for_it_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecordingUnwritable, match="No such file or directory"):
        Recording(str(tmp_path / "nowhere" / "rec"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rec"
    path.touch()
    os.chown(path, 65534, 65534)
    with pytest.raises(RecordingUnwritable, match="it belongs to another user"):
        Recording(str(path))


# --- how much there is of it -------------------------------------------------------------------------------------------


def test_within_its_bound_what_is_asked_again_and_again_goes_first(tmp_path: Path) -> None:
    """A job that takes long is asked for thousands of times; what we do, and the first answer after that, stays."""
    polls = [message(kind, "query-jobs") for _ in range(400) for kind in ("sent", "received")]
    switch = [message("sent", "job-complete"), message("received", "job-complete"), message("received", None)]
    last = [step(2), *polls[:4], *switch, Entry("ab", 9.0, "end", {"verdict": "pivoted"})]
    found = recorded(tmp_path / "rec", step(1), *polls, *last)
    assert (tmp_path / "rec").stat().st_size <= BIG
    left_out, after = [line for line in found if line["kind"] == "left-out"], found[found.index(step(2).document) :]
    kinds = ["step", "sent", "received", "sent", "received", "received", "left-out", "end"]
    assert [line["kind"] for line in after] == kinds
    kept = sum(line["kind"] in ("sent", "received") for line in found)
    assert sum(line["messages"] for line in left_out) == len(polls) + 4 + 3 - kept
    assert sum(line["bytes"] for line in left_out) > BIG


def test_no_message_takes_the_room_of_our_own_steps(tmp_path: Path) -> None:
    floods = [message("received", None, 1000) for _ in range(200)]
    huge = message("received", "query-named-block-nodes", BIG // 4)
    end = Entry("ab", 9.0, "end", {"verdict": "merged"})
    found = recorded(tmp_path / "rec", huge, *floods, *(step(number) for number in range(50)), end)
    assert [line["number"] for line in found if line["kind"] == "step"] == list(range(50))
    assert found[-1]["kind"] == "end" and (tmp_path / "rec").stat().st_size <= BIG
    assert max(map(len, (tmp_path / "rec").read_text().splitlines())) < BIG // 8


# --- disks -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_hangs_keeps_nobody_waiting_and_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, really = threading.Event(), os.write
    monkeypatch.setattr(recording_file, "END_SECONDS", 0.01)
    monkeypatch.setattr(recording_file, "MOST_WAITING", 10_000)
    recording = Recording(str(tmp_path / "rec"))

    def write(descriptor: int, data: bytes) -> int:
        hangs.wait()
        return really(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        for _ in range(1000):
            recording.take(message("received", "query-jobs", 1000))
        recording.take(step(1))
        recording.close()
        assert recording.problem == "not all of it was written within 0.01 s"
        hangs.set()
        recording._writer.join()
    found = lines(tmp_path / "rec")
    (left_out,) = [line for line in found if line["kind"] == "left-out"]
    assert found[-1] == step(1).document
    assert left_out["messages"] + len(found) - 2 == 1000 and len(found) < 20


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_ends_it(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(str(tmp_path / "rec"))
    recording.take(step(1))
    recording.take(step(2))
    while (tmp_path / "rec").read_text().count("\n") < 2:
        pass

    def write(descriptor: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        recording.take(step(3))
        recording.close()
    assert recording.problem == os.strerror(number)
    assert [line["number"] for line in lines(tmp_path / "rec")] == [1, 2]


def test_a_guest_that_waits_is_not_kept_waiting_by_a_long_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is short is written at once, since a crash in the middle of a pause is what one wants to read about."""
    monkeypatch.setattr(recording_file, "PAUSE_SECONDS", 100.0)
    path = tmp_path / "rec"
    recording = Recording(str(path))
    recording.hurry(True)
    recording.take(message("received", "query-block"))
    while not path.read_text().endswith("\n"):
        pass
    recording.take(message("received", "query-block", 100_000))
    recording.take(step(1))
    assert path.read_text().count("\n") == 1
    recording.hurry(False)
    recording.close()
    assert path.read_text().count("\n") == 3
