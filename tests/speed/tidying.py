"""`tidy` of many VMs: two disks at a time next to one after the other."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from rig.machines import Content, fill, machine, make_chain

from speed.figures import OURS, Figures, alternating
from speed.peers import ours

ALONE = "--parallel 1"
WAYS = {OURS: "2", ALONE: "1"}
DISKS = ("vda", "vdb")


def measure(figures: Figures, folder: Path, runs: int, count: int) -> None:
    """So many VMs of two disks each, whose chains have four images of a few MiB."""
    for who in alternating(runs, WAYS):
        place = folder / "tidy"
        with contextlib.ExitStack() as running:
            targets = [running.enter_context(_vm(place / str(number))) for number in range(count)]
            took = ours("tidy", *targets, "--keep", "1", "--parallel", WAYS[who]).milliseconds
        figures.add("tidy", f"{count} VMs of {len(DISKS)} disks", who, took)
        shutil.rmtree(place)


@contextlib.contextmanager
def _vm(folder: Path) -> Iterator[str]:
    drives: list[str] = []
    for disk in DISKS:
        place = folder / disk
        place.mkdir(parents=True)
        images = make_chain(place)
        fill(images, Content())
        drives += ["-drive", f"file={images[-1]},if=none,id={disk}", "-device", f"virtio-blk-pci,drive={disk}"]
    with machine(folder, *drives) as started:
        yield started.target
