"""
How the cost of a merge grows with layers, with data and with disks.
"""

from pathlib import Path

from rig.disks import device
from rig.machines import machine, make_chain

from speed import live
from speed.figures import BARE, OURS, Figures, alternating
from speed.images import DataChain, data_chain
from speed.peers import bare, ours

SECTION = "growth"


def layers(figures: Figures, folder: Path, runs: int, lengths: list[int]) -> None:
    """Intermediate merges of so many empty layers."""
    for length in lengths:
        chain = data_chain(folder / f"layers-{length}", length, 0)
        name = f"intermediate, {length} empty layers"
        for who in alternating(runs, [OURS, BARE]):
            chain.put_back()
            live.merge_once(figures, SECTION, name, who, chain, active=False)


def data(figures: Figures, folder: Path, runs: int, sizes: list[int]) -> None:
    """Intermediate merges of so many MiB."""
    for megabytes in sizes:
        chain = data_chain(folder / f"data-{megabytes}", live.LAYERS, megabytes)
        for who in alternating(runs, [OURS, BARE]):
            chain.put_back()
            live.merge_once(figures, SECTION, f"intermediate, {megabytes} MiB", who, chain, active=False)
        chain.remove()


def disks(figures: Figures, folder: Path, runs: int, counts: list[int]) -> None:
    """`disks`, and the merge of one disk of so many."""
    for count in counts:
        place = folder / f"disks-{count}"
        place.mkdir()
        chain = data_chain(place / "merged", live.LAYERS, 0)
        others = [make_chain(_made(place / f"other{number}"))[-1] for number in range(1, count)]
        drives = ["-drive", f"file={chain.active},if=none,id=vda", *device("vda")]
        for number, image in enumerate(others):
            drives += [
                "-drive",
                f"file={image},if=none,id=other{number}",
                "-device",
                f"virtio-blk-pci,drive=other{number}",
            ]
        for who in alternating(runs, [OURS, BARE]):
            chain.put_back()
            _one_of_many(figures, place, drives, chain, who, count)


def _one_of_many(figures: Figures, place: Path, drives: list[str], chain: DataChain, who: str, count: int) -> None:
    with machine(place, *drives) as vm:
        if who == OURS:
            figures.add(SECTION, f"disks, {count} disks", who, ours("disks", vm.target).milliseconds)
            took = ours("commit", vm.target, "vda", "--top", chain.top).milliseconds
        else:
            took = bare(vm.session, chain.merge(active=False))
        figures.add(SECTION, f"intermediate, one of {count} disks", who, took)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
