"""
The stage: images, a guest that writes, and one merge or pull under observation, by us or by a plain `block-commit`, or
`block-stream`.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rig.disks import BACKEND, device, form, nodes
from rig.folder import beside
from rig.machines import SIZE, Content, Machine, Session, machine, run

from faults.gate import Gate
from faults.log import Fault, Log
from faults.nbdserver import NbdServer

TOOL_SECONDS = 60
DISK = "disk0"
PIECE = 128 * 1024
SHIFTS = {1: 0, 2: PIECE // 4, 3: 0}
"""Where in each piece a layer has its data: that of mid lies half over the base's and half where the base has none."""

Doer = Literal["qmpmerge", "block-commit"]
"""The latter stands for what QEMU does by itself, a plain `block-stream` where the story is one of a pull."""

Pulls = Literal["", "whole", "partial", "middle"]
"""All into top; what lies above base into top; all into mid."""


@dataclass(frozen=True)
class Story:
    """
    A merge of `base <- mid <- top`: of mid into base, or of all (`pivots`), or a pull, under a machine or `offline`. `writes`:
    the guest writes all the while; `network`: the images come over NBD; `reconnects`: from a server that comes back; `holds`:
    it is held, and then gone on with.
    """

    pivots: bool = False
    offline: bool = False
    writes: bool = False
    network: bool = False
    reconnects: bool = False
    pulls: Pulls = ""
    holds: bool = False

    @property
    def relinked(self) -> int:
        """Which of the three images gets another header."""
        return 1 if self.pulls == "middle" else 2

    @property
    def left(self) -> tuple[int, ...]:
        """Which of the three images the chain has afterwards, where top is still called so."""
        return {"": (0, 2), "partial": (0, 2), "whole": (2,), "middle": (1, 2)}[self.pulls]

    @property
    def verdict(self) -> str:
        """What is said where a header was rewritten."""
        return "pulled" if self.pulls else "merged"

    def __str__(self) -> str:
        where = "offline" if self.offline else "network" if self.network else "live"
        kind = f"pull, {self.pulls}" if self.pulls else "active" if self.pivots else "intermediate"
        return f"{where} {kind}{', held' if self.holds else ''}{', guest writing' if self.writes else ''}"


STORIES = (Story(), Story(pivots=True), Story(writes=True), Story(pivots=True, writes=True),
           Story(network=True), Story(pivots=True, network=True),
           Story(offline=True), Story(pivots=True, offline=True))  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How the images are made: the base's format, and options of `qemu-img create` for the qcow2 ones."""

    base: str = "qcow2"
    options: str = ""

    @property
    def names(self) -> tuple[str, str, str]:
        return f"base.{self.base}", "mid.qcow2", "top.qcow2"


LAYOUTS = {
    "qcow2": Layout(),
    "raw-base": Layout(base="raw"),
    "large-clusters": Layout(options="cluster_size=2M"),
    "small-clusters": Layout(options="cluster_size=4k"),
    "extended-l2": Layout(options="extended_l2=on,cluster_size=128k"),
    "lazy-refcounts": Layout(options="lazy_refcounts=on"),
}


@dataclass(frozen=True)
class Stock:
    """Images that every merge gets a copy of, and what their top shows."""

    folder: Path
    names: tuple[str, ...]
    content: bytes


def make_stock(folder: Path, layout: Layout) -> Stock:
    """Data is scattered, so that a merge is made of many writes, and each layer hides a part of the one below."""
    folder.mkdir()
    content, below = Content(), ""
    for number, name in enumerate(layout.names, 1):
        options = ["-o", layout.options] if layout.options and name.endswith("qcow2") else []
        backing = ["-b", below, "-F", form(Path(below))] if below else []
        run("qemu-img", "create", "-q", "-f", form(Path(name)), *options, *backing, name, str(SIZE), cwd=folder)
        puts = [content.put(16 * number + piece % 16, piece * PIECE + SHIFTS[number], PIECE // 2)
                for piece in range(1 + number, SIZE // PIECE, number)]  # fmt: skip
        run("qemu-io", "-f", form(Path(name)), *(word for put in puts for word in ("-c", put)), folder / name)
        below = name
    return Stock(folder, layout.names, bytes(content.data))


class Guest:
    """
    Writes 4 KiB here and there and flushes, again and again, each time in a new place with a new pattern.

    `acknowledged` are the writes that were flushed, each with the length of the log at that time; `begun` are all.
    """

    SLOT = 4096

    def __init__(self, session: Session, node: str, log: Log) -> None:
        self._session, self._node, self._log = session, node, log
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self.begun: list[tuple[int, int]] = []
        self.acknowledged: list[tuple[int, int, int]] = []

    def __enter__(self) -> "Guest":
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        self._thread.join(20)

    def _write(self) -> None:
        slots = SIZE // self.SLOT
        for number in range(slots):
            slot, pattern = number * 1021 % slots, 200 + number % 50
            self.begun.append((slot * self.SLOT, pattern))
            try:
                self._io(f"write -q -P {pattern} {slot * self.SLOT} {self.SLOT}")
                self._io("flush")
            except (OSError, ValueError, AssertionError):
                return  # killed with its machine
            self.acknowledged.append((slot * self.SLOT, pattern, self._log.count))
            if self._ended.wait(0.005):
                return

    def _io(self, command: str) -> None:
        line = f'qemu-io -d {self._node} "{command}"'
        answer = self._session.execute("human-monitor-command", command_line=line)
        assert "rror" not in answer and "failed" not in answer, answer


@dataclass
class Played:
    """
    What one merge came to, seen from outside. `verdict` is what was said of it, `done` whether success was claimed;
    `count` the operations from its start to the end of the machine, `count_at_end` those up to its verdict; `alive`
    whether the machine outlived the merge.
    """

    story: Story
    doer: Doer
    verdict: str = ""
    document: dict[str, Any] = field(default_factory=dict)
    code: int = 0
    complaints: str = ""
    done: bool = False
    alive: bool = True
    killed_at_end: bool = False
    count: int = 0
    count_at_end: int = 0
    acknowledged: list[tuple[int, int, int]] = field(default_factory=list)
    begun: list[tuple[int, int]] = field(default_factory=list)


class Case:
    """A copy of the images in a folder of its own, with a log of all that is done to them."""

    def __init__(self, stock: Stock, folder: Path) -> None:
        self._stock, self._parent = stock, folder
        self.names, self.content = stock.names, stock.content
        self.log = Log()

    def __enter__(self) -> "Case":
        self.folder = Path(tempfile.mkdtemp(dir=self._parent))
        self.images = self.folder / "images"
        shutil.copytree(self._stock.folder, self.images)
        return self

    def __exit__(self, *_exception: object) -> None:
        shutil.rmtree(self.folder)

    @property
    def paths(self) -> list[Path]:
        return [self.images / name for name in self.names]

    @property
    def socket(self) -> Path:
        """Where the images come from when they come over the network."""
        return self.folder / "nbd"

    def litter(self) -> list[str]:
        """What lies beside the images, but for the notes of those that are stashed."""
        return sorted(set(beside(self.images)) - set(self.names))


def play(
    case: Case,
    story: Story,
    doer: Doer,
    fault: Fault | None = None,
    *,
    kill_at_end: bool = False,
    gated: str = "storage",
) -> Played:
    """
    One merge from start to end, and the end of its machine: by a kill, or as a user would end it.

    `gated` is what goes through the gate of an offline qmpmerge: see `behind_gate`.
    """
    played = Played(story, doer)
    with storage(case, story) as before:
        if story.offline and doer == "qmpmerge":
            case.log.arm(fault)
            ended(command(case, str(case.paths[-1]), story, before=[*before[:-1], gated]), played)
            played.count_at_end = case.log.count
        else:
            with started(case, story, before) as vm:
                case.log.arm(fault)
                with guest(case, story, vm, played):
                    if doer == "qmpmerge":
                        if is_held(case, vm.target, story, played):
                            ended(command(case, vm.target, story), played)
                    else:
                        plain(vm, story, played)
                played.count_at_end = case.log.count
                played.killed_at_end = kill_at_end and not (fault and fault.reached)
                end(vm, played)
    played.count = case.log.count
    return played


@contextlib.contextmanager
def storage(case: Case, story: Story) -> Iterator[list[str]]:
    """Whoever sees the operations; yields what is written in front of a command that is to be seen."""
    if story.network:
        with NbdServer(case.images, case.socket, case.log, comes_back=story.reconnects):
            yield []
    else:
        with Gate(case.images, case.log) as gate:
            yield gate.before()


@contextlib.contextmanager
def started(case: Case, story: Story, before: Sequence[str]) -> Iterator[Machine]:
    """The machine that has the disk: a QEMU, or a storage daemon for a plain offline merge."""
    program = "qemu-storage-daemon" if story.offline else "qemu-system-x86_64"
    arguments = nodes(case.paths)
    if story.network:
        arguments = [over_network(part, case, story) for part in arguments]
    if story.offline:
        arguments = [part.replace("-blockdev", "--blockdev") for part in arguments]
    else:
        arguments += device("top")
    with machine(case.folder, *arguments, program=program, before=before) as vm:
        yield vm


def over_network(part: str, case: Case, story: Story) -> str:
    """The same node, its storage an export of the same name."""
    patience = "reconnect-delay=10," if story.reconnects else ""
    server = f"nbd,node-name=\\1,server.type=unix,server.path={case.socket},export=\\2,{patience}"
    return re.sub(r"^file,node-name=(\S+?),filename=.*/(.*?),", server, part)


@contextlib.contextmanager
def guest(case: Case, story: Story, vm: Machine, played: Played) -> Iterator[None]:
    """The guest's writes, where the story has some; it has the bench's own monitor for itself."""
    if not story.writes:
        yield
        return
    writer = Guest(vm.session, BACKEND, case.log)
    with writer:
        yield
    played.acknowledged, played.begun = writer.acknowledged, writer.begun


def command(case: Case, target: str, story: Story, *, before: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """The real command, started."""
    return qmpmerge(case, *commit(case, target, story), before=before)


def is_held(case: Case, target: str, story: Story, played: Played) -> bool:
    """Whether it can be gone on with, where it is to be held first; else what that came to is its verdict."""
    if story.holds:
        ended(qmpmerge(case, *commit(case, target, story), "--hold"), played)
        if played.verdict != "held":
            return False
        played.verdict, played.document = "", {}
    return True


def commit(case: Case, target: str, story: Story) -> list[str]:
    """The words after `qmpmerge` for a merge, or a pull."""
    if story.pulls:
        layers = {"whole": [], "partial": ["--base", "[1]"], "middle": ["--top", str(case.images / "mid.qcow2")]}[
            story.pulls
        ]
        return ["pull", target, *([] if story.offline else [DISK]), *layers]
    mid = "[2]" if story.network else str(case.images / "mid.qcow2")
    return ["commit", target, *([] if story.offline else [DISK]), *([] if story.pivots else ["--top", mid])]


def qmpmerge(case: Case, *words: str, before: Sequence[str] = ()) -> "subprocess.Popen[str]":
    line = [*before, sys.executable, "-m", "qmpmerge", *words, "--json", "-q"]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(case))


def recover(case: Case, *, before: Sequence[str] = ()) -> Played:
    """`qmpmerge recover` on the folder of the images; what it says is no verdict on a merge."""
    told = Played(Story(offline=True), "qmpmerge")
    ended(qmpmerge(case, "recover", str(case.images), before=before), told)
    return told


def environment(case: Case) -> dict[str, str]:
    """Temporary files beside the images and not among them."""
    temporary = case.folder / "tmp"
    temporary.mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(temporary)}


def ended(tool: "subprocess.Popen[str]", played: Played) -> None:
    """Wait for the command's end, and read what it said."""
    try:
        output, played.complaints = tool.communicate(timeout=TOOL_SECONDS)
    except subprocess.TimeoutExpired:
        tool.kill()
        output, played.complaints = tool.communicate()
        played.verdict = f"no end within {TOOL_SECONDS} s"
    played.code = tool.returncode
    with contextlib.suppress(ValueError):
        played.document = json.loads(output)
    if not played.verdict:
        error = played.document.get("error", {}).get("name", "")
        said = played.document.get("verdict", "SIGKILL" if played.code == -signal.SIGKILL else "nothing")
        played.verdict = f"{said}: {error}" if error else said
    played.done = played.code == 0


def plain(vm: Machine, story: Story, played: Played) -> None:
    """The conversation that a script would have: block-commit or block-stream, wait, and believe the job."""
    job = "block-stream" if story.pulls else "block-commit"
    arguments: dict[str, object] = {"device": "top", "base_node": "base", "top_node": "top" if story.pivots else "mid"}
    if story.pulls:
        arguments = {"device": "mid" if story.pulls == "middle" else "top"}
    if story.pulls == "partial":
        arguments["base_node"] = "base"
    if story.pulls == "partial" or not (story.pivots or story.pulls):
        arguments["backing_file"] = next((vm.folder / "images").glob("base.*")).name
    try:
        with connect(vm.target) as connection, contextlib.closing(Session(connection)) as session:
            reply = session.ask(job, job_id="plain", auto_dismiss=False, **arguments)
            error = reply["error"]["desc"] if "error" in reply else concluded(session)
        played.verdict = f"failed: {error}" if error else "completed"
    except (OSError, ValueError):
        played.verdict = "lost"
    played.done = played.verdict == "completed"


def concluded(session: Session) -> str:
    """Wait for the end of the plain job, as it is told: its error, empty where there is none."""
    job = {"status": "running"}
    while job["status"] != "concluded":
        if job["status"] == "ready":
            session.ask("job-complete", id="plain")
        time.sleep(0.002)
        (job,) = session.execute("query-jobs")
    session.execute("job-dismiss", id="plain")
    return job.get("error", "")


def connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TOOL_SECONDS)
    connection.connect(path)
    return connection


def end(vm: Machine, played: Played) -> None:
    """Switch the machine off, or kill it."""
    if "lost" in played.verdict:
        vm.process.wait(TOOL_SECONDS)
    played.alive = vm.process.poll() is None
    if played.killed_at_end:
        vm.kill()
    elif played.alive:
        vm.stop()
