"""
The offline door, killed: SIGKILL of qmpmerge, of its storage daemon and of both, at every step of a merge.

The moments are not left to luck: see `kills`. After each kill the view of the top must be what it was, or its name must be
gone, so that a start from there fails; and the very same command, run again, must finish, with the right chain, the right
data, the merged files stashed, and nothing else left behind.

The default run takes every eleventh moment, the three victims in turn, and the moments around the switch for each victim.
All of them, and kills while data is copied, while the header is written, and before each write of the daemon:

    QMPMERGE_ALL_KILLS=1 python -m pytest -s tests/crashes/test_offline_kills.py

which takes about twenty minutes on two cores and prints a table. QMPMERGE_KILLS_LOG=FILE keeps a line for each kill.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rig import contract, kills
from rig.command import scripted
from rig.folder import beside
from rig.machines import Content, fill, make_chain, run
from rig.machines import run as machines_run

ALL = bool(os.environ.get("QMPMERGE_ALL_KILLS"))
LOG = os.environ.get("QMPMERGE_KILLS_LOG")
VICTIMS = ("tool", "daemon", "both")
NAMES = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")
END_SECONDS = 20


@dataclass(frozen=True)
class Story:
    """
    One kind of merge: the options of `qmpmerge commit c.qcow2` (names stand for paths), and the chain it is to leave.

    A pivot takes the name c.qcow2 away, `after` is the chain whose active image replaces it.
    """

    options: tuple[str, ...]
    after: tuple[str, ...]
    pivots: bool = False

    def from_top(self) -> tuple[str, ...]:
        """The chain that the headers tell from c.qcow2 downwards once it is done, base first; nothing where it is gone."""
        return () if self.pivots else self.after

    def stashed(self) -> list[str]:
        """The files beside the images once it is done."""
        return sorted(f"{name}.merged" for name in NAMES if name not in self.after)


STORIES = {
    "intermediate": Story(("--top", "b.qcow2"), ("base.raw", "c.qcow2")),
    "active": Story((), ("base.raw",), pivots=True),
    "middle": Story(("--base", "a.qcow2", "--top", "b.qcow2"), ("base.raw", "a.qcow2", "c.qcow2")),
    "shallow": Story(("--shallow",), ("base.raw", "a.qcow2", "b.qcow2"), pivots=True),
}
SLOWLY = ("--speed", "1M" if ALL else "2M")
"""A merge of two seconds or more."""

FINISHED = {"merged", "pivoted"}
DONE_ALREADY = ("refused: no-such-layer", "refused: stashed")
"""What a second run says where the first one had done all its work: the layer, or the image, that it names is gone."""


@dataclass
class Killed:
    """What one kill came to. `wrong` are sentences; `lock` and `private` are what the dead left behind."""

    story: str
    victim: str
    moment: str
    reached: bool = True
    first: str = ""
    second: str = ""
    switched: bool = False
    lock: bool = False
    lock_stays: bool = False
    private: list[str] = field(default_factory=list)
    leaks: bool = False
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = {key: value for key, value in vars(self).items() if value and key not in ("story", "victim", "moment")}
        return f"{self.story}, {self.victim} at {self.moment}: {told}"


@dataclass(frozen=True)
class Bench:
    """The images that every case gets a copy of, and what their top shows."""

    images: Path
    content: Content
    folder: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    images = tmp_path_factory.mktemp("images")
    content = Content()
    fill(make_chain(images, NAMES), content)
    return Bench(images, content, tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def results() -> Iterator[list[Killed]]:
    """Collects what the tests of this file saw; shown at their end."""
    collected: list[Killed] = []
    yield collected
    print(table(collected))
    if LOG:
        Path(LOG).write_text("".join(f"{result}\n" for result in collected))


# --- one kill ---------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A copy of the images with a folder for temporary files beside it, in which the command is run."""

    bench: Bench
    story: Story
    extra: tuple[str, ...] = ()
    path: str | None = None

    def __enter__(self) -> "Case":
        self.place = Path(tempfile.mkdtemp(dir=self.bench.folder))  # a short name: a socket's has room for 107 bytes
        self.images = self.place / "images"
        self.temporary = self.place / "tmp"
        self.temporary.mkdir()
        shutil.copytree(self.bench.images, self.images)
        return self

    def __exit__(self, *_exception: object) -> None:
        shutil.rmtree(self.place)

    def run(self, victim: str = "nobody", moment: str = "never") -> "Run":
        """Run the command with the killer in it, and wait until its daemon is gone too."""
        notes = self.place / "notes"
        notes.unlink(missing_ok=True)
        options = [str(self.images / part) if part in NAMES else part for part in self.story.options]
        line = [notes, victim, moment, "commit", self.images / NAMES[-1], *options, *self.extra]
        environment = {"TMPDIR": str(self.temporary)}
        if self.path is not None and victim != "nobody":
            environment["PATH"] = f"{self.path}:{os.environ['PATH']}"
        done = scripted(kills.__file__, *line, env=environment, seconds=60)
        noted = notes.read_text().splitlines() if notes.exists() else []
        pids = [int(pid) for line in noted if line.startswith(kills.DAEMON) for pid in line.split()[1:]]
        moments = [line for line in noted if line[:2] in kills.MARKS]
        return Run(done.code, done.out, done.err, moments, kills.KILLED in noted, all(map(gone, pids)))

    def chain(self) -> tuple[str, ...]:
        """The chain from c.qcow2 downwards, as the headers tell it; nothing where that name is gone."""
        if not (self.images / NAMES[-1]).exists():
            return ()
        told = machines_run("qemu-img", "info", "--backing-chain", "--output=json", self.images / NAMES[-1])
        return tuple(os.path.basename(entry["filename"]) for entry in reversed(json.loads(told)))

    def litter(self) -> list[str]:
        return sorted(set(beside(self.images)) - set(NAMES))

    def left_in_tmp(self) -> list[str]:
        """Files and folders in the folder for temporary files; what is in a private folder of ours is told by name."""
        return sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*"))


@dataclass(frozen=True)
class Run:
    """A run of the command, as one sees it from outside. `moments` are in the order in which they came."""

    code: int
    out: str
    err: str
    moments: list[str]
    killed: bool
    daemon_gone: bool

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON object; empty where there is none."""
        with contextlib.suppress(ValueError):
            document = json.loads(self.out)
            if isinstance(document, dict):
                return document
        return {}

    @property
    def verdict(self) -> str:
        """The verdict, with the error's name; SIGKILL where it died of it."""
        if self.code == -9:
            return "SIGKILL"
        verdict = self.document.get("verdict", f"exit code {self.code} without a verdict")
        return f"{verdict}: {self.document['error']['name']}" if "error" in self.document else str(verdict)

    @property
    def succeeded(self) -> bool:
        """Whether it claims that the merge is done."""
        return self.document.get("verdict") in FINISHED

    def faults(self) -> list[str]:
        """What no run may do."""
        found = []
        if "Traceback" in self.err or self.code == 1:
            found.append(f"traceback: {self.err[-2000:]} {self.document}")
        if self.code != -9 and not self.document:
            found.append(f"no JSON: exit code {self.code}, {self.out!r}, {self.err[-500:]!r}")
        found += contract.problems(self.document) if self.document else []
        if not self.daemon_gone:
            found.append("a storage daemon is left running")
        return found


def gone(pid: int) -> bool:
    """Wait for the end of a process that is not our child; a zombie has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], END_SECONDS)[0])
    finally:
        os.close(descriptor)


def strike(bench: Bench, name: str, victim: str, moment: str, **given: Any) -> Killed:
    """Kill one merge at one moment, look, run the same command again, look again."""
    story, result = STORIES[name], Killed(name, victim, moment)
    with Case(bench, story, **given) as case:
        first = case.run(victim, moment)
        result.first = first.verdict
        result.reached = first.killed or (case.path is not None and not first.succeeded)
        result.wrong += [f"first run: {fault}" for fault in first.faults()]
        look_after_kill(case, first, result)
        second = case.run()
        result.second = second.verdict
        result.wrong += [f"second run: {fault}" for fault in second.faults()]
        look_at_end(case, second, result)
    return result


def look_after_kill(case: Case, first: Run, result: Killed) -> None:
    chain = case.chain()
    result.switched = chain == case.story.from_top()
    if chain != NAMES and not result.switched:
        result.wrong.append(f"after the kill: the chain is {chain}")
    look_at_views(case, chain, result, "after the kill")
    if first.succeeded and case.story.pivots:
        look_at_view(case, case.story.after[-1], result, "after a first run that claims success")
    elif first.succeeded and not result.switched:
        result.wrong.append("the first run claims success, the chain is the old one")
    litter = case.litter()
    result.lock = any(name.endswith("-lock") for name in litter)
    result.private = case.left_in_tmp()
    if first.code != -9:
        # Where the outcome is not proved, the record stays, and the lock with its note for who comes next.
        known = (".merged", *(("-record", "-lock") if first.verdict.startswith("unknown") else ()))
        result.wrong += [f"after the kill: litter {name}" for name in litter if not name.endswith(known)]
        result.wrong += [f"after the kill: {name} in /tmp" for name in result.private]


def look_at_end(case: Case, second: Run, result: Killed) -> None:
    if second.succeeded:
        after = tuple(os.path.basename(file) for file in second.document["after"])
        if after != case.story.after:
            result.wrong.append(f"second run: it tells {after}")
    elif not (result.switched and second.verdict in DONE_ALREADY):
        result.wrong.append(f"second run: {second.verdict}: {second.document}")
    chain = case.chain()
    if chain != case.story.from_top():
        result.wrong.append(f"second run: the chain is {chain}")
    look_at_views(case, chain, result, "second run")
    if case.story.pivots:
        look_at_view(case, case.story.after[-1], result, "second run")
    litter = [name for name in case.litter() if not (result.lock and name.endswith("-lock"))]
    result.lock_stays = litter != case.litter()
    if litter != case.story.stashed():
        result.wrong.append(f"second run: litter {litter}")
    if case.left_in_tmp() != result.private:
        result.wrong.append(f"second run: {case.left_in_tmp()} in /tmp")


def look_at_views(case: Case, chain: tuple[str, ...], result: Killed, when: str) -> None:
    """The top shows what it showed, and the images of its chain are sound."""
    for image in chain:
        if not image.endswith(".qcow2"):
            continue
        checked = subprocess.run(["qemu-img", "check", "-q", case.images / image], capture_output=True, text=True)
        result.leaks = result.leaks or checked.returncode == 3
        if checked.returncode not in (0, 3):
            result.wrong.append(f"{when}: qemu-img check of {image}: {checked.stdout}{checked.stderr}")
    if chain:
        look_at_view(case, NAMES[-1], result, when)


def look_at_view(case: Case, name: str, result: Killed, when: str) -> None:
    view = case.place / "view.raw"
    form = name.rpartition(".")[2]
    run("qemu-img", "convert", "-f", form, "-O", "raw", case.images / name, view)
    if view.read_bytes() != case.bench.content.data:
        result.wrong.append(f"{when}: {name} shows other data")


# --- many kills -------------------------------------------------------------------------------------------------------


def sweep(bench: Bench, cases: list[tuple[str, str, str]], **given: Any) -> list[Killed]:
    """All the kills, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda case: strike(bench, *case, **given), cases))


def moments_of(bench: Bench, name: str, extra: tuple[str, ...] = ()) -> list[str]:
    """The moments of a merge that nobody disturbs."""
    with Case(bench, STORIES[name], extra) as case:
        done = case.run()
        assert done.succeeded, done
        assert not done.faults()
        assert (case.litter(), case.left_in_tmp()) == (case.story.stashed(), [])
        return done.moments


def switch_of(name: str) -> str:
    """The command with which a merge takes effect."""
    return "job-complete" if STORIES[name].pivots else "job-finalize"


def right(found: list[Killed], results: list[Killed]) -> None:
    results += found
    assert any(result.reached for result in found)
    wrong = [str(result) for result in found if result.wrong]
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STORIES if ALL else ["intermediate", "active"])
def test_a_kill_at_any_command_or_reply(name: str, bench: Bench, results: list[Killed]) -> None:
    moments = [moment for moment in moments_of(bench, name) if not moment.startswith("progress")]
    assert len(moments) > 50
    decisive = [f"{arrow} {switch_of(name)} #1" for arrow in ("->", "<-")]
    assert set(decisive) < set(moments)
    if ALL:
        cases = [(name, victim, moment) for moment in moments for victim in VICTIMS]
    else:
        chosen = moments[::11]
        cases = [(name, VICTIMS[number % 3], moment) for number, moment in enumerate(chosen)]
        cases += [(name, victim, moment) for moment in decisive for victim in VICTIMS]
    right(sweep(bench, cases), results)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STORIES if ALL else ["intermediate", "active"])
def test_a_kill_while_data_is_copied(name: str, bench: Bench, results: list[Killed]) -> None:
    reports = ["progress #1"]
    if ALL:
        reports = [moment for moment in moments_of(bench, name, SLOWLY) if moment.startswith("progress")]
        assert reports
    cases = [(name, victim, moment) for moment in reports for victim in VICTIMS]
    right(sweep(bench, cases, extra=SLOWLY), results)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not ALL, reason="QMPMERGE_ALL_KILLS is not set")
@pytest.mark.parametrize("name", STORIES)
def test_a_kill_within_the_switch(name: str, bench: Bench, results: list[Killed]) -> None:
    """At a tenth of a millisecond's steps after the command was sent: some come before the header is written, some after."""
    moments = [f"-> {switch_of(name)} #1 +{tenths / 10}" for tenths in range(1, 31)]
    right(sweep(bench, [(name, victim, moment) for moment in moments for victim in VICTIMS]), results)


WRITES = "io_uring_enter,pwrite64,pwritev,pwritev2,fallocate,ftruncate,fdatasync,fsync"


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not ALL or shutil.which("strace") is None, reason="QMPMERGE_ALL_KILLS is not set, or no strace here"
)
@pytest.mark.parametrize("name", STORIES)
def test_a_kill_before_each_write(name: str, bench: Bench, results: list[Killed], tmp_path: Path) -> None:
    """strace kills the daemon as a thread enters the system call of its first, second ... write or flush."""
    found: list[Killed] = []
    numbers = itertools.count(1)

    def killed(number: int) -> Killed:
        return strike(bench, name, "write", f"write #{number}", path=str(killing_write(tmp_path, number)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while all(result.reached for result in found):
            found += pool.map(killed, itertools.islice(numbers, 8))
    right(found, results)


def killing_write(folder: Path, number: int) -> Path:
    """A folder for PATH with a storage daemon that dies at its write `number`, under the pid that it was given."""
    place = folder / str(number)
    place.mkdir()
    wrapper = place / "qemu-storage-daemon"
    inject = f"inject={WRITES}:signal=KILL:when={number}"
    daemon = shutil.which("qemu-storage-daemon")
    wrapper.write_text(f'#!/bin/sh\nexec strace -D -f -qq -o /dev/null -e trace={WRITES} -e {inject} {daemon} "$@"\n')
    wrapper.chmod(0o755)
    return place


# --- what came of it --------------------------------------------------------------------------------------------------

COLUMNS = ("merge", "killed", "moments", "view same", "finished", "done already", "wrong")
LEFT = ("lock left", "lock stays", "in /tmp", "leaks")


def table(results: list[Killed]) -> str:
    """A row for each kind of merge and victim, and what the runs said."""
    reached = [result for result in results if result.reached]
    groups = dict.fromkeys((result.story, result.victim) for result in reached)
    rows = [row([one for one in reached if (one.story, one.victim) == group]) for group in groups]
    total = ("all", "", *(str(sum(int(line[place]) for line in rows)) for place in range(2, len(COLUMNS + LEFT))))
    lines = ["", *(" ".join(f"{cell:>12}" for cell in line) for line in (COLUMNS + LEFT, *rows, total))]
    for which in ("first", "second"):
        said = Counter((one.story, one.victim, getattr(one, which)) for one in reached)
        lines += [
            f"{which} run, {story}, {victim}: {count} x {words}" for (story, victim, words), count in said.items()
        ]
    return "\n".join(lines)


def row(group: list[Killed]) -> tuple[str, ...]:
    """The cells of one group."""
    counts = (
        len(group),
        sum(not any("shows other data" in fault for fault in one.wrong) for one in group),
        sum(one.second in FINISHED for one in group),
        sum(one.second in DONE_ALREADY for one in group),
        sum(bool(one.wrong) for one in group),
        sum(one.lock for one in group),
        sum(one.lock_stays for one in group),
        sum(bool(one.private) for one in group),
        sum(one.leaks for one in group),
    )
    return (group[0].story, group[0].victim, *map(str, counts))
