"""
Images not in use: qmpmerge against `qemu-img commit`, and `qemu-img rebase -u` for middle layers.

Durable at the end on both sides: the clock stops when all images are synced.
"""

import time
from pathlib import Path

from speed.figures import OURS, QEMU_IMG, Figures, alternating
from speed.images import DataChain, data_chain, remove
from speed.peers import ours, timed


def measure(figures: Figures, folder: Path, runs: int, sizes: list[int]) -> None:
    """Middle layers and whole chains, of 3 and 10 layers."""
    for megabytes in sizes:
        for layers in (3, 10):
            chain = data_chain(folder / f"offline-{megabytes}-{layers}", layers, megabytes)
            for whole in (False, True):
                name = f"{'whole chain' if whole else 'middle layers'}, {megabytes} MiB in {layers} layers"
                for who in alternating(runs, [OURS, QEMU_IMG]):
                    chain.put_back()
                    begun = time.perf_counter()
                    _merge(chain, who, whole=whole)
                    chain.sync()
                    figures.add("offline merge", name, who, (time.perf_counter() - begun) * 1000)
            for image in chain.images:
                remove(image)


def _merge(chain: DataChain, who: str, *, whole: bool) -> None:
    """As each is used; neither compares base and top."""
    if who == OURS:
        top: list[str | Path] = [] if whole else ["--top", chain.top]
        ours("commit", chain.active, *top, "--no-verify")
        return
    timed("qemu-img", "commit", "-q", "-b", chain.base, chain.active if whole else chain.top)
    if not whole:
        timed("qemu-img", "rebase", "-u", "-b", chain.base.name, "-F", "raw", chain.active)
