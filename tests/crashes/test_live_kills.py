"""
A live pivot, killed: SIGKILL of qmpmerge, of QEMU and of both, at every step of an active merge, while a guest writes.

The guest is `writers`: it stands still when it is paused, and says what it has written. After each kill a start from the
path that the VM was launched with must show every write that was said to be done, or fail loudly; `recover` must say which
image is right, and that one must show them too; a second `recover` has nothing to do. Where only the tool died the guest
must go on writing by itself.

The default run takes some moments around the pivot. All of them, for every victim:

    QMPMERGE_ALL_KILLS=1 python -m pytest -s tests/crashes/test_live_kills.py

which prints a table. QMPMERGE_KILLS_LOG=FILE keeps a line for each kill.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rig import kills, writers
from rig.command import scripted
from rig.folder import litter
from rig.machines import Content, Machine, fill, make_chain, run
from rig.machines import machine as machines_machine

ALL = bool(os.environ.get("QMPMERGE_ALL_KILLS"))
LOG = os.environ.get("QMPMERGE_KILLS_LOG")
NAMES = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")
VICTIMS = ("tool", "qemu", "both")
SECONDS = 60.0
SAMPLE = [
    ("tool", "-> stop #1 +0.3"),
    ("tool", "<= rename #1"),
    ("qemu", "<= rename #1"),
    ("both", "-> job-complete #1"),
    ("tool", "<- job-complete #1"),
    ("both", "<- job-complete #1 +1"),
    ("both", "-> cont #1 +2"),
    ("tool", "<= rename #2"),
]
"""The moments of the default run: who dies at each."""


@dataclass
class Killed:
    """What one kill came to; `wrong` are sentences."""

    victim: str
    moment: str
    reached: bool = True
    launch: str = ""
    verdict: str = ""
    right: str = ""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.victim} at {self.moment}: {self.launch}, {self.verdict}, right is {self.right} {self.wrong}"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Images that every case gets a copy of, and what they show."""
    folder, content = tmp_path_factory.mktemp("images"), Content()
    fill(make_chain(folder, NAMES), content)
    return folder, bytes(content.data)


@pytest.fixture(scope="module")
def results() -> Iterator[list[Killed]]:
    """Collects what the tests of this file saw; shown at their end."""
    collected: list[Killed] = []
    yield collected
    print(table(collected))
    if LOG:
        Path(LOG).write_text("".join(f"{result}\n" for result in collected))


class Case:
    """A VM that boots the writer on a copy of the images."""

    def __init__(self, before: tuple[Path, bytes], folder: Path) -> None:
        self.content = before[1]
        self.place = Path(tempfile.mkdtemp(dir=folder))
        self.images = self.place / "vm"
        shutil.copytree(before[0], self.images)
        self.launch = self.images / NAMES[-1]

    def machine(self) -> Any:
        return machines_machine(self.place, *writers.arguments(self.place, [f"file={self.launch},format=qcow2"]))

    def command(self, *arguments: str, victim: str = "nobody", moment: str = "never", pid: int = 0) -> "Run":
        notes = self.place / "notes"
        line = [notes, victim, moment, *arguments]
        done = scripted(kills.__file__, *line, env={"QMPMERGE_VICTIM": str(pid)}, seconds=int(SECONDS))
        noted = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        document = json.loads(done.out) if done.out else {}
        return Run(done.code, document, done.err, [line for line in noted if line[:2] in kills.MARKS])

    def goes_on(self, more: int = 20) -> bool:
        """Whether the guest writes on by itself."""
        wanted, deadline = writers.said(self.place) + more, time.monotonic() + SECONDS
        while writers.said(self.place) < wanted:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def wrong(self, image: Path) -> str:
        """What is wrong with what the image shows; nobody may have it open."""
        view = self.place / "view"
        run("qemu-img", "convert", "-f", image.name.split(".")[1], "-O", "raw", image, view)
        return writers.wrong(view.read_bytes(), self.content, writers.said(self.place))


@dataclass(frozen=True)
class Run:
    code: int
    document: dict[str, Any]
    err: str
    moments: list[str]

    @property
    def verdict(self) -> str:
        if self.code == -9:
            return "SIGKILL"
        error = self.document.get("error")
        return str(self.document.get("verdict")) if error is None else f"{self.document['verdict']}: {error['name']}"


def strike(before: tuple[Path, bytes], folder: Path, victim: str, moment: str) -> Killed:
    """Kill once, look, recover, look again."""
    case, result = Case(before, folder), Killed(victim, moment)
    with case.machine() as vm:
        vm.session.execute("cont")
        assert case.goes_on(), "the writer does not write"
        name = "daemon" if victim == "qemu" else victim
        done = case.command("commit", vm.target, "vda", victim=name, moment=moment, pid=vm.process.pid)
        # Where both are struck, we may have seen that QEMU is gone before we were.
        result.reached = done.code == -9 or (victim != "tool" and vm.process.poll() is not None)
        if "Traceback" in done.err:
            result.wrong.append(done.err[-1500:])
        if victim == "tool" or not result.reached:
            recover_with_guest(case, vm, result)
        vm.kill()
    look_at_launch_path(case, result)
    recover(case, result)
    if not result.wrong:
        shutil.rmtree(case.place)
    return result


def recover_with_guest(case: Case, vm: Machine, result: Killed) -> None:
    """The guest goes on, and every second time it lives on while we recover."""
    if not case.goes_on():
        result.wrong.append("the guest stands still")
    if len(result.moment) % 2:
        told = case.command("recover", str(case.launch))
        if told.code not in (0, 7):
            result.wrong.append(f"recover with the guest: {told.verdict} {told.document} {told.err[-800:]}")
        if told.code == 7:
            job = vm.session.execute("query-jobs")[0]["id"]
            told = case.command("job", vm.target, job, "follow")
            if told.verdict != "pivoted":
                result.wrong.append(f"follow: {told.verdict} {told.document}")
        if not case.goes_on():
            result.wrong.append("the guest stands still after recover")


def look_at_launch_path(case: Case, result: Killed) -> None:
    if not case.launch.exists():
        result.launch = "fails loudly"
        return
    faults = case.wrong(case.launch)
    result.launch = "STALE" if faults else "right"
    if faults:
        result.wrong.append(f"a start from the launch path shows other data: {faults}")


def recover(case: Case, result: Killed) -> None:
    told = case.command("recover", str(case.launch))
    result.verdict = told.verdict
    if told.verdict == "unknown: undecided":
        use = "top" if not case.wrong(placed(case.images / NAMES[-1])) else "base"
        told = case.command("recover", str(case.launch), "--use", use)
    if told.code != 0:
        result.wrong.append(f"recover: {told.document} {told.err[-800:]}")
        return
    again = case.command("recover", str(case.launch))
    if again.verdict != "unchanged":
        result.wrong.append(f"a second recover: {again.document}")
    right = Path(
        told.document["merges"][-1]["start_from"] or (case.launch if case.launch.exists() else case.images / NAMES[0])
    )
    result.right = right.name
    faults = case.wrong(right)
    if faults:
        result.wrong.append(f"{right.name} is not right: {faults}")
    if case.launch.exists() and right != case.launch:
        result.wrong.append("the launch path is still there")
    left = [name for name in litter(case.images) if "lock" not in name]
    if left:
        result.wrong.append(f"litter: {left}")


def placed(image: Path) -> Path:
    stashed = image.with_name(f"{image.name}.merged")
    return stashed if stashed.exists() else image


def sweep(before: tuple[Path, bytes], folder: Path, cases: list[tuple[str, str]], results: list[Killed]) -> None:
    def struck(case: tuple[str, str]) -> Killed:
        try:
            return strike(before, folder, *case)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            return Killed(*case, wrong=[str(error)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(struck, cases))
    results += found
    assert not [str(result) for result in found if result.wrong]
    assert sum(result.reached for result in found) >= len(found) * 0.6, [str(one) for one in found if not one.reached]


@pytest.mark.timeout(600)
def test_a_kill_around_the_pivot(before: tuple[Path, bytes], tmp_path: Path, results: list[Killed]) -> None:
    sweep(before, tmp_path, SAMPLE, results)


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not ALL, reason="QMPMERGE_ALL_KILLS is not set")
def test_a_kill_at_every_moment(before: tuple[Path, bytes], tmp_path: Path, results: list[Killed]) -> None:
    case = Case(before, tmp_path)
    with case.machine() as vm:
        vm.session.execute("cont")
        assert case.goes_on()
        done = case.command("commit", vm.target, "vda")
        assert done.verdict == "pivoted"
    moments = done.moments[done.moments.index("-> block-commit #1") :]
    late = [
        f"{moment} +{delay}" for moment in ("-> job-complete #1", "-> cont #1", "-> stop #1") for delay in (0.2, 1, 3)
    ]
    sweep(before, tmp_path, [(victim, moment) for moment in [*moments, *late] for victim in VICTIMS], results)


def table(results: list[Killed]) -> str:
    reached = [result for result in results if result.reached]
    lines = ["", f"{len(reached)} kills of a live pivot ({len(results) - len(reached)} moments did not come)"]
    for victim in VICTIMS:
        group = [result for result in reached if result.victim == victim]
        launch, verdict, right = (
            Counter(getattr(one, name) for one in group) for name in ("launch", "verdict", "right")
        )
        lines.append(
            f"{victim}: {len(group)}, launch path {dict(launch)}, recover {dict(verdict)}, right {dict(right)}"
        )
    return "\n".join(lines)
