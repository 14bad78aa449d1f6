"""
Commands that look and change nothing, on ever longer chains and ever more VMs; and what it costs to start at all.
"""

import contextlib
import sys
from pathlib import Path

from rig import machine
from setups import device

from speed.figures import OURS, QEMU_IMG, Figures
from speed.images import empty_chain
from speed.peers import ours, timed

SECTION = "looking"


def start(figures: Figures, runs: int) -> None:
    """Python alone, and the shortest command."""
    for _ in range(runs):
        figures.add("start", "python -c pass", "python", timed(sys.executable, "-c", "pass").milliseconds)
        for words in (["--version"], ["commit", "--help"]):
            ran = ours(*words)
            figures.add("start", " ".join(words), OURS, ran.milliseconds)
            figures.add("start", f"{' '.join(words)}: memory", OURS, ran.memory, "MiB")


def chains(figures: Figures, folder: Path, runs: int, lengths: list[int]) -> None:
    """`disks` and `chain` on chains of so many images; qemu-img reads the same headers."""
    for layers in lengths:
        images = empty_chain(folder / f"listing-{layers}", layers)
        drive = f"file={images[-1]},format=qcow2,if=none,id=vda"
        with machine(images[0].parent, "-drive", drive, *device("vda")) as vm:
            for _ in range(runs):
                for word in ("disks", "chain"):
                    ran = ours(word, vm.target)
                    figures.add(SECTION, f"{word}, {layers} layers", OURS, ran.milliseconds)
                    figures.add(SECTION, f"{word}, {layers} layers: memory", OURS, ran.memory, "MiB")
                words = ("qemu-img", "info", "-U", "--backing-chain", "--output=json", images[-1])
                figures.add(SECTION, f"chain, {layers} layers", QEMU_IMG, timed(*words).milliseconds)
            for word in ("disks", "chain"):
                _traffic(figures, f"{word}, {layers} layers", vm.target, word)


def _traffic(figures: Figures, name: str, target: str, word: str) -> None:
    """What goes over the monitor, as `-v` shows it."""
    traced = ours(word, target, "-v").stderr.splitlines()
    traffic = [line for line in traced if line.startswith(("->", "<-"))]
    figures.add(SECTION, f"{name}: QMP", OURS, sum(map(len, traffic)) / 1024, "KiB")
    figures.add(SECTION, f"{name}: QMP", "round trips", len([line for line in traffic if line.startswith("->")]))


def vms(figures: Figures, folder: Path, runs: int, counts: list[int]) -> None:
    """`vms` on a host where so many more QEMUs run."""
    with contextlib.ExitStack() as running:
        started = 0
        for count in counts:
            while started < count:
                place = folder / f"vm{started}"
                place.mkdir()
                running.enter_context(machine(place, "-name", f"bench-{started}", "-m", "16"))
                started += 1
            for _ in range(runs):
                ran = ours("vms")
                figures.add(SECTION, f"vms, {count} QEMUs", OURS, ran.milliseconds)
                figures.add(SECTION, f"vms, {count} QEMUs: memory", OURS, ran.memory, "MiB")
