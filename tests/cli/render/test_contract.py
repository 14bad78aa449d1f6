"""
docs/json.md against real runs: every command with every outcome that the page lists, and every key of its tables with a value.

The runs are made once for all tests, on as few QEMUs as can be; each is held against the page as it ends (`contract.hold`).
"""

import contextlib
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
from rig import contract
from rig.command import COMMAND, JOB, Begun, Run, attempt
from rig.faults import injecting
from rig.left import record
from rig.machines import Content, Machine, fill, have, machine, make_chain, run

from qmpmerge.chain.chain import Chain, Image, Slice
from qmpmerge.chain.outcome import MergedFile, Outcome, files_advice
from qmpmerge.cli.commands import group
from qmpmerge.cli.render.json import JsonOutput
from qmpmerge.engine.pace.progress import Progress, Shortage
from qmpmerge.engine.resume import Recovery
from qmpmerge.errors import (
    EXIT_CODES,
    Cancelled,
    Error,
    NeedsSecret,
    NoReply,
    NoSuchTarget,
    NotDurable,
    Postponed,
    StillRunning,
    TimedOut,
)
from qmpmerge.journal import store
from qmpmerge.operations.examine import Examination, Examined
from qmpmerge.operations.places import LeftOut
from qmpmerge.operations.plan import Ways
from qmpmerge.operations.snapshot import Overlay
from qmpmerge.operations.tidy import Tidied, Tidying
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.qemu.details import ImageDetails
from qmpmerge.qemu.jobs import Job
from qmpmerge.recording.explained import Explained, Item, Spent
from qmpmerge.recording.felt import Felt
from qmpmerge.recording.replay import Replayed
from qmpmerge.recording.script import Divergence
from qmpmerge.targets.target import ChainView

pytestmark = pytest.mark.timeout(600)  # the first test waits for all runs, some fifty commands

CODES = {**EXIT_CODES, "usage": 2, "bug": 1}

Told = dict[tuple[str, str], Run]
Say = Callable[..., Run]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """All runs, by command and verdict; of several alike the last."""
    contract.seen.clear()
    runs: Told = {}
    for story in (looked_at, merged, pulled, left, died, offline, failing, mistaken, rendered):
        folder = tmp_path_factory.mktemp(story.__name__)

        def say(*words: str | Path, folder: Path = folder) -> Run:
            return attempt(*map(str, words), "--json", cwd=folder)

        for one in story(folder, say):
            runs[one.document["command"], one.document["verdict"]] = one
    return runs


# --- the runs -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def vm(folder: Path, *more: str) -> Iterator[Machine]:
    """``base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2`` on a QEMU that has an empty drive too."""
    images = make_chain(folder)
    fill(images, Content())
    disk = ["-drive", f"file={images[3]},if=none,id=vda", "-device", "virtio-blk-pci,drive=vda,id=disk0,iothread=io0"]
    with machine(folder, *disk, "-object", "iothread,id=io0", "-device", "ide-cd,id=cd0", *more) as started:
        yield started


def looked_at(folder: Path, say: Say) -> Iterator[Run]:
    with vm(folder, "-name", "contract") as started:
        yield say("vms")
        yield say("disks", started.target, "--details")
        yield say("jobs", started.target)
        yield say("active", "base.raw")
        yield say("commit", started.target, "vda", "--nonsense")
        yield say("disks", folder / "none")
        yield say("commit", started.target, "vda", "--top", "3", "--dry-run", "--speed", "1M")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / "other.qcow2")
        node = say("chain", started.target, "vda").document["images"][-1]["node"]
        started.session.execute("block-dirty-bitmap-add", node=node, name="daily", persistent=True)
        yield say("chain", started.target, "vda", "--details", "-v")
        for command, given in (
            ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": f"{folder}/nbd"}}}),
            ("block-export-add", {"type": "nbd", "id": "export0", "node_name": node}),
        ):
            started.session.execute(command, **given)
        yield say("graph", started.target, "vda")
        yield say("plan", started.target, "vda")
        several = say("commit", started.target, "vda")
        refusals = several.document["error"]["facts"]["refusals"]
        assert [contract.of("error", one) for one in refusals] == [[]] * 2
        yield several
        yield say("commit", started.target, "vda", "--dry-run", "--force", "dependents")


def merged(folder: Path, say: Say) -> Iterator[Run]:
    with vm(folder) as started:
        started.session.execute("cont")
        yield say("commit", started.target, "vda", "--top", "2", "--hold")
        yield say("job", started.target, JOB, "follow", "--hold")
        yield say("commit", started.target, "vda", "--top", "2")
        yield say("commit", started.target, "vda", "--keep-overlay")
        yield say("commit", started.target, "vda", "--wait-ready")
        yield say("job", started.target, JOB, "follow", "--wait-ready")
        yield say("job", started.target, JOB, "keep")
        say("commit", started.target, "vda", "--wait-ready")
        yield say("job", started.target, JOB, "pivot")
        yield say("commit", started.target, "vda")
        yield say("snapshot", started.target, f"vda={folder}/d.qcow2", "--dry-run")
        yield say("snapshot", started.target, f"vda={folder}/d.qcow2")
        yield say("commit", started.target, "vda")
    yield say("clean", folder, "--dry-run")
    with open(folder / "b.qcow2.merged"):
        yield say("clean", folder)
    yield say("clean", folder / "b.qcow2.merged", "--older-than", "1d")


def pulled(folder: Path, say: Say) -> Iterator[Run]:
    with vm(folder) as started:
        yield say("pull", started.target, "vda", "--dry-run")
        yield say("pull", started.target, "vda", "--base", "1", "--speed", "1", "--detach")
        yield say("job", started.target, "qmpmerge-pull-vda", "speed", "0")
        yield say("job", started.target, "qmpmerge-pull-vda", "follow")
        yield say("pull", started.target, "vda", "--hold")
        yield say("pull", started.target, "vda")
        yield say("pull", started.target, "vda")


def left(folder: Path, say: Say) -> Iterator[Run]:
    with vm(folder) as started:
        yield say("commit", started.target, "vda", "--top", "2", "--speed", "1", "--detach")
        yield say("recover", folder)
        for command in ("disks", "chain", "jobs", "graph"):
            yield say(command, started.target)
        begun = Begun("job", started.target, JOB, "follow")
        begun.process.send_signal(signal.SIGHUP)
        yield begun.end()
        yield say("job", started.target, JOB, "speed", "0")
        yield say("job", started.target, JOB, "follow")
        begun = Begun("commit", started.target, "vda", "--speed", "1")
        begun.process.send_signal(signal.SIGINT)
        yield begun.end()
        begun = Begun("commit", started.target, "vda", "--speed", "1")
        started.kill()
        yield begun.end()


def died(folder: Path, say: Say) -> Iterator[Run]:
    """As if qmpmerge had died right after the overlay's header was rewritten."""
    images = make_chain(folder)
    store.write(record(images, 3))
    run("qemu-img", "rebase", "-u", "-b", "base.raw", "-F", "raw", "c.qcow2", cwd=folder)
    for command in ("disks", "chain"):
        yield say(command, "c.qcow2")
    yield say("doctor", ".")
    yield say("doctor", folder / "none", folder)
    yield say("recover", ".", "--dry-run")
    yield say("recover", ".")
    yield say("recover", ".")


def offline(folder: Path, say: Say) -> Iterator[Run]:
    for name, features in (("data", "data_file=data.raw"), ("own", "lazy_refcounts=on")):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", features, f"{name}.qcow2", "8M", cwd=folder)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "data.qcow2", "-F", "qcow2", "top.qcow2", cwd=folder)
    run("qemu-img", "snapshot", "-c", "before", folder / "own.qcow2")
    yield say("chain", "top.qcow2")
    yield say("graph", "top.qcow2")
    yield say("commit", "top.qcow2", "--dry-run")
    yield say("plan", "own.qcow2")
    yield say("chain", "own.qcow2", "--details")


def failing(folder: Path, say: Say) -> Iterator[Run]:
    images = make_chain(folder)
    fill(images, Content())
    failing = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=5"
    with machine(folder, *injecting(images, "base", failing)) as started:
        yield say("commit", started.target)


BUG = """
import sys
import qmpmerge.processes.vms
qmpmerge.processes.vms.vms = None
sys.argv = ["qmpmerge", "vms", "--json"]
from qmpmerge.cli import main
main()
"""


def mistaken(folder: Path, say: Say) -> Iterator[Run]:
    """A bug, which no other test's run may end in; and a stdout that takes nothing."""
    done = subprocess.run([sys.executable, "-c", BUG], capture_output=True, text=True, check=False)
    contract.hold(done.stdout, done.stderr)
    yield Run(done.returncode, done.stdout, done.stderr)
    full = ["sh", "-c", f"{COMMAND} active nothing --json >/dev/full"]
    event = json.loads(subprocess.run(full, capture_output=True, text=True, check=False).stderr)
    assert contract.problems_of_event(event) == contract.problems(event["document"]) == []


def rendered(folder: Path, say: Say) -> Iterator[Run]:
    """What takes a guest that writes, a disk that is full, a rare image or a QEMU that hangs, is rendered from values."""
    job = Job(JOB, "commit", "paused", 1, 2, reason="No space left on device", disk="vda", io_status="nospace")
    chain = Chain((Image("/vm/a.raw", "luks", 1, slice=Slice(512, 512)),))
    disk = Disk("vda", drive="vda", qdev=None, root="#block1", chain=chain, nodes=(), job=job)
    details = ImageDetails(1, None, None, None, "luks", None, None, None, None, (), ())
    outcome = Outcome("pivoted", "vda", chain, chain, converge=("limited",))
    short = Progress(
        "vda", job, "copied", 10**6, 3.0, Shortage("/vm", 4096), "going on", 10**5, True, "it helps to wait"
    )
    obstacle = MergedFile("/vm/b", "keep", "/vm/b", "it is in use")
    overlay = Overlay("vda", "/vm/b", "n", "/vm/a.raw", hint="it could not be noted", backing="a.raw")

    def merging(output: JsonOutput) -> None:
        output.progress(short)
        output.commit(replace(outcome, merged=(obstacle,)))

    yield _rendered("commit", merging)
    yield _rendered(
        "chain", lambda output: output.chain(ChainView(disk, chain, (), Layout((), (), {}, {}), (details,)))
    )
    yield _rendered("snapshot", lambda output: output.snapshot([overlay]))
    yield _rendered("plan", lambda output: output.plan(Ways("vda", chain, not_seen=("/vm/x cannot be listed",))))
    for error in (NoReply(target="vm1", command="query-jobs", seconds=1.0), NeedsSecret(image="/vm/b")):
        report = Examination((Examined("vm1", error=error),), 1, 0)
        yield _rendered("doctor", functools.partial(JsonOutput.doctor, report=report))
    for command in ("commit", "pull"):
        yield _rendered(command, lambda output: output.failure(TimedOut(job=JOB, seconds=1.0)))
    yield from _tidied(outcome, short)
    yield from _recorded()
    errors: tuple[Error, ...] = (
        NoReply(target="vm1", command="query-jobs", seconds=1.0),
        NeedsSecret(image="/vm/b"),
        NoSuchTarget(target="vm1"),
        NotDurable(node="n", reason="I/O error"),
    )
    for one in errors:
        recovery = Recovery(one.verdict, "/vm/b", None, str(one), hints=(one.hint,), error=one)
        yield _rendered("recover", functools.partial(JsonOutput.recovered, found=[recovery]))


def _tidied(outcome: Outcome, short: Progress) -> Iterator[Run]:
    def say(done: Tidied) -> Run:
        def tidying(output: JsonOutput) -> None:
            output.progress(replace(short, target="vm1"))
            output.tidied(done)
            output.tidy(Tidying((done,), (LeftOut("vm2", "libvirt manages it"), LeftOut("vm3", "why", "vda", "hint"))))

        return _rendered("tidy", tidying)

    for verdict in ("pivoted", "planned", "unchanged"):
        yield say(Tidied("vm1", "vda", replace(outcome, verdict=verdict)))
    errors: tuple[Error, ...] = (
        NoReply(target="vm1", command="query-jobs", seconds=1.0),
        NeedsSecret(image="/vm/b"),
        NoSuchTarget(target="vm1"),
        NotDurable(node="n", reason="I/O error"),
        StillRunning(target="vm1", job=JOB),
        Postponed(seconds=1.0),
        Cancelled(),
    )
    for one in errors:
        yield say(Tidied("vm1", "vda", error=one))


def _recorded() -> Iterator[Run]:
    item = Item(0.1, "command", "stop", "why", "virsh suspend vm1", 1, 0.1, "it is refused")
    felt, spent = Felt("pause", 0.1, 0.2, "still"), Spent("copying", 0.1, 0.1, 1)
    made = ("2026-11-30T13:57:37.420425Z", "0.1.0", "10.0.2", "failed", 5, "it failed", 0.1, False)
    run = Explained(("qmpmerge", "commit"), *made, (item,), (felt,), (spent,))
    yield _rendered("explain", lambda output: output.explained([run], unread=1))
    for diverged in (Divergence("stop", "cont"), None):
        left = (() if diverged is None else ("cont",), diverged, ("query-jobs",), ("query-pci",), ("/vm/a.vmdk",))
        replayed = Replayed("/run/replay", 1, 1, *left)

        def replay(output: JsonOutput, replayed: Replayed = replayed) -> None:
            output.listening(replayed.socket)
            output.replayed(replayed)

        yield _rendered("replay", replay)


def _rendered(command: str, say: Callable[[JsonOutput], None]) -> Run:
    out, err = io.StringIO(), io.StringIO()
    say(JsonOutput(out, err, command=command))
    contract.hold(out.getvalue(), err.getvalue())
    run = Run(0, out.getvalue(), err.getvalue())
    return replace(run, code=CODES[run.document["verdict"]])


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "verdict"), sorted(contract.PRINTED))
def test_each_command_with_each_outcome(command: str, verdict: str, told: Told) -> None:
    runs = [one for (typed, came), one in told.items() if came == verdict and command in (typed, "any")]
    assert [one.code for one in runs] == [CODES[verdict]] * len(runs) and runs


@pytest.mark.parametrize("table", contract.TABLES)
def test_each_key_was_seen_with_a_value(table: str, told: Told) -> None:
    assert [key for key in contract.TABLES[table] if (table, key) not in contract.seen] == []


def examples() -> Iterator[str]:
    """Commands with jq, from the page and from what the commands say of themselves."""
    sources = [*contract.DOCUMENT.parents[1].glob("*.md"), *contract.DOCUMENT.parent.glob("*.md")]
    sources += Path(group.__file__).parent.glob("*.py")
    for source in sources:
        yield from (line.strip() for line in source.read_text().splitlines() if " --json" in line and "| jq " in line)


@pytest.mark.skipif(not have("jq"), reason="no jq")
def test_the_examples_do_what_they_say(tmp_path: Path) -> None:
    lines = list(dict.fromkeys(examples()))
    assert len(lines) > 5
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qmpmerge").symlink_to(COMMAND)
    with vm(tmp_path) as started:
        for line in lines:
            here = line.replace("/tmp/result", "result").replace("/vm", str(tmp_path)).replace("vm1", started.target)
            path = f"{tmp_path}/bin:{os.environ['PATH']}"
            done = subprocess.run(
                ["sh", "-c", here], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True
            )
            assert done.returncode == 0 and b"jq: " not in done.stderr, done
            assert done.stdout or ".fix" in line or "jobs" in line, line


def test_the_objects_that_are_shown_are_as_the_page_says() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", contract.DOCUMENT.read_text(), re.DOTALL)
    for line in map(json.loads, shown.splitlines()):
        assert (contract.problems_of_event if "event" in line else contract.problems)(line) == []


def test_every_verdict_stands_on_the_page() -> None:
    assert {verdict for _, verdict in contract.PRINTED} == set(CODES)


def test_every_command_with_json_stands_on_the_page() -> None:
    context = click.Context(group.cli)
    commands = {name: group.cli.get_command(context, name) for name in group.FILES}
    options = {
        name: [one for one in command.params if isinstance(one, click.Option)]
        for name, command in commands.items()
        if command
    }
    has_json = {name for name, its in options.items() if any(one.name == "json" and not one.hidden for one in its)}
    assert has_json == {command for command, _ in contract.PRINTED} - {"any"}


def test_a_key_is_of_one_type_wherever_it_stands() -> None:
    types: dict[str, set[str]] = {}
    for table, keys in contract.TABLES.items():
        for key, kind in keys.items() if table != "looked at" else ():  # which has numbers of them
            plain = re.sub("^`.*", "string", kind.removesuffix(" or null").replace("file", "string"))
            plain = re.sub(r"^\[.*", "object", plain)
            types.setdefault(key, set()).add(plain)
    assert {key: found for key, found in types.items() if len(found) > 1} == {}


def test_every_table_is_of_use() -> None:
    page = contract.DOCUMENT.read_text()
    linked = {name.replace(" ", "-") for name in re.findall(r"\]\(#([\w-]+)\)", page)} | {*contract.EVENTS}
    assert {name.replace(" ", "-") for name in contract.TABLES} == linked


def test_the_sample_says_what_is_said() -> None:
    printed = next(line for line in contract.DOCUMENT.read_text().splitlines() if '"verdict": "merged"' in line)
    sample = json.loads(printed)
    merged = [MergedFile(**one) for one in sample["merged"]]
    assert sample["hints"] == files_advice(merged)
