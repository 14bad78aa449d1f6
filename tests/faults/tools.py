"""
qmpmerge killed, alone or together with the machine: before and after each QMP command, and after each thing that it does
to a file. Then somebody comes and asks what is there, and has it finished.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from rig import kills
from rig.disks import BACKEND, device, nodes
from rig.machines import Machine, machine

from faults import oracle
from faults.gate import Gate
from faults.log import Fault, Log
from faults.oracle import Judgement
from faults.stage import Case, Guest, Played, Story, commit, ended, environment, is_held, qmpmerge
from faults.sweeps import WORKERS, Bench, Point, Sweep, again, each

Victim = Literal["tool", "both"]
FINISHED = ("merged", "pulled", "pivoted", "unchanged", *oracle.DONE_ALREADY)
"""What a mended merge may end in; the last two where it had got past the switch."""

TRIES = 4
AFTERWARDS = (5 * 1024 * 1024, 0xEE)
"""A write of the guest's after qmpmerge is dead: offset and pattern."""


@dataclass(frozen=True)
class Scene:
    """A merge that is about to be disturbed: the images, the machine that has them, what is seen of it."""

    case: Case
    vm: Machine
    story: Story
    played: Played


@contextlib.contextmanager
def scene(bench: Bench, story: Story) -> Iterator[Scene]:
    with bench.case() as case, machine(case.folder, *nodes(case.paths), *device("top")) as vm:
        yield Scene(case, vm, story, Played(story, "qmpmerge"))


# --- at QMP commands --------------------------------------------------------------------------------------------------


def at_commands(bench: Bench, story: Story, _doer: str, *, victim: Victim) -> Sweep:
    """At each moment of the conversation: see `kills`."""
    moments = moments_of(bench, story)
    chosen = bench.some(moments, [moment for moment in moments if re.search("job-(finalize|complete) ", moment)])

    def killed(moment: str) -> Point:
        with scene(bench, story) as now:
            noted = converse(now, victim, moment)
            return look(now, victim, f"{victim} at {moment}", kills.KILLED in noted)

    with ThreadPoolExecutor(WORKERS) as pool:
        points = [point for point in pool.map(killed, chosen) if point.reached]
    return Sweep(story, "qmpmerge", points)


def moments_of(bench: Bench, story: Story) -> list[str]:
    """The moments of a merge that nobody disturbs."""
    with scene(bench, story) as now:
        return [line for line in converse(now, "tool", "never") if line[:2] in ("->", "<-")]


def converse(now: Scene, victim: Victim, moment: str) -> list[str]:
    """The command with the killer in it, after a hold where there is one; what was noted of it."""
    assert is_held(now.case, now.vm.target, now.story, now.played)
    notes = now.case.folder / "notes"
    words = commit(now.case, now.vm.target, now.story)
    process = subprocess.Popen(
        [sys.executable, kills.__file__, str(notes), victim, moment, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(now.case), **kills.PATHS, kills.ALSO: str(now.vm.process.pid)},
    )
    ended(process, now.played)
    return notes.read_text().splitlines()


# --- at file operations -----------------------------------------------------------------------------------------------


def at_files(bench: Bench, story: Story, _doer: str, *, victim: Victim) -> Sweep:
    """After each thing that qmpmerge does to a file, its temporary ones included."""

    def killed(number: int) -> Point:
        with scene(bench, story) as now:
            log = Log(Fault(number, victims="all" if victim == "both" else "actor"), known={now.vm.process.pid})
            with Gate(now.case.folder, log) as gate:
                words = commit(now.case, now.vm.target, story)
                ended(qmpmerge(now.case, *words, before=gate.before("names")), now.played)
            assert log.fault is not None
            reached = log.fault.reached
            return look(now, victim, f"{victim} at {reached}", reached is not None)

    return Sweep(story, "qmpmerge", list(each(killed, None)))


# --- afterwards -------------------------------------------------------------------------------------------------------


def look(now: Scene, victim: Victim, name: str, reached: bool) -> Point:
    """What is there after the kill, and after somebody has come to mend it."""
    found = Judgement()
    if not reached:
        return Point(name, now.played, found, reached)
    if victim == "tool":
        found.wrong += mend(now, found)
        now.vm.stop()
    else:
        now.vm.process.wait(20)
    judged = oracle.judge(now.case, now.played)
    judged.wrong += found.wrong
    judged.left = found.left
    if victim == "both" and judged.is_right:
        judged.wrong += again(now.case, now.played)
    return Point(name, now.played, judged)


def mend(now: Scene, found: Judgement) -> list[str]:
    """The guest lives and writes; the job is found and followed, or the merge asked for again. Returns what was wrong."""
    if now.vm.process.poll() is not None:
        return ["the machine died with qmpmerge"]
    offset, pattern = AFTERWARDS
    now.vm.io(BACKEND, f"write -q -P {pattern} {offset} {Guest.SLOT}")
    now.vm.io(BACKEND, "flush")
    now.played.acknowledged.append((offset, pattern, 0))
    verdicts: list[str] = []
    while not verdicts or (verdicts[-1] not in FINISHED and len(verdicts) < TRIES):
        verdicts.append(mended(now))
    nodes = now.vm.session.execute("query-named-block-nodes", flat=True)
    found.left = [node["node-name"] for node in nodes if "qmpmerge" in node["node-name"]]
    jobs = now.vm.session.execute("query-jobs")
    wrong = [f"left behind: {jobs}"] if jobs else []
    return wrong if verdicts[-1] in FINISHED else [*wrong, f"it cannot be mended: {verdicts}"]


def mended(now: Scene) -> str:
    """One try: the verdict of following the job that is there, or of the same merge again."""
    listing = qmpmerge(now.case, "jobs", now.vm.target)
    jobs: list[dict[str, Any]] = json.loads(listing.communicate(timeout=60)[0])["jobs"]
    words = ["job", now.vm.target, jobs[0]["id"], "follow"] if jobs else commit(now.case, now.vm.target, now.story)
    played = Played(now.story, "qmpmerge")
    ended(qmpmerge(now.case, *words), played)
    now.played.done = now.played.done or played.verdict in FINISHED
    return played.verdict
