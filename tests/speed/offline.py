"""
Images not in use: qmpmerge against `qemu-img commit`, and `qemu-img rebase -u` for middle layers.

Durable at the end on both sides: the clock stops when all images are synced. `qemu-img` compares nothing, so ours does not
either where it is told not to.
"""

import time
from pathlib import Path

from speed.figures import OURS, QEMU_IMG, Figures, alternating
from speed.images import DataChain, data_chain, deep_chain, sparse_chain
from speed.peers import Ran, ours, timed

SECTION = "offline merge"


def measure(figures: Figures, folder: Path, runs: int, sizes: list[int]) -> None:
    """Middle layers and whole chains, of 3 and 10 layers."""
    for megabytes in sizes:
        for layers in (3, 10):
            chain = data_chain(folder / f"offline-{megabytes}-{layers}", layers, megabytes)
            for whole in (False, True):
                name = f"{'whole chain' if whole else 'middle layers'}, {megabytes} MiB in {layers} layers"
                for who in alternating(runs, [OURS, QEMU_IMG]):
                    _merge_once(figures, name, who, chain, whole=whole)
            chain.remove()


def sparse(figures: Figures, folder: Path, runs: int, counts: list[int]) -> None:
    """So many clusters on a disk of 1 TiB; compared too, since such a comparison is cheap."""
    for clusters in counts:
        chain = sparse_chain(folder / f"sparse-{clusters}", clusters)
        for whole in (False, True):
            name = f"{'whole chain' if whole else 'middle layer'}, {clusters} clusters of 1 TiB"
            for who in alternating(runs, [OURS, COMPARED, QEMU_IMG]):
                cpu = _merge_once(figures, name, who, chain, whole=whole)
                figures.add(SECTION, f"{name}: CPU", who, cpu)
        chain.put_back()
        _merge(chain, QEMU_IMG, whole=True)  # so that base has clusters all over too
        for _run in range(runs):
            dry_run = ours("commit", chain.active, "--dry-run")
            figures.add(SECTION, f"dry run, {clusters} clusters of 1 TiB: CPU", OURS, dry_run.cpu)


def deep(figures: Figures, folder: Path, runs: int, lengths: list[int]) -> None:
    """One empty layer in the middle of so many, and the processors' time that it takes."""
    for length in lengths:
        chain = deep_chain(folder / f"offline-deep-{length}", length)
        for who in alternating(runs, [OURS, QEMU_IMG]):
            cpu = _merge_once(figures, f"one of {length} layers", who, chain, whole=False)
            figures.add(SECTION, f"one of {length} layers: CPU", who, cpu)


COMPARED = "compared"
"""Ours as it is used, which compares where that is cheap."""


def _merge_once(figures: Figures, name: str, who: str, chain: DataChain, *, whole: bool) -> float:
    """One merge by one peer; returns the milliseconds of the processors."""
    chain.put_back()
    begun = time.perf_counter()
    commands = _merge(chain, who, whole=whole)
    chain.sync()
    figures.add(SECTION, name, who, (time.perf_counter() - begun) * 1000)
    return sum(command.cpu for command in commands)


def _merge(chain: DataChain, who: str, *, whole: bool) -> list[Ran]:
    if who != QEMU_IMG:
        layers = [] if whole else chain.middle
        return [ours("commit", chain.active, *layers, *([] if who == COMPARED else ["--no-verify"]))]
    base, top, overlay = (chain.images[0], chain.active, None) if whole else (chain.base, chain.top, chain.overlay)
    commands = [timed("qemu-img", "commit", "-q", "-b", base, top)]
    if overlay is not None:
        names = ("-b", base.name, "-F", base.suffix[1:])
        commands.append(timed("qemu-img", "rebase", "-u", *names, overlay))
    return commands
