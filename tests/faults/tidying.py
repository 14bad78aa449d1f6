"""
`tidy` of many disks, killed at moments that its own progress names, and run again.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rig import kills
from rig.command import invoke
from rig.fleet import NAMES, Chain, Fleet, Vm, left

from faults import oracle
from faults.oracle import Judgement
from faults.stage import Played, Story
from faults.sweeps import Bench, Point, Sweep

VMS = 20
"""Of two disks each; offline as many chains."""

POINTS = 12
"""Moments from first to last, besides the decisive ones."""

DECISIVE = ("-> job-finalize ", "-> job-complete ")
"""Where a merge is switched: of these the first, the one in the middle and the last."""


@dataclass(frozen=True)
class Scene:
    """All that is to be tidied: VMs, or the chains that none uses."""

    story: Story
    folder: Path
    vms: Sequence[Vm]
    offline: Sequence[Chain]

    @property
    def chains(self) -> list[Chain]:
        return [chain for vm in self.vms for chain in vm.chains.values()] + [*self.offline]

    @property
    def words(self) -> list[str]:
        """After `qmpmerge`."""
        targets = [*(vm.target for vm in self.vms), *(str(chain.images[0].parent) for chain in self.offline)]
        return ["tidy", *targets, "--keep", "0" if self.story.pivots else "1"]


def sweep(bench: Bench, story: Story, _doer: str, *, count: int = VMS) -> Sweep:
    """One after the other: each has all the VMs."""
    with scene(bench, story, count) as now:
        moments = [line for line in killed_at(now, "never", Played(story, "qmpmerge")) if line.startswith(kills.MARKS)]
    decisive = [moment for moment in moments if moment.startswith(DECISIVE)]
    switches = {decisive[place] for place in (0, len(decisive) // 2, -1)}
    spread = {moments[place * (len(moments) - 1) // (POINTS - 1)] for place in range(POINTS)}
    chosen = bench.some([moment for moment in moments if moment in switches | spread], switches)
    points = [point(bench, story, count, moment) for moment in chosen]
    return Sweep(story, "qmpmerge", [one for one in points if one.reached])


@contextlib.contextmanager
def scene(bench: Bench, story: Story, count: int) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(dir=bench.folder) as name, contextlib.ExitStack() as running:
        fleet, numbers = Fleet(Path(name)), range(count)
        vms = [] if story.offline else [running.enter_context(fleet.vm(f"vm{number}")) for number in numbers]
        chains = [fleet.chain(f"images{number}") for number in range(2 * count)] if story.offline else []
        yield Scene(story, fleet.folder, vms, chains)


def point(bench: Bench, story: Story, count: int, moment: str) -> Point:
    played = Played(story, "qmpmerge")
    with scene(bench, story, count) as now:
        reached = kills.KILLED in killed_at(now, moment, played)
        found = again(now) if reached else Judgement()
    return Point(f"killed at {moment}", played, found, reached)


def killed_at(now: Scene, moment: str, played: Played) -> list[str]:
    """The command with the killer in it; what was noted of it."""
    notes = now.folder / "notes"
    line = [sys.executable, kills.__file__, str(notes), "tool", moment, *now.words]
    played.code = subprocess.run(line, env={**os.environ, **kills.PATHS}, capture_output=True, check=False).returncode
    played.verdict = {-signal.SIGKILL: "SIGKILL", 0: "done"}.get(played.code, f"exit code {played.code}")
    return notes.read_text().splitlines()


def again(now: Scene) -> Judgement:
    """After the same command, run to its end: its exit code, chains, data, what is left behind."""
    done = invoke(*now.words, "--json")
    tickets = [ticket for vm in now.vms for ticket in vm.tickets]
    failed = [f"again: exit code {done.code}: {done.out[-1000:]}"] if done.code else []
    return Judgement(wrong=failed + wrong_with(now), left=tickets)


def wrong_with(now: Scene) -> list[str]:
    """What is wrong with what is there, as sentences; it ends the VMs."""
    wrong = [f"left behind: {one}" for one in left(now.vms, now.offline)]
    for vm in now.vms:
        vm.machine.stop()
    expected = [NAMES[0]] if now.story.pivots else [NAMES[0], NAMES[-1]]
    for chain in now.chains:
        if (found := oracle.chain(chain.active)) != expected:
            wrong.append(f"the chain is {found}")
        try:
            chain.check()
        except AssertionError as error:
            wrong.append(str(error))
    return wrong
