"""The file of a recording: whose it may be, what it holds at the most, and a disk that does not take it."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from qmpmerge.errors import RecordingUnwritable
from qmpmerge.recording import file as recording_file
from qmpmerge.recording.entry import Entry
from qmpmerge.recording.file import Recording

BIG = 64 * 1024


def step(number: int = 0) -> Entry:
    return Entry("ab", float(number), "step", {"name": "state", "number": number})


START = Entry("ab", 0.0, "start", {"schema": 1})


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
    recorded(path, START, step(1))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [line["number"] for line in recorded(path, step(2), step(3))[1:]] == [1, 2, 3]


def test_it_can_be_rotated_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "rec"
    recording = Recording(str(path))
    recording.take(START)
    path.rename(tmp_path / "rec.1")
    assert recorded(path, START) == [START.document]
    recording.take(step(1))
    recording.close()
    assert lines(tmp_path / "rec.1") == [START.document, step(1).document]


def test_the_line_that_a_crash_has_torn_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rec"
    recorded(path, START, step(1), step(2))
    os.truncate(path, path.stat().st_size - 9)
    recording = Recording(str(path))
    recording.take(step(3))
    recording.close()
    _start, kept, _torn, new = path.read_text().splitlines()
    assert [json.loads(line)["number"] for line in (kept, new)] == [1, 3]


def another_text(path: Path) -> None:
    path.write_text("the only copy of somebody's notes\n")


def an_image(path: Path) -> None:
    """Whose guest has written there what it likes."""
    path.write_bytes(b'{"run": "x", "kind": "start"' + bytes(2**20))


def another_log(path: Path) -> None:
    path.write_text('{"run": "7", "t": 0.0, "kind": "session"}\n')


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "it is no recording": another_text,
    "it is no recording ": another_log,
    "it is no recording  ": an_image,
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
    assert error.value.facts == {"file": str(path), "reason": reason.rstrip()}
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


def writer(recording: Recording) -> psutil.Process:
    return psutil.Process(recording._writer._process.pid)


def test_the_process_that_writes_has_nothing_of_ours(tmp_path: Path) -> None:
    """So whatever it hangs in keeps neither a monitor nor a lock, and Ctrl-C or the end of a service are not for it."""
    with (tmp_path / "ours").open("w"):
        recording = Recording(str(tmp_path / "rec"))
        child = writer(recording)
        opened = sorted(os.readlink(f"/proc/{child.pid}/fd/{number}") for number in os.listdir(f"/proc/{child.pid}/fd"))
        assert [re.sub(r":.*", "", name) for name in opened] == [
            "/dev/null",
            "/dev/null",
            str(tmp_path / "rec"),
            "socket",
        ]
        assert child.cwd() == "/" and os.getsid(child.pid) == child.pid
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child.send_signal(number)
        recording.take(step(1))
        recording.close()
    assert recording.problem is None and lines(tmp_path / "rec") == [step(1).document]
    assert not child.is_running()


def test_a_disk_that_hangs_keeps_nobody_waiting_and_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_file, "END_SECONDS", 0.01)
    monkeypatch.setattr(recording_file, "MOST_WAITING", 10_000)
    with monkeypatch.context() as patch:
        patch.setattr(recording_file, "END_SECONDS", 60.0)
        recording = Recording(str(tmp_path / "rec"))
    child = writer(recording)
    child.suspend()  # as the kernel does with one whose disk hangs
    try:
        for _ in range(3000):
            recording.take(message("received", "query-jobs", 1000))
        recording.take(step(1))
        recording.close()
        assert recording.problem == "not all of it was written within 0.01 s"
        recording._thread.join()
    finally:
        child.resume()
    recording._writer._process.wait()
    assert 0 < len(lines(tmp_path / "rec")) < 1000


def test_what_a_slow_disk_does_not_take_is_left_out_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_file, "MOST_WAITING", 10_000)
    recording = Recording(str(tmp_path / "rec"))
    child = writer(recording)
    child.suspend()
    for _ in range(3000):
        recording.take(message("received", "query-jobs", 1000))
    recording.take(step(1))
    child.resume()
    recording.close()
    assert recording.problem is None
    found = lines(tmp_path / "rec")
    (left_out,) = [line for line in found if line["kind"] == "left-out"]
    assert found[-1] == step(1).document
    assert left_out["messages"] + len(found) - 2 == 3000 and left_out["messages"] > 2000


def test_one_that_hangs_as_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_file, "END_SECONDS", 0.0)
    with pytest.raises(RecordingUnwritable, match="it could not be opened within 0 s"):
        Recording(str(tmp_path / "rec"))


def test_a_disk_that_fails_ends_it(tmp_path: Path) -> None:
    """/dev/full is no regular file; a limit does the same, and is the child's alone."""
    recording = Recording(str(tmp_path / "rec"))
    child = writer(recording)
    child.rlimit(psutil.RLIMIT_FSIZE, (len(step(1).line) + 5, len(step(1).line) + 5))
    for number in range(1, 2000):
        recording.take(step(number))
    recording.close()
    assert recording.problem == "File too large" and not child.is_running()
    assert (tmp_path / "rec").read_bytes() == step(1).line + step(2).line[:5]


def test_whoever_kills_the_writer_is_told(tmp_path: Path) -> None:
    recording = Recording(str(tmp_path / "rec"))
    writer(recording).kill()
    recording._writer._process.wait()
    for number in range(3):
        recording.take(step(number))
    recording.close()
    assert recording.problem == "the process that writes it has ended"


def test_what_was_handed_over_is_written_though_we_are_killed(tmp_path: Path) -> None:
    """Whole lines, even where we die within one."""
    recording = Recording(str(tmp_path / "rec"))
    recording._writer.write(step(1).line + step(2).line[:-9])
    recording._writer._socket.close()
    recording._writer._process.wait()
    assert lines(tmp_path / "rec") == [step(1).document]
    recording._entries.put(None)


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
