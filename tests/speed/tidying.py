"""`tidy` of many VMs: two disks at a time next to one after the other."""

import contextlib
import shutil
from pathlib import Path

from rig.fleet import DISKS, Fleet

from speed.figures import OURS, Figures, alternating
from speed.peers import ours

ALONE = "--parallel 1"
WAYS = {OURS: "2", ALONE: "1"}


def measure(figures: Figures, folder: Path, runs: int, count: int) -> None:
    """So many VMs of two disks each, whose chains have four images of a few MiB."""
    for who in alternating(runs, WAYS):
        place = folder / "tidy"
        place.mkdir()
        fleet = Fleet(place)
        with contextlib.ExitStack() as running:
            targets = [running.enter_context(fleet.vm(f"vm{number}")).target for number in range(count)]
            took = ours("tidy", *targets, "--keep", "1", "--parallel", WAYS[who]).milliseconds
        figures.add("tidy", f"{count} VMs of {len(DISKS)} disks", who, took)
        shutil.rmtree(place)
