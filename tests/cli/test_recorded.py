"""`--record FILE` and `-v`, as one types them."""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rig import command
from rig.agents import serving
from rig.command import COMMAND, Begun
from rig.disks import Setup
from rig.machines import create_encrypted

import qmpmerge
from qmpmerge.cli.commands import group
from qmpmerge.cli.recorded import Screen
from qmpmerge.recording import record
from qmpmerge.recording.recorder import Recorder

LINE = re.compile(r"\d+\.\d{6} (?:2 )?(?:->|<-|<!|--) .+")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_merge_is_recorded_and_shown_in_order(setup: Setup, tmp_path: Path) -> None:
    """The two are the same, line by line; events stand where they came."""
    record = tmp_path / "rec"
    options = ["--top", "[3]", "-v", "--record", str(record)]
    run = command.invoke("commit", setup.machine.target, "vda", *options)
    found = lines(record)
    shown = [line for line in run.err.splitlines() if LINE.fullmatch(line)]
    assert len(shown) == len(found) and [float(line.split()[0]) for line in shown] == [line["t"] for line in found]
    assert "\\x0a" not in run.err and f"-- {setup.machine.target}: qmpmerge-commit-vda: safe to switching" in run.err
    created = next(index for index, line in enumerate(shown) if '"status": "created"' in line)
    assert "<! " in shown[created] and '-> {"execute": "block-commit"' in shown[created - 1]
    assert found[0]["command"] == ["qmpmerge", "commit", setup.machine.target, "vda", *options]
    assert {**found[-1], "run": "", "t": 0} == {"run": "", "t": 0, "kind": "end", "verdict": "merged", "code": 0}


def test_json_has_the_same_lines(setup: Setup) -> None:
    run = command.invoke("disks", setup.machine.target, "-v", "--json")
    events = [json.loads(line) for line in run.err.splitlines()]
    kinds = [event["line"]["kind"] for event in events]
    assert (kinds[:2], kinds[-2:]) == (["start", "session"], ["closed", "end"])
    assert run.document["verdict"] == "done"


def test_all_commands_of_a_shell_can_be_recorded(setup: Setup, tmp_path: Path) -> None:
    """In one file, at the same time too: each line says whose it is."""
    record = tmp_path / "rec"
    env = {**os.environ, "QMPMERGE_RECORD": str(record)}
    begun = [subprocess.Popen([COMMAND, verb, setup.machine.target], env=env) for verb in ("disks", "chain", "jobs")]
    assert [process.wait() for process in begun] == [0] * 3
    assert command.invoke("chain", setup.machine.target, "nope", env=env).code == 3
    found = lines(record)
    runs = {line["run"]: line["command"][1] for line in found if line["kind"] == "start"}
    assert sorted(runs.values()) == ["chain", "chain", "disks", "jobs"]
    ends = {line["run"]: (line["verdict"], line["code"]) for line in found if line["kind"] == "end"}
    assert sorted(ends.values()) == [("done", 0), ("done", 0), ("done", 0), ("refused", 3)]
    for run in runs:
        seconds = [line["t"] for line in found if line["run"] == run]
        assert seconds == sorted(seconds)


def test_the_page_says_which_commands_have_it() -> None:
    page = (Path(__file__).parents[2] / "docs/recording.md").read_text()
    without = re.findall("`([a-z]+)`", page.partition("have both;")[2].partition("which only look")[0])
    for name in group.FILES:
        options = {option for parameter in group.cli.get_command(None, name).params for option in parameter.opts}  # type: ignore[arg-type,union-attr]
        assert {"--record", "--trace"} & options == (set() if name in without else {"--record", "--trace"}), name
    assert "QMPMERGE_RECORD" in command.invoke("commit", "--help").out


class Terminal:
    """Notes at each line that it is shown whether a guest stands still; it may take its time for it."""

    def __init__(self, stands_still: Callable[[], bool]) -> None:
        self.stands_still = stands_still
        self.seen: list[tuple[str, bool]] = []

    def trace(self, entry: dict[str, Any]) -> None:
        self.seen.append((entry.get("message", {}).get("execute", entry["kind"]), self.stands_still()))


async def test_nothing_is_shown_while_filesystems_are_frozen(setup: Setup, tmp_path: Path) -> None:
    """A terminal that takes nothing kept them so until the dead man's switch came."""
    async with serving(f"{tmp_path}/agent") as agent:
        terminal = Terminal(lambda: bool(agent.frozen))
        with record.recorded([], [Screen(terminal)], warn=print):  # type: ignore[arg-type]
            async with setup.target() as target:
                await qmpmerge.snapshot(target, {"vda": f"{tmp_path}/new.qcow2"}, quiesce=agent.path)
        assert agent.seen["guest-fsfreeze-freeze"] == 1
    assert ("transaction", False) in terminal.seen and not any(frozen for _, frozen in terminal.seen)


def test_of_two_that_stand_still_nothing_is_shown_until_both_run_again() -> None:
    terminal = Terminal(lambda: False)
    recorder = Recorder([Screen(terminal)])  # type: ignore[arg-type]
    for is_on in (True, True, False):
        recorder.hurry(is_on)
    recorder.step("state", "", {})
    assert terminal.seen == []
    recorder.hurry(False)
    assert terminal.seen == [("step", False)]


def test_who_does_not_ask_for_it_does_not_pay_for_it(setup: Setup, tmp_path: Path) -> None:
    python = [os.path.join(os.path.dirname(COMMAND), "python"), "-X", "importtime", "-m", "qmpmerge"]
    for options in ([], ["--record", str(tmp_path / "rec")]):
        line = [*python, "commit", setup.machine.target, "vda", "--dry-run", *options]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        assert ("qmpmerge.recording" in done.stderr) is bool(options)


@pytest.mark.parametrize("greeting", [{}, {"QMP": None}, {"QMP": {"version": 7, "capabilities": []}}, {"event": "HI"}])
def test_what_greets_like_no_qemu_is_shown_too(greeting: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "monitor"))
        listener.listen()
        begun = subprocess.Popen([COMMAND, "disks", str(tmp_path / "monitor"), "-v"], stderr=subprocess.PIPE, text=True)
        connection, _ = listener.accept()
        connection.sendall(json.dumps(greeting).encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
        _, err = begun.communicate()
        connection.close()
    assert begun.returncode == 4 and f": {json.dumps(greeting)}\n" in err
    assert '-- end {"verdict": "unreachable", "code": 4, "error": {"name": "not-qmp"' in err


def test_a_file_that_cannot_be_written_is_refused_and_nothing_is_sent(setup: Setup, tmp_path: Path) -> None:
    setup.machine.session.events.clear()
    (tmp_path / "rec").write_text("somebody's notes\n")
    run = command.invoke("commit", setup.machine.target, "vda", "--record", str(tmp_path / "rec"), "--json")
    assert (run.code, run.document["error"]["name"]) == (3, "recording-unwritable")
    assert run.document["error"]["facts"] == {"file": str(tmp_path / "rec"), "reason": "it is no recording"}
    assert (tmp_path / "rec").read_text() == "somebody's notes\n"
    setup.machine.session.execute("query-status")
    assert setup.machine.session.events == []


def test_a_disk_that_is_full_harms_no_merge(setup: Setup, tmp_path: Path) -> None:
    """A limit of the shell's does what a full disk does, and stands for both."""
    record, arguments = tmp_path / "rec", ["commit", setup.machine.target, "vda", "--yes", "--record"]
    line = f'ulimit -f 16; exec "$0" "$@" {record}'
    done = subprocess.run(["bash", "-c", line, COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, "pivoted" in done.stdout) == (0, True), done.stderr
    assert f"the recording {record} has ended early: File too large" in done.stderr
    assert record.stat().st_size == 16 * 1024
    assert [json.loads(text)["kind"] for text in record.read_text().splitlines()[:-1]][:2] == ["start", "session"]
    setup.check()
    done = subprocess.run(
        [*["bash", "-c", line, COMMAND], "chain", setup.machine.target, "--record"], capture_output=True, text=True
    )
    assert (done.returncode, "has ended early: File too large" in done.stderr) == (0, True), done.stderr


def test_ctrl_c_is_its_end(setup: Setup, tmp_path: Path) -> None:
    begun = Begun("commit", setup.machine.target, "vda", "--speed", "1M", "--record", str(tmp_path / "rec"))
    begun.process.send_signal(signal.SIGINT)
    assert begun.end().document["verdict"] == "cancelled"
    found = lines(tmp_path / "rec")
    assert (found[-1]["kind"], found[-1]["verdict"], found[-1]["code"]) == ("end", "cancelled", 130)
    assert "taken-back" in [line.get("name") for line in found]


def test_of_a_command_that_was_killed_all_is_there_up_to_then(setup: Setup, tmp_path: Path) -> None:
    begun = Begun("commit", setup.machine.target, "vda", "--speed", "1M", "--record", str(tmp_path / "rec"))
    children = psutil.Process(begun.process.pid).children()
    (writer,) = [child for child in children if "writer_child.py" in " ".join(child.cmdline())]
    begun.process.kill()
    begun.process.communicate()
    writer.wait()
    found = lines(tmp_path / "rec")
    sent = [line["message"]["execute"] for line in found if line["kind"] == "sent"]
    assert "block-commit" in sent and found[-1]["kind"] != "end"
    assert command.invoke("job", setup.machine.target, "vda", "cancel").code in (0, 130)


def test_a_bug_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    breaking = (
        "import sys; from qmpmerge.operations import clean; clean.clean = None; from qmpmerge.cli import main; main()"
    )
    line = ["python3", "-c", breaking, "clean", str(tmp_path), "--record", str(tmp_path / "rec")]
    line[0] = os.path.join(os.path.dirname(COMMAND), "python")
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "--record FILE" in done.stderr
    end = lines(tmp_path / "rec")[-1]
    assert (end["verdict"], end["code"], end["error"]["name"]) == ("bug", 1, "TypeError")
    assert "Traceback" in end["error"]["traceback"][0]


def test_a_passphrase_reaches_neither_file_nor_stderr(tmp_path: Path) -> None:
    planted = "pl4nt3d,s3cr3t"
    secret = ["--object", f"secret,id=s,data={planted.replace(',', ',,')}"]
    cheap = "key-secret=s,iter-time=10,hash-alg=sha512"
    inner = f"encrypt.format=luks,encrypt.{cheap.replace(',', ',encrypt.')}"
    create_encrypted(*secret, "-f", "luks", "-o", cheap, "base.luks", str(2**20), cwd=tmp_path)
    options = ["-u", "-f", "qcow2", "-o", inner, "-b", "base.luks", "-F", "luks"]
    create_encrypted(*secret, *options, "a.qcow2", str(2**20), cwd=tmp_path)
    (tmp_path / "passphrase").write_text(planted)
    given = ["--secret", str(tmp_path / "passphrase"), "--record", str(tmp_path / "rec"), "-v"]
    run = command.invoke("commit", str(tmp_path / "a.qcow2"), *given)
    assert run.code == 0, run.err
    sent = [line["message"] for line in lines(tmp_path / "rec") if line["kind"] == "sent"]
    added = [message["arguments"]["data"] for message in sent if message["execute"] == "object-add"]
    assert set(added) == {"(not shown)"}
    for text in (run.out, run.err, (tmp_path / "rec").read_text()):
        assert "pl4nt3d" not in text and "s3cr3t" not in text
