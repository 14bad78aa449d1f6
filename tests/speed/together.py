"""
Many disks of one VM at once: by as many commands, from one process that uses the library, and by the bare conversation.

Each command has a monitor of its own: one serves a single client at a time.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rig.machines import machine

from speed.figures import BARE, OURS, Figures, alternating
from speed.images import DataChain, data_chain
from speed.peers import COMMAND, bare, timed

SECTION = "at once"
LIBRARY = "library"
LAYERS = 3
PROGRAM = """
import asyncio, sys, qmpmerge

async def main(target, top, *disks):
    async with qmpmerge.live(target) as opened:
        await asyncio.gather(*(qmpmerge.commit(opened, disk, top=top or None) for disk in disks))

asyncio.run(main(*sys.argv[1:]))
"""


def measure(figures: Figures, folder: Path, runs: int, count: int, sizes: list[int]) -> None:
    """So many disks, each with so many MiB in three layers."""
    for megabytes in sizes:
        chains = [data_chain(folder / f"at-once-{megabytes}-{number}", LAYERS, megabytes) for number in range(count)]
        for active in (False, True):
            name = f"{'active, pivot' if active else 'intermediate'}, {count} disks of {megabytes} MiB"
            for who in alternating(runs, [OURS, LIBRARY, BARE]):
                for chain in chains:
                    chain.put_back()
                figures.add(SECTION, name, who, _once(folder, who, chains, active=active))
        for chain in chains:
            chain.remove()


def _once(folder: Path, who: str, chains: Sequence[DataChain], *, active: bool) -> float:
    disks = {f"vd{number}": chain for number, chain in enumerate(chains)}
    with machine(folder, *(word for disk, chain in disks.items() for word in _arguments(folder, disk, chain))) as vm:
        begun = time.perf_counter()
        if who == OURS:
            options = {disk: [] if active else chain.middle for disk, chain in disks.items()}
            _all([COMMAND, "commit", str(folder / disk), disk, *options[disk]] for disk in disks)
        elif who == LIBRARY:
            timed(sys.executable, "-c", PROGRAM, vm.target, "" if active else str(LAYERS + 1), *disks)
        else:
            bare(vm.session, *(chain.merge(active=active, disk=disk) for disk, chain in disks.items()))
        for chain in chains:
            chain.sync()
        return (time.perf_counter() - begun) * 1000


def _arguments(folder: Path, disk: str, chain: DataChain) -> list[str]:
    """A disk, and a monitor."""
    drive = ["-drive", f"file={chain.active},if=none,id={disk}", "-device", f"virtio-blk-pci,drive={disk}"]
    return [*drive, "-qmp", f"unix:{folder / disk},server=on,wait=off"]


def _all(commands: Iterable[list[str]]) -> None:
    """Run them side by side; a failure ends the bench."""
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda command: timed(*command), list(commands)))
