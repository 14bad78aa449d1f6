"""
Commands that look and change nothing, on ever longer chains and ever more VMs; and what it costs to start at all.
"""

import asyncio
import contextlib
import sys
import time
from pathlib import Path

from rig.disks import device
from rig.machines import Session, machine

import qmpmerge
from qmpmerge.chain import plan
from qmpmerge.checks.check import check
from qmpmerge.qemu.discovery import DEEP
from speed.figures import BARE, OURS, QEMU_IMG, Figures, alternating
from speed.images import empty_chain
from speed.peers import COMMAND, memory, ours, timed

SECTION = "looking"


def start(figures: Figures, runs: int) -> None:
    """Python alone, and the shortest command."""
    for _ in range(runs):
        figures.add("start", "python -c pass", "python", timed(sys.executable, "-c", "pass").milliseconds)
        for words in (["--version"], ["commit", "--help"]):
            figures.add("start", " ".join(words), OURS, ours(*words).milliseconds)
    figures.add("start", "--version: memory", OURS, memory("--version"), "MiB")


def chains(figures: Figures, folder: Path, runs: int, lengths: list[int]) -> None:
    """
    `disks` and `chain` on chains of so many images.

    Bare QMP asks the same questions, so that is what QEMU itself takes for them; qemu-img reads the same headers.
    """
    for layers in lengths:
        images = empty_chain(folder / f"listing-{layers}", layers)
        drive = f"file={images[-1]},format=qcow2,if=none,id=vda"
        with machine(images[0].parent, "-drive", drive, *device("vda")) as vm:
            for _ in range(runs):
                for word in ("disks", "chain"):
                    figures.add(SECTION, f"{word}, {layers} layers", OURS, ours(word, vm.target).milliseconds)
                figures.add(SECTION, f"disks, {layers} layers", BARE, _questions(vm.session, layers))
                told = timed(*BACKING_CHAIN, images[-1])
                figures.add(SECTION, f"chain, {layers} layers", QEMU_IMG, told.milliseconds)
            for word in ("disks", "chain"):
                figures.add(SECTION, f"{word}, {layers} layers: memory", OURS, memory(word, vm.target), "MiB")
                _traffic(figures, f"{word}, {layers} layers", vm.target, word)


def images(figures: Figures, folder: Path, runs: int, lengths: list[int]) -> None:
    """The same of chains that no VM uses, and the processors' time that it takes."""
    for layers in lengths:
        active = empty_chain(folder / f"images-{layers}", layers)[-1]
        commands = {OURS: (COMMAND, "chain", active), QEMU_IMG: (*BACKING_CHAIN, active)}
        for who in alternating(runs, commands):
            ran = timed(*commands[who])
            figures.add(SECTION, f"chain IMAGE, {layers} layers", who, ran.milliseconds)
            figures.add(SECTION, f"chain IMAGE, {layers} layers: CPU", who, ran.cpu)
            if who == OURS:
                figures.add(SECTION, f"disks IMAGE, {layers} layers: CPU", who, ours("disks", active).cpu)


BACKING_CHAIN = ("qemu-img", "info", "-U", "--backing-chain", "--output=json")


def _questions(session: Session, layers: int) -> float:
    """The questions that `disks` asks, in a session that is there already."""
    begun = time.perf_counter()
    for command in ("query-jobs", "x-debug-query-block-graph", *(["query-block"] if layers <= DEEP else [])):
        session.execute(command)
    session.execute("query-named-block-nodes", flat=True)
    return (time.perf_counter() - begun) * 1000


def _traffic(figures: Figures, name: str, target: str, word: str) -> None:
    """What goes over the monitor, as `-v` shows it."""
    traced = [line.partition(" ")[2] for line in ours(word, target, "-v").stderr.splitlines()]
    traffic = [line for line in traced if line.startswith(("->", "<-")) and "qmp_capabilities" not in line]
    figures.add(SECTION, f"{name}: QMP", OURS, sum(map(len, traffic)) / 1024, "KiB")
    trips = [line for line in traffic if line.startswith("->")]
    figures.add(SECTION, f"{name}: QMP commands", OURS, len(trips), "")


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
                figures.add(SECTION, f"vms, {count} QEMUs", OURS, ours("vms").milliseconds)
            figures.add(SECTION, f"vms, {count} QEMUs: memory", OURS, memory("vms"), "MiB")


def checks_of_a_merge(figures: Figures, folder: Path, runs: int, crowd: int) -> None:
    """All checks of a merge, on a chain of ten images in a folder of `crowd`: in a session, and as a whole command."""
    images = empty_chain(folder / f"checks-{crowd}", 10)
    template = images[0].read_bytes()
    for number in range(len(images), crowd):
        (images[0].parent / f"other{number}.qcow2").write_bytes(template)
    name = f"10 layers among {crowd} images"
    with machine(images[0].parent, "-drive", f"file={images[-1]},format=qcow2,if=none,id=vda", *device("vda")) as vm:
        for _ in range(runs):
            figures.add(SECTION, f"commit --dry-run, {name}", OURS, ours("commit", vm.target, "--dry-run").milliseconds)
            figures.add(SECTION, f"all checks of it, {name}", OURS, asyncio.run(_checked(vm.target)))


async def _checked(name: str) -> float:
    async with qmpmerge.live(name) as target:
        view = await target.chain()
        begun = time.perf_counter()
        await check(target, view, plan.commit(view.chain, top="[9]"))
        return (time.perf_counter() - begun) * 1000
