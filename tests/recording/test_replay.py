"""Recordings of real merges, explained, and replayed without their VM."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import pytest
from rig.command import invoke
from rig.disks import Setup
from rig.replays import replaying

INTERMEDIATE, PIVOT = ("--top", "2"), ("--yes",)


@pytest.fixture
def recorded(setup: Setup, images: list[Path], tmp_path: Path) -> dict[tuple[str, ...], Path]:
    """An intermediate merge, then the pivot of what it has left, of a guest that runs; QEMU is gone."""
    setup.machine.session.execute("cont")
    files: dict[tuple[str, ...], Path] = {}
    for words in (INTERMEDIATE, PIVOT):
        files[words] = tmp_path / f"{words[0]}.jsonl"
        done = invoke("commit", setup.machine.target, "vda", *words, "--record", str(files[words]))
        assert done.code == 0, done.err
    setup.machine.kill()
    return files


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that a client could have changed of the files there."""
    return {
        file.name: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.iterdir()
        if file.is_file()
    }


def test_merges_are_replayed_whole_and_touch_nothing_that_has_the_same_name(
    recorded: dict[tuple[str, ...], Path], images: list[Path]
) -> None:
    """
    The images lie where the recordings name them: those that were merged have their names back, so that a client which took the
    recording's names for names of this machine would find all in order, and merge.
    """
    for image in images:
        aside = image.with_name(f"{image.name}.merged")
        if aside.exists():
            aside.rename(image)
    before = state(images[0].parent)
    for words, recording in recorded.items():
        with replaying(recording, "--once") as replay:
            dry = invoke("commit", replay.target, "vda", *words, "--dry-run", "--json").document
            assert (dry["verdict"], dry["before"][0]) == ("planned", f"{replay.folder}{images[0]}")
            for command in ("disks", "chain", "jobs", "doctor") if words == INTERMEDIATE else ():
                assert invoke(command, replay.target).code == 0
            done = invoke("commit", replay.target, "vda", *words, "--json").document
            assert done["verdict"] == ("merged" if words == INTERMEDIATE else "pivoted")
            assert done["after"] == dry["after"] == [f"{replay.folder}{file}" for file in after(words, images)]
            code, told = replay.result()
        assert (code, told["verdict"], told["diverged"], told["unplayed"]) == (0, "done", None, [])
        assert told["played"] == told["commands"] > 4
        assert not replay.folder.exists()
    assert state(images[0].parent) == before


def test_pulls_are_replayed_whole(setup: Setup, tmp_path: Path) -> None:
    """What is copied is not there; that nothing is missing is seen all the same."""
    for number, words in enumerate((("--top", "3"), ())):
        recording = tmp_path / f"{number}.jsonl"
        pulled = invoke("pull", setup.machine.target, "vda", *words, "--json", "--record", str(recording)).document
        with replaying(recording, "--once") as replay:
            again = invoke("pull", replay.target, "vda", *words, "--json").document
            assert (
                (again["verdict"], len(again["after"]))
                == (pulled["verdict"], len(pulled["after"]))
                == ("pulled", 2 - number)
            )
            code, told = replay.result()
        assert (code, told["diverged"], told["unplayed"]) == (0, None, [])


POLITELY = """
import asyncio, sys
import qmpmerge

async def merge():
    async with qmpmerge.open(sys.argv[1]) as target:
        print((await qmpmerge.commit(target, "vda", speed=2**22, polite=0.1)).verdict)

with qmpmerge.record(*sys.argv[2:]):
    asyncio.run(merge())
"""
"""A merge that connects anew for each look, which the command does every five seconds; arguments: where, recordings."""


def test_who_connects_anew_for_each_look_comes_to_the_end(setup: Setup, tmp_path: Path) -> None:
    recording = tmp_path / "recording"
    politely = [sys.executable, "-c", POLITELY]
    recorded = subprocess.run([*politely, setup.machine.target, recording], capture_output=True, text=True, timeout=60)
    sessions = sum(json.loads(line)["kind"] == "session" for line in recording.read_text().splitlines())
    assert recorded.stdout == "pivoted\n" and sessions > 2, recorded.stderr
    with replaying(recording, "--once") as replay:
        again = subprocess.run([*politely, replay.target], capture_output=True, text=True, timeout=60)
        assert again.stdout == "pivoted\n", again.stderr
        code, told = replay.result()
    assert (code, told["diverged"], told["unplayed"]) == (0, None, [])


def after(words: tuple[str, ...], images: list[Path]) -> list[Path]:
    return [images[0], *images[2:]] if words == INTERMEDIATE else images[:1]


def test_a_pivot_is_explained(recorded: dict[tuple[str, ...], Path], images: list[Path]) -> None:
    (run,) = invoke("explain", str(recorded[PIVOT]), "--json").document["runs"]
    assert (run["verdict"], run["code"], run["is_cut"]) == ("pivoted", 0, False)
    items = {item["text"].split()[0]: item for item in run["items"] if item["kind"] == "command"}
    assert items["job-complete"]["twin"].endswith("vda --pivot")
    merged = f"--base {images[0]} --top {images[3]} --active"
    assert items["block-commit"]["twin"].startswith("virsh blockcommit") and merged in items["block-commit"]["twin"]
    assert all(item["why"] for item in run["items"] if item["kind"] == "command")
    (pause,) = [felt for felt in run["felt"] if felt["kind"] == "pause"]
    assert pause["seconds"] > 0 and items["stop"]["at"] <= pause["at"] <= items["cont"]["at"]
    states = [spent["state"] for spent in run["spent"]]
    assert states == ["planned", "copying", "safe", "switching", "switched", "proved", "done"]
    assert sum(spent["seconds"] for spent in run["spent"]) == pytest.approx(run["seconds"], abs=0.001)
    text = invoke("explain", str(recorded[PIVOT])).out
    assert "safe to switching" in text and "= virsh resume" in text and "pause: the guest stood still" in text


def test_a_flush_is_explained_and_names_are_short(recorded: dict[tuple[str, ...], Path], images: list[Path]) -> None:
    """The refusal stands in every merge that is in order."""
    (run,) = invoke("explain", str(recorded[INTERMEDIATE]), "--json").document["runs"]
    gone = [item for item in run["items"] if item["text"].startswith("blockdev-del") and item["reason"]]
    assert gone and all("as it should be" in item["why"] for item in gone)
    headers = [item["text"] for item in run["items"] if item["kind"] == "header"]
    folder = f"{images[0].parent}/"
    assert headers[0].startswith(f"before: {folder}") and folder not in "".join(headers).replace(folder, "", 1)


@pytest.mark.parametrize("is_running", [True, False])
def test_a_guest_that_stands_still_feels_nothing(is_running: bool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    status = exchange(2, "query-status", {"status": "running" if is_running else "prelaunch", "running": is_running})
    file.write_text(lines({"kind": "start", "schema": 1}, *exchange(1, "object-add", {}), *status) + "{\n")
    done = invoke("explain", str(file))
    assert ("busy: until object-add was answered" in done.out) is is_running
    assert "1 line of the file is no line of a recording" in done.err


# --- any QMP client ---------------------------------------------------------------------------------------------------


class Client:
    """A person's: it knows nothing of us."""

    def __init__(self, path: str) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(60)
        self.connection.connect(path)
        self.stream = self.connection.makefile("rw")
        self.greeting = self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stream.close()
        self.connection.close()

    def read(self) -> Any:
        return json.loads(self.stream.readline())

    def send(self, text: str) -> list[Any]:
        """What comes up to the answer."""
        self.stream.write(text)
        self.stream.flush()
        came = [self.read()]
        while "event" in came[-1]:
            came.append(self.read())
        return came

    def execute(self, command: str, **arguments: object) -> list[Any]:
        return self.send(json.dumps({"execute": command, "arguments": arguments, "id": 7}) + "\n")


def lines(*facts: dict[str, object]) -> str:
    return "".join(f"{json.dumps({'run': 'a', 't': number / 10, **one})}\n" for number, one in enumerate(facts))


def exchange(number: int, command: str, reply: object, **arguments: object) -> list[dict[str, object]]:
    sent = {"execute": command, "id": str(number), **({"arguments": arguments} if arguments else {})}
    return [
        {"kind": "sent", "session": 1, "message": sent},
        {"kind": "received", "session": 1, "message": {"return": reply, "id": str(number)}},
    ]


GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 8, "micro": 7}, "package": ""}, "capabilities": []}}
SESSION = {"kind": "session", "session": 1, "name": "/run/vm", "pid": 1, "command_line": None, "greeting": GREETING}


def event(name: str) -> dict[str, object]:
    return {"kind": "received", "session": 1, "message": {"event": name, "data": {"file": "/vm/a"}}}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """By hand: a job, which is looked at twice before it is ready."""
    file = tmp_path / "by hand"
    file.write_text(
        lines(
            {"kind": "start", "schema": 1},
            SESSION,
            *exchange(1, "query-jobs", []),
            {"kind": "sent", "session": 1, "message": {"execute": "block-commit", "arguments": {"a": 1, "b": [2]}}},
            event("CREATED"),
            {"kind": "received", "session": 1, "message": {"return": {}}},
            *exchange(2, "query-jobs", ["running"]),
            event("READY"),
            *exchange(3, "query-jobs", ["ready"]),
            *exchange(4, "job-complete", {}, id="j"),
            event("COMPLETED"),
            {"kind": "sent", "session": 1, "message": {"execute": "quit"}},
        )
    )
    return file


def test_the_order_of_questions_and_of_arguments_does_not_matter(written: Path) -> None:
    with replaying(written) as replay:
        with Client(replay.target) as client:
            assert client.greeting["QMP"]["version"].pop("qmpmerge-replay") == str(replay.folder)
            assert client.greeting == GREETING
            assert client.execute("query-jobs")[0]["error"]["class"] == "CommandNotFound"  # before capabilities
            assert client.execute("qmp_capabilities") == [{"return": {}, "id": 7}]
            assert client.execute("query-jobs") == client.execute("query-jobs") == [{"return": [], "id": 7}]
            created, answer = client.execute("block-commit", b=[2], a=1)
            assert (created["event"], answer) == ("CREATED", {"return": {}, "id": 7})
            assert created["data"]["file"] == f"{replay.folder}/vm/a"
            assert client.execute("query-jobs") == [{"return": ["running"], "id": 7}]
            assert client.read()["event"] == "READY"
            for _ in range(3):
                assert client.execute("query-jobs") == [{"return": ["ready"], "id": 7}]
        with Client(replay.target) as again:
            again.execute("qmp_capabilities")
            assert again.execute("query-jobs") == [{"return": ["ready"], "id": 7}], (
                "it goes on where the other one left"
            )
            assert again.execute("job-complete", id="j") == [{"return": {}, "id": 7}]
            assert again.read()["event"] == "COMPLETED"
            again.stream.write('{"execute": "quit"}\n')
            again.stream.flush()
            assert again.stream.readline() == "", "it was never answered"
        code, told = replay.end(signal.SIGTERM)
    assert (code, told["played"], told["unplayed"], told["unknown"]) == (0, 3, [], [])


def test_who_only_waits_gets_the_events(written: Path) -> None:
    with replaying(written) as replay, Client(replay.target) as client:
        client.execute("qmp_capabilities")
        assert client.execute("block-commit", a=1, b=[2])[-1] == {"return": {}, "id": 7}
        assert client.read()["event"] == "READY"


def test_the_first_command_that_is_another_is_told_with_what_was_expected(written: Path) -> None:
    with replaying(written) as replay:
        with Client(replay.target) as client:
            client.execute("qmp_capabilities")
            (refused,) = client.execute("block-commit", a=1, b=[3])
            assert "`block-commit a=1 b=[3]` was sent where the recording has `block-commit a=1 b=[2]`" in str(refused)
            assert "error" in client.execute("stop")[0]
            assert "no answer to query-cpus" in client.execute("query-cpus")[0]["error"]["desc"]
            assert client.send("nonsense\n")[0]["error"]["class"] == "GenericError"
            assert client.execute("query-jobs") == [{"return": [], "id": 7}], "it goes on where it was"
        code, told = replay.end()
    assert (code, told["verdict"], told["played"], len(told["unplayed"])) == (5, "failed", 0, 3)
    assert told["diverged"] == {"sent": "block-commit a=1 b=[3]", "expected": "block-commit a=1 b=[2]"}
    assert told["unknown"] == ["query-cpus"]


def test_what_a_killed_one_has_left_goes_with_the_next(written: Path) -> None:
    with replaying(written) as alive:
        with replaying(written) as killed:
            killed.process.kill()
            killed.process.wait()
        assert killed.folder.exists()
        with replaying(written) as replay:
            assert alive.folder.exists() and not killed.folder.exists()
            replay.end()
        assert not replay.folder.exists()
        alive.end()


def test_the_end_of_its_terminal_is_an_end_like_any_other(written: Path) -> None:
    """A shell says that, and the kernel once more."""
    with replaying(written) as replay, Client(replay.target) as client:
        client.execute("qmp_capabilities")
        client.execute("block-commit", a=1, b=[2])
        replay.process.send_signal(signal.SIGHUP)
        code, told = replay.end(signal.SIGHUP)
    assert (code, told["played"], len(told["unplayed"])) == (5, 1, 2)
    assert not replay.folder.exists()


def test_what_cannot_be_replayed(written: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.write_text(written.read_text() + lines({**SESSION, "session": 2, "name": "/run/other"}))
    refused = invoke("replay", str(two), "--json").document["error"]
    assert (refused["name"], refused["facts"]["known"]) == ("several-qemus", ["/run/vm", "/run/other"])
    assert invoke("replay", str(two), "--qemu", "third").code == 3
    with replaying(two, "--qemu", "/run/other", "--socket", str(tmp_path / "here")) as replay:
        assert replay.target == str(tmp_path / "here")
        assert replay.end()[0] == 0, "nothing was changed, and nothing is left"
    assert not (tmp_path / "here").exists()
    taken = invoke("replay", str(written), "--socket", str(two), "--json").document["error"]
    assert taken["name"] == "cannot-listen"
    nobody = tmp_path / "nobody"
    nobody.write_text(lines({"kind": "start", "schema": 1}))
    assert "no session" in invoke("replay", str(nobody)).err


# --- what is no whole recording ---------------------------------------------------------------------------------------


def test_what_is_torn_cut_or_strange_is_explained_as_far_as_it_goes(written: Path, tmp_path: Path) -> None:
    text = written.read_text()
    strange = tmp_path / "strange"
    strange.write_text(
        text
        + lines(
            {"kind": "dream", "of": "sheep"},
            {"kind": "left-out", "messages": 3, "bytes": 1000},
            {"kind": "sent", "session": 1, "message": {"execute": ["no", "command"]}},
            {"kind": "sent", "t": 9.0, "session": 1, "message": {"execute": "stop", "id": "9"}},
            {"kind": "received", "t": 1.0, "session": 1, "message": {"return": {}, "id": "9"}},
            {"kind": "closed", "session": {}, "reason": []},
            {"run": "b", "kind": "start", "schema": 1, "command": ["qmpmerge", "disks"]},
            {"run": "b", "t": float("nan"), "kind": "closed", "session": 1, "reason": "x"},
            {"run": "b", "kind": "end", "verdict": "done", "code": 0},
        )
        + '{"run": "a", "t": 9.1, "ki'
    )
    document = invoke("explain", str(strange), "--json").document
    first, second = document["runs"]
    assert document["unread"] == 4
    assert first["is_cut"] and (second["words"], second["verdict"]) == (["qmpmerge", "disks"], "done")
    texts = {item["kind"]: item["text"] for item in first["items"]}
    assert texts["dream"] == '{"of": "sheep"}' and texts["left-out"].startswith("3 messages (1000 bytes)")
    asked = [item for item in first["items"] if item["kind"] == "asked"]
    assert asked[0]["why"] and not asked[1]["why"], "what a question is for is said once"
    for cut in range(0, len(text), 197):
        strange.write_text(text[cut:])
        assert invoke("explain", str(strange), "--json").code == 0 or text[cut:].count("\n") < 2


def test_times_that_are_none_are_explained_as_far_as_they_go(tmp_path: Path) -> None:
    """Answers before their commands, and clocks that show what no clock does."""
    strange = tmp_path / "strange"
    stamps: list[object] = [10**400, "nan", "inf", -1, None, {}]
    sent: list[dict[str, object]] = [
        {"kind": "sent", "t": t, "session": 1, "message": {"execute": "stop", "id": "1"}} for t in (5, 1, 1)
    ]
    received: list[dict[str, object]] = [
        {"kind": "received", "t": t, "session": 1, "message": {"return": {}, "id": "1"}} for t in (1, 1, 0)
    ]
    events: list[dict[str, object]] = [
        {"kind": "received", "session": 1, "message": {"event": name, "timestamp": stamp}}
        for second in stamps
        for name, stamp in (("STOP", {"seconds": second, "microseconds": 0}), ("RESUME", {"seconds": 1}))
    ]
    strange.write_text(lines({"kind": "start", "schema": 1}, *sent, *received, *events))
    done = invoke("explain", str(strange), "--json")
    assert done.code == 0 and not {"NaN", "Infinity"} & set(done.out.replace(",", " ").split())
    (run,) = done.document["runs"]
    assert len(run["felt"]) >= len(stamps) and run["is_cut"]
    assert invoke("explain", str(strange)).code == 0


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def test_a_hostile_recording_and_a_hostile_client_end_nothing(tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    image = {"virtual-size": 2**20, "format": "qcow2"}
    names = ["/x" * 3000, "/vm/" + "x" * 300, "/vm/..", "../../x", "json:" + '{"file":' * 700 + "1" + "}" * 700]
    nodes = [{"node-name": "a", "file": name, "drv": "qcow2", "image": image} for name in names]
    more = exchange(2, "stop", {}, image="json:" + '{"a":' * 990 + "1" + "}" * 990)
    hostile.write_text(
        lines(SESSION, *exchange(1, "query-named-block-nodes", nodes), *more, *exchange(3, "query-cpus", deep(700)))
    )
    with replaying(hostile) as replay:
        with Client(replay.target) as client:
            client.execute("qmp_capabilities")
            told = client.execute("query-named-block-nodes")[0]["return"]
            assert all(node["file"].startswith(f"{replay.folder}/") for node in told)
            assert "error" in client.execute("query-cpus", a=deep(700))[0]
            assert "error" in client.execute("cont", a="json:" + '{"a":' * 990 + "1" + "}" * 990)[0]
            assert client.execute("query-version")[0]["error"], "it still answers"
        code, result = replay.end(signal.SIGTERM)
    assert code == 5 and set(result["missing"]) >= set(names[:3])


@pytest.mark.parametrize("name", ["/dev/zero", "/", "missing", "README.md", "empty", "later"])
def test_what_is_no_recording_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# No recording\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "later").write_text(lines({"kind": "start", "schema": 2}))
    for command in ("explain", "replay"):
        error = invoke(command, name, "--json", cwd=tmp_path).document["error"]
        assert error["name"] == "recording-unreadable"
        assert name != "later" or "it has schema 2, and 1 is understood" in error["message"]
