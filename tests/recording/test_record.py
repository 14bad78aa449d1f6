"""A recording of real merges holds what went over the wire, in its order, and what was done meanwhile."""

import asyncio
import json
import logging
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from rig.disks import Setup, device, drive
from rig.machines import Content, machine

import qmpmerge
from qmpmerge import sync
from qmpmerge.chain.outcome import Policy
from qmpmerge.errors import NoSuchLayer, RecordingUnwritable
from qmpmerge.testing.wire import Wire, behind, laid

PLANTED = "pl4nt3d-s3cr3t"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in found if line["kind"] == kind]


class Tap(Wire):
    """Notes what it passes on."""

    def __init__(self, monitor: str) -> None:
        super().__init__(monitor)
        self.commands: list[str] = []
        self.lines: list[Any] = []

    def sent(self, command: str, client: socket.socket) -> None:
        self.commands.append(command)

    def received(self, text: bytes, command: str, client: socket.socket) -> list[object]:
        self.lines.append(json.loads(text))
        return [text]


async def test_it_is_what_went_over_the_wire(tmp_path: Path, images: list[Path], content: Content) -> None:
    disk = ["-drive", f"file={images[3]},format=qcow2,if=none,id=vda", *device("vda")]
    with machine(tmp_path, *disk, "-object", f"secret,id=s0,data={PLANTED}") as vm, behind(vm) as (path, listener):
        tap = Tap(vm.target)
        vm.session.execute("cont")
        with laid(tap, listener), qmpmerge.record(tmp_path / "rec"):
            async with qmpmerge.live(path) as target:
                assert (await qmpmerge.commit(target, "vda")).verdict == "pivoted"
    found = lines(tmp_path / "rec")
    assert [line["message"]["execute"] for line in of(found, "sent")] == tap.commands
    (session,) = of(found, "session")
    assert [session["greeting"], *(line["message"] for line in of(found, "received"))] == tap.lines
    assert (session["pid"], session["name"]) == (vm.process.pid, path)
    assert session["command_line"][0].endswith("qemu-system-x86_64")
    assert "secret,id=s0,data=(not shown)" in session["command_line"]
    assert PLANTED not in (tmp_path / "rec").read_text()


async def test_our_own_steps_stand_between_the_messages(setup: Setup, tmp_path: Path) -> None:
    setup.machine.session.execute("cont")
    with qmpmerge.record(tmp_path / "rec"):
        async with setup.target() as target:
            await qmpmerge.commit(target, "vda")
    found = lines(tmp_path / "rec")
    marks = [
        line.get("name") or line["message"].get("execute") or line["message"].get("event")
        for line in found
        if "name" in line or "message" in line
    ]
    order = [
        "record",
        "block-commit",
        "BLOCK_JOB_READY",
        "stop",
        "paused",
        "renamed",
        "job-complete",
        "cont",
        "resumed",
        "proved",
    ]
    assert [
        mark for mark in marks if mark in order and not (mark == "renamed" and "resumed" in marks[: marks.index(mark)])
    ] == order
    states = [line["state"] for line in of(found, "step") if line["name"] == "state"]
    assert states == ["copying", "safe", "switching", "switched", "proved", "done"]
    seconds = [line["t"] for line in found]
    assert seconds == sorted(seconds) and seconds[0] < 0.1
    assert (found[0]["kind"], found[0]["schema"], found[0]["command"]) == ("start", 1, None)
    assert [line["kind"] for line in found[-2:]] == ["closed", "end"]
    (last,) = {line["run"] for line in found}
    assert len(last) == 8


async def test_the_headers_are_those_before_and_after(setup: Setup, tmp_path: Path) -> None:
    with qmpmerge.record(tmp_path / "rec"):
        async with setup.target() as target:
            outcome = await qmpmerge.commit(target, "vda", top="[3]")
    found = of(lines(tmp_path / "rec"), "header")
    before, after = (
        {line["file"]: line["header"] for line in found if line["when"] == when} for when in ("before", "after")
    )
    files = [image.file for image in outcome.before]
    overlay = outcome.before.active.file
    assert list(before) == files and list(after) == [files[0], *(f"{file}.merged" for file in files[1:-1]), overlay]
    assert (before[overlay]["backing"], after[overlay]["backing"]) == ("b.qcow2", "base.raw")
    assert not any("problem" in header for header in after.values())


@pytest.mark.parametrize("policy", ["stash", "delete"])
async def test_the_headers_after_a_pivot_are_read_by_the_names_that_images_have_then(
    policy: Policy, setup: Setup, tmp_path: Path
) -> None:
    with qmpmerge.record(tmp_path / "rec"):
        async with setup.target() as target:
            outcome = await qmpmerge.commit(target, "vda", merged_files=policy)
    found = of(lines(tmp_path / "rec"), "header")
    after = {line["file"]: line["header"] for line in found if line["when"] == "after"}
    base, *others = (image.file for image in outcome.before)
    assert list(after) == [base, *(f"{file}.merged" for file in others if policy == "stash")]
    assert not any("problem" in header for header in after.values())


async def test_a_file_and_a_function_get_the_same_lines(setup: Setup, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    with qmpmerge.record(tmp_path / "rec", heard.append):
        async with setup.target() as target:
            await target.disks()
    assert lines(tmp_path / "rec") == heard and heard[-1]["kind"] == "end"


def test_without_asyncio_and_offline_the_daemon_is_recorded(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    with sync.record(tmp_path / "rec"), sync.offline(images[3]) as target:
        sync.commit(target)
    found = lines(tmp_path / "rec")
    assert [line["name"] for line in of(found, "session")] == ["qemu-storage-daemon"]
    assert "blockdev-add" in [line["message"]["execute"] for line in of(found, "sent")]
    assert of(found, "end") == [{**found[-1], "verdict": None, "code": None}]


async def test_what_was_raised_stands_at_the_end(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(NoSuchLayer), qmpmerge.record(tmp_path / "rec"):
        async with setup.target() as target:
            await qmpmerge.commit(target, top="nope")
    end = lines(tmp_path / "rec")[-1]
    assert (end["verdict"], end["code"], end["error"]["name"]) == ("refused", 3, "no-such-layer")
    with pytest.raises(ZeroDivisionError), qmpmerge.record(tmp_path / "rec"):
        1 / 0  # noqa: B018
    end = lines(tmp_path / "rec")[-1]
    assert (end["verdict"], end["error"]["name"]) == (None, "ZeroDivisionError")
    assert "test_record.py" in "".join(end["error"]["traceback"])


async def test_two_at_once_hear_each_their_own(tmp_path: Path, images: list[Path], content: Content) -> None:
    """A task has its own recorder, or none."""
    heard: dict[str, list[str]] = {"first": [], "second": []}

    async def look(name: str, target: str) -> None:
        with qmpmerge.record(lambda line: heard[name].append(line.get("name", ""))):
            async with qmpmerge.live(target) as session:
                await session.disks()

    (tmp_path / "two").mkdir()
    with drive(tmp_path, images, content) as one, machine(tmp_path / "two") as two:
        await asyncio.gather(look("first", one.machine.target), look("second", two.target))
        async with qmpmerge.live(two.target) as session:
            await session.disks()
        assert [set(names) - {""} for names in heard.values()] == [{one.machine.target}, {two.target}]


async def test_whoever_hears_it_ends_nothing(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(line: dict[str, Any]) -> None:
        raise RuntimeError("a mistake of theirs")

    with qmpmerge.record(broken):
        async with setup.target() as target:
            assert (await qmpmerge.commit(target)).verdict == "pivoted"
    assert "a mistake of theirs" in capsys.readouterr().err
    monkeypatch.setattr(logging, "raiseExceptions", False)


async def test_what_would_end_a_program_waits_for_the_end_of_the_block(setup: Setup, tmp_path: Path) -> None:
    """It does not go through a pause, though the function is called in it; nor is the merge given up."""
    heard: list[str] = []

    def leaves(line: dict[str, Any]) -> None:
        heard.append(line.get("name", line["kind"]))
        if heard[-1] == "paused":
            raise asyncio.CancelledError("as they said")

    setup.machine.session.execute("cont")
    outcome = None
    with pytest.raises(asyncio.CancelledError, match="as they said"), qmpmerge.record(tmp_path / "rec", leaves):
        async with setup.target() as target:
            outcome = await qmpmerge.commit(target)
    assert outcome is not None and outcome.verdict == "pivoted"
    assert heard[-1] == "paused" and lines(tmp_path / "rec")[-1]["kind"] == "end"
    assert setup.machine.session.execute("query-status")["status"] == "running"


async def test_a_file_that_cannot_be_written_is_refused_before_anything_is_sent(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(RecordingUnwritable), qmpmerge.record(tmp_path / "nowhere" / "rec"):
        pytest.fail("it was begun")


def test_each_step_is_documented() -> None:
    root = Path(__file__).parents[2]
    told = re.compile(r"\.(?:log|step)\(\s*\"([a-z-]+)\",")
    names = {name for file in (root / "qmpmerge").rglob("*.py") for name in told.findall(file.read_text())}
    table = (root / "docs/recording.md").read_text().partition("| step |")[2].partition("\n\n")[0]
    first = " ".join(row.split("|")[1] for row in table.splitlines()[1:])
    assert names == set(re.findall("`([a-z-]+)`", first))
