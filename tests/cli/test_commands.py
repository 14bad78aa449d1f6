"""The installed command, driven as users and programs drive it."""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from rig import command
from rig.command import COMMAND, JOB, Begun, Run, invoke
from rig.disks import Setup, device
from rig.faults import injecting
from rig.machines import Content, machine, make_chain

from qmpmerge.cli import bug
from qmpmerge.cli.commands.group import FILES, cli
from qmpmerge.cli.run import ONE_SIGNAL_SECONDS
from qmpmerge.errors import EXIT_CODES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vm(setup: Setup) -> str:
    return setup.machine.target


# --- every verdict and exit code of the table in docs/errors.md --------------------------------------------------------


def table() -> dict[str, int]:
    """Verdicts and exit codes as the page shows them."""
    rows = re.findall(r"^\| (\d+) \|([^|]*)\|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    return {verdict: int(code) for code, verdicts in rows for verdict in re.findall(r"`(\w+)`", verdicts)}


def cancelled(setup: Setup) -> Run:
    begun = Begun("commit", setup.machine.target, "--speed", "1")
    begun.process.send_signal(signal.SIGINT)
    return begun.end()


def unknown(setup: Setup) -> Run:
    begun = Begun("commit", setup.machine.target, "--speed", "1")
    setup.machine.kill()
    return begun.end()


def done(setup: Setup) -> Run:
    command.started("commit", setup.machine.target, "--speed", "1", "--detach")
    return command.started("job", setup.machine.target, JOB, "cancel", "--json")


def unchanged(setup: Setup) -> Run:
    command.started("commit", setup.machine.target)
    return command.started("commit", setup.machine.target, "--json")


def failed(setup: Setup) -> Run:
    """On a machine of its own, whose base cannot be written."""
    setup.machine.stop()
    folder = setup.machine.folder
    failing = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=5"
    images = [folder / name for name in ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")]
    (folder / "second").mkdir()
    with machine(folder / "second", *injecting(images, "base", failing)) as second:
        return command.started("commit", second.target, "--json")


def with_a_bug(*arguments: str, raising: str = "1 / 0") -> Run:
    """In looking for the target, which a bug of ours may raise anything from."""
    program = f"""
import qmpmerge.targets.live, sys
def find(target):
    raise {raising}
qmpmerge.targets.live.find = find
sys.argv = ["qmpmerge", *{arguments!r}]
from qmpmerge.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return Run(done.returncode, done.stdout, done.stderr)


def plainly(*arguments: str) -> Callable[[Setup], Run]:
    return lambda setup: command.started(arguments[0], setup.machine.target, *arguments[1:], "--json")


WAYS: dict[str, Callable[[Setup], Run]] = {
    "merged": plainly("commit", "--top", "[3]"),
    "pivoted": plainly("commit"),
    "pulled": plainly("pull"),
    "kept": plainly("commit", "--keep-overlay"),
    "ready": plainly("commit", "--wait-ready"),
    "held": plainly("pull", "--hold"),
    "planned": plainly("commit", "--dry-run"),
    "unchanged": unchanged,
    "created": lambda setup: command.started(
        "snapshot", setup.machine.target, f"vda={setup.machine.folder}/new.qcow2", "--json"
    ),
    "done": done,
    "bug": lambda setup: with_a_bug("disks", "x", "--json"),
    "usage": plainly("commit", "--nonsense"),
    "refused": plainly("commit", "nope"),
    "unreachable": lambda setup: command.started("disks", f"{setup.machine.folder}/none", "--json"),
    "failed": failed,
    "unknown": unknown,
    "postponed": plainly("tidy", "--keep", "1", "--timeout", "1ms"),
    "running": plainly("commit", "--speed", "1", "--detach"),
    "cancelled": cancelled,
}


@pytest.mark.parametrize("verdict", WAYS)
def test_every_verdict_can_be_reached_and_has_its_exit_code(verdict: str, setup: Setup) -> None:
    run = WAYS[verdict](setup)
    assert (run.document["verdict"], run.code) == (verdict, table()[verdict])
    assert run.document["schema"] == 1


def test_the_table_is_complete() -> None:
    assert table() == {**EXIT_CODES, "usage": 2, "bug": 1}
    assert set(WAYS) == set(table())


def test_a_bug_is_a_traceback_and_exit_1() -> None:
    run = with_a_bug("disks", "x")
    assert (run.code, run.out) == (1, "")
    assert "Traceback" in run.err
    assert run.err.splitlines()[-2:] == ["bug: ZeroDivisionError: division by zero", f"hint: {bug.HINT}"]


def test_a_bug_is_one_object_too() -> None:
    run = with_a_bug("disks", "x", "--json")
    error = run.document["error"]
    assert (error["name"], error["message"]) == ("internal", "ZeroDivisionError: division by zero")
    assert "Traceback" in error["facts"]["traceback"][0]
    assert run.err == ""


def test_an_oserror_that_nobody_foresaw_is_a_bug_and_not_silence() -> None:
    """Not even one that looks as if our reader had gone."""
    for raised in ("OSError(5, 'Input/output error')", "BrokenPipeError(32, 'Broken pipe')"):
        run = with_a_bug("disks", "x", raising=raised)
        assert (run.code, "Traceback" in run.err) == (1, True)


# --- what programs read ------------------------------------------------------------------------------------------------


def test_the_story_in_json(vm: str, setup: Setup, images: list[Path], content: Content) -> None:
    files = [str(image) for image in images]
    (disk,) = command.started("disks", vm, "--json").document["disks"]
    assert (disk["disk"], disk["qdev"], disk["file"], disk["depth"]) == ("vda", "disk0", files[3], 4)
    chain = command.started("chain", vm, "vda", "--json").document
    assert [image["file"] for image in chain["images"]] == files
    assert [image["backing"] for image in chain["images"]] == [None, "base.raw", "a.qcow2", "b.qcow2"]
    assert [image["active"] for image in chain["images"]] == [False, False, False, True]
    merged = command.started("commit", vm, "disk0", "--top", "vda[3]", "--json")
    assert (merged.document["before"], merged.document["after"]) == (files, [files[0], files[3]])
    assert [entry["file"] for entry in merged.document["merged"]] == files[1:3]
    progress = [json.loads(line) for line in merged.err.splitlines()]
    assert {line["event"] for line in progress} == {"progress"}
    # QEMU tells how much of the disk it has walked; what there is to copy is found out meanwhile.
    whole = {"scanned": len(content.data), "copied": merged.document["copied"]}
    assert progress[-1]["job"]["done"] == progress[-1]["job"]["total"] == whole[progress[-1]["counts"]]
    for entry in merged.document["merged"]:
        os.unlink(entry["now"])
    pivoted = command.started("commit", vm, str(images[3]), "--json").document
    assert (pivoted["after"], pivoted["job"]) == ([files[0]], None)
    assert "start the VM from" in pivoted["hints"][0]
    assert command.started("jobs", vm, "--json").document["jobs"] == []
    setup.machine.stop()
    content.check(images[0])


def test_a_failure_is_one_object_too(vm: str) -> None:
    run = command.invoke("commit", vm, "--base", "[7]", "--json")
    error = run.document["error"]
    assert (error["name"], error["facts"]["layer"]) == ("no-such-layer", "[7]")
    assert "1 /" in error["hint"]
    assert run.err == ""


def test_quiet_says_nothing_but_the_result(vm: str) -> None:
    run = command.invoke("commit", vm, "-q")
    assert (run.code, run.err) == (0, "")
    assert "pivoted" in run.out


@pytest.mark.parametrize("option", ["-v", "--trace"])
def test_the_conversation_can_be_seen(option: str, vm: str) -> None:
    run = command.invoke("disks", vm, option)
    assert '-> {"execute": "query-block"}' in run.err
    assert "query-block" not in run.out


def test_progress_is_a_plain_line_every_ten_percent_where_nobody_looks(vm: str) -> None:
    # 2.6 MiB to copy: longer than the half second in which nothing is drawn, even where our first look comes late.
    run = command.invoke("commit", vm, "--top", "[3]", "--speed", "2M")
    lines = [line for line in run.err.splitlines() if "%" in line]
    assert 1 <= len(lines) <= 10
    shown = r"vda: \d+ %, (scanned [\d.]+ \w+ of 8 MiB|copied [\d.]+ \w+ of 2[.]\d MiB)"
    assert [line for line in lines if not re.match(shown, line)] == []


# --- what people see ---------------------------------------------------------------------------------------------------


def test_an_error_is_one_sentence_with_a_hint(vm: str) -> None:
    run = command.invoke("commit", vm, "nope")
    assert run.out == ""
    assert run.err == f"refused: no disk nope on {vm}\nhint: disks there: vda\n"


def test_a_vm_is_found_by_name(tmp_path: Path, images: list[Path]) -> None:
    name = f"test-{os.getpid()}"
    with machine(tmp_path, "-name", f"guest={name}", "-drive", f"file={images[3]},if=none,id=vda") as vm:
        assert "c.qcow2" in command.invoke("chain", name).out
        assert "c.qcow2" in command.invoke("chain", f"pid:{vm.process.pid}").out
        assert re.search(
            rf"^{name} +{vm.process.pid} .*{re.escape(vm.target)}$", command.invoke("vms").out, re.MULTILINE
        )
        (tmp_path / "second").mkdir()
        with machine(tmp_path / "second", "-name", name):
            run = command.invoke("chain", name)
            assert (run.code, "more than one running QEMU" in run.err) == (4, True)
    assert command.invoke("chain", name).code == 4


def test_a_vm_of_libvirt_is_left_alone_unless_the_user_insists(tmp_path: Path, images: list[Path]) -> None:
    """As libvirt starts them: the monitor's chardev is called charmonitor and its socket was passed in."""
    folder = tmp_path / "run" / "libvirt" / "qemu"
    folder.mkdir(parents=True)
    name = f"virt-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "monitor.sock"))
        listener.listen()
        chardev = f"socket,id=charmonitor,fd={listener.fileno()},server=on,wait=off"
        command = [
            "qemu-system-x86_64",
            "-name",
            f"guest={name}",
            "-M",
            "none",
            "-S",
            "-display",
            "none",
            "-nodefaults",
        ]
        process = subprocess.Popen(
            [*command, "-chardev", chardev, "-mon", "chardev=charmonitor,mode=control"], pass_fds=[listener.fileno()]
        )
    try:
        assert invoke("disks", str(folder / "monitor.sock")).code in (0, 3)
        by_pid = invoke("disks", f"pid:{process.pid}")
        assert (by_pid.code, "managed by libvirt" in by_pid.err) == (3, True)
        assert invoke("disks", f"pid:{process.pid}", "--force", "libvirt").code == 0
    finally:
        process.terminate()
        process.wait(20)


def test_escape_sequences_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    images = make_chain(tmp_path, ["base.raw", "\x1b[31mred\n.qcow2"])
    with machine(tmp_path, "-drive", f"file={images[1]},if=none,id=vda") as vm:
        for arguments in (["disks", vm.target], ["chain", vm.target], ["commit", vm.target, "--dry-run"]):
            run = command.invoke(*arguments)
            assert "\x1b" not in run.out + run.err
            assert "\\x1b[31mred\\x0a.qcow2" in run.out
        assert command.invoke("chain", vm.target, "--json").document["images"][1]["file"] == str(images[1])


def test_base_above_top_and_other_mistakes(vm: str, images: list[Path]) -> None:
    cases = [
        (["--base", "[3]", "--top", "[2]"], 3, "swap --base and --top"),
        (["--base", "[2]", "--top", "[2]"], 3, "nothing to merge"),
        (["--base", "[2]", "--shallow"], 2, "cannot be used together"),
        (["--speed", "fast"], 2, "as in 64M"),
        (["--timeout", "-1"], 2, "--timeout"),
    ]
    for arguments, code, text in cases:
        run = command.invoke("commit", vm, "vda", *arguments)
        assert (run.code, text in run.err) == (code, True), run.err
    assert command.invoke("snapshot", vm, "vda").code == 2
    assert command.invoke("job", vm, "x", "speed").code == 2
    assert command.invoke("jobs", str(images[0])).code == 4
    chain = command.invoke("chain", vm, "--json").document
    assert len(chain["images"]) == 4


def test_sigterm_cancels_like_ctrl_c(vm: str, images: list[Path]) -> None:
    begun = Begun("commit", vm, "--top", "[3]", "--speed", "1")
    begun.process.terminate()
    run = begun.end()
    assert (run.code, run.document["verdict"]) == (130, "cancelled")
    assert command.invoke("jobs", vm, "--json").document["jobs"] == []
    assert len(command.invoke("chain", vm, "--json").document["images"]) == 4


def test_a_second_ctrl_c_leaves_at_once(vm: str, setup: Setup) -> None:
    """QEMU is stopped, so the cancelling cannot end; the job is QEMU's and there when it goes on."""
    begun = Begun("commit", vm, "--speed", "1")
    setup.machine.process.send_signal(signal.SIGSTOP)
    begun.process.send_signal(signal.SIGINT)
    assert begun.process.stderr is not None
    while b"cancelling" not in begun.process.stderr.readline():
        pass
    time.sleep(2 * ONE_SIGNAL_SECONDS)
    begun.process.send_signal(signal.SIGINT)
    assert begun.process.wait(30) == 7
    begun.process.communicate()
    setup.machine.process.send_signal(signal.SIGCONT)


def test_a_reader_that_goes_away_is_no_error(vm: str) -> None:
    process = subprocess.Popen([COMMAND, "chain", vm], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (0, b"")
    process.stderr.close()


# --- jobs --------------------------------------------------------------------------------------------------------------


def test_a_job_is_controlled_from_the_command_line(vm: str, setup: Setup, content: Content) -> None:
    left = command.started("commit", vm, "--speed", "1", "--detach")
    assert (left.code, f"qmpmerge job {vm} {JOB} follow" in left.err) == (7, True)
    (job,) = command.started("jobs", vm, "--json").document["jobs"]
    assert (job["id"], job["disk"], job["ours"], job["speed"]) == (JOB, "vda", True, 1)
    assert JOB in command.started("jobs", vm).out
    assert command.started("job", vm, JOB, "pivot").code == 3
    assert command.started("job", vm, JOB, "pause").code == 0
    assert command.started("job", vm, JOB, "resume").code == 0
    assert command.started("job", vm, JOB, "speed", "0", "--json").document["job"]["speed"] == 0
    ready = command.started("job", vm, JOB, "follow", "--wait-ready", "--json")
    assert ready.document["verdict"] == "ready"
    assert command.started("job", vm, JOB, "pivot", "--json").document["verdict"] == "pivoted"
    assert command.started("job", vm, JOB, "pivot").code == 3
    setup.check()


def test_no_jobs(vm: str) -> None:
    run = command.invoke("jobs", vm)
    assert (run.code, run.out, run.err) == (0, "", "no block jobs\n")


# --- help and completion -----------------------------------------------------------------------------------------------

NAMES = (
    "vms",
    "disks",
    "chain",
    "graph",
    "snapshot",
    "active",
    "commit",
    "pull",
    "plan",
    "recover",
    "clean",
    "tidy",
    "jobs",
    "job",
    "doctor",
    "explain",
    "replay",
    "completion",
)


def test_version() -> None:
    assert re.fullmatch(r"qmpmerge \d+\.\d+\.\d+\n", command.invoke("--version").out)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    assert "_QMPMERGE_COMPLETE" in command.invoke("completion", shell).out


def completed(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    line = {"_QMPMERGE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    return [answer.partition(",")[2] for answer in command.invoke(env=line).out.splitlines() if answer]


def test_commands_disks_layers_and_jobs_are_completed_live(vm: str, images: list[Path]) -> None:
    assert set(completed("qmpmerge", "")) == set(NAMES)
    assert completed("qmpmerge", "chain", vm, "") == ["vda"]
    assert completed("qmpmerge", "snapshot", vm, "v") == ["vda="]
    assert completed("qmpmerge", "commit", vm, "vda", "--top", "") == [
        *("1", "2", "3", "4"),
        *("base.raw", "a.qcow2", "b.qcow2", "c.qcow2"),
    ]
    assert completed("qmpmerge", "commit", vm, "vda", "--top", "b") == ["base.raw", "b.qcow2"]
    assert completed("qmpmerge", "commit", vm, "vda", "--top", "/") == [str(image) for image in images]
    command.invoke("commit", vm, "--wait-ready")
    assert completed("qmpmerge", "job", vm, "") == [JOB]
    assert completed("qmpmerge", "chain", "no-such-vm", "") == []


# --- the pages ---------------------------------------------------------------------------------------------------------

SHOWING = ("README.md", "docs/offline.md", "docs/recover.md")
"""Pages that show commands in a table, or in blocks where nothing tells what is seen."""


def shown_commands() -> list[list[str]]:
    text = "\n".join((ROOT / name).read_text() for name in SHOWING)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    plain = "".join(block for language, block in blocks if not language)
    lines = re.findall(r"^qmpmerge (.*)$", plain, re.MULTILINE)
    lines += re.findall(r"^\| \[`qmpmerge (.*?)`\]", text, re.MULTILINE)
    return [re.split(r" {2,}| > ", line)[0].replace("'", "").split() for line in lines]


def test_an_index_means_another_image_the_second_time_and_the_help_and_the_page_say_so(images: list[Path]) -> None:
    active = str(images[3])
    first, second = (command.invoke("commit", active, "--top", "2", "--json").document["merged"] for _ in range(2))
    assert [[one["file"] for one in merged] for merged in (first, second)] == [[str(images[1])], [str(images[2])]]
    assert "name files in what is run more than once" in " ".join(command.invoke("commit", "--help").out.split())
    assert "so\nname files in what is run more than once" in (ROOT / "docs/commit.md").read_text()


WAITS = ("job", "replay")
"""The one needs a job, the other somebody who asks."""


def test_the_commands_of_the_pages_do_what_they_say(tmp_path: Path, images: list[Path], content: Content) -> None:
    """Each is run, on a VM or on images that are called like those there; commits come last."""
    name = f"vm1-{os.getpid()}"
    (tmp_path / "off").mkdir()
    off = make_chain(tmp_path / "off")
    ran = set()
    recording = str(tmp_path / "recording")
    command.invoke("chain", str(off[3]), "--record", recording)
    with machine(tmp_path, "-name", name, "-drive", f"file={images[2]},if=none,id=vda", *device("vda")):
        for words in sorted(shown_commands(), key=lambda words: words[0] == "commit"):
            arguments = [re.sub(r"^vm[12]$", name, word).replace("=/vm/snap1", f"={tmp_path}/new") for word in words]
            arguments = [word.replace("/vm/c.qcow2", str(off[3])) for word in arguments]
            arguments = [word.replace("/vm/base.raw", str(off[0])) for word in arguments]
            arguments = [str(tmp_path) if word == "/vm" else word for word in arguments]
            arguments = [recording if word == "merge.jsonl" else word for word in arguments]
            if words[0] not in WAITS:
                run = command.invoke(*arguments)
                assert run.code in (0, 3), (arguments, run.err)
                ran.add((words[0], run.code))
    assert {(command, 0) for command in NAMES if command not in WAITS} <= ran


def test_every_command_is_found_in_the_file_that_the_table_names() -> None:
    for name, file in FILES.items():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command is vars(importlib.import_module(f"qmpmerge.cli.commands.{file}"))[name]
    assert set(cli.commands) == set(FILES)


def test_importing_the_library_is_cheap() -> None:
    """`qmpmerge --version` must not wait for what it does not need."""
    program = """
import json, os, sys
os._exit = lambda code: None
sys.argv = ["qmpmerge", "--version"]
from qmpmerge.cli import main
main()
needless = ("asyncio", "qmpmerge.cli.words", "qemu.qmp", "psutil", "qmpmerge.cli.commands.listing", "qmpmerge.targets")
print(json.dumps([name for name in needless if name in sys.modules]))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == []


NEEDLESS = [
    "ssl",
    "_ssl",
    "psutil",
    "qmpmerge.cli.words",
    "qmpmerge.cli.bug",
    "qmpmerge.engine.run",
    "qmpmerge.journal.record",
]
NEVER_LOADED = {
    "chain": [*NEEDLESS, "qmpmerge.engine.pace.progress", "qmpmerge.chain.plan", "qmpmerge.checks"],
    "disks": [*NEEDLESS, "qmpmerge.engine.pace.progress", "qmpmerge.checks"],
    "active": [
        *NEEDLESS,
        "asyncio",
        "qemu.qmp",
        "qmpmerge.engine.pace.progress",
        "qmpmerge.qemu",
        "qmpmerge.processes",
    ],
    "commit": [
        *NEEDLESS,
        "qmpmerge.engine.commit",
        "qmpmerge.engine.go",
        "qmpmerge.engine.safeguards",
        "qmpmerge.guest",
    ],
}
"""By command; of a merge what its dry run does without."""


@pytest.mark.parametrize("word", NEVER_LOADED)
def test_a_command_loads_only_what_it_needs(word: str, images: list[Path]) -> None:
    """
    OpenSSL and psutil take longer to load than a short command to run; who wants TLS beside us still gets it. Nor is loaded
    what only another way through the command needs.
    """
    arguments = [word, str(images[3]), "--json", *(["--dry-run"] if word == "commit" else [])]
    program = f"""
import json, os, sys
os._exit = lambda code: None
sys.argv = ["qmpmerge", *{arguments!r}]
from qmpmerge.cli import main
main()
print(json.dumps([name for name in {NEVER_LOADED[word]!r} if name in sys.modules]))
import ssl
print(bool(ssl.create_default_context().cert_store_stats()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    shown, loaded, has_tls = run.stdout.splitlines()
    assert json.loads(shown)["schema"] == 1 and json.loads(shown)["verdict"] in ("done", "planned")
    assert (json.loads(loaded), has_tls) == ([], "True")
