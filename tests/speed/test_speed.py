"""The bench measures what it says: every section once, on tiny images."""

from collections.abc import Callable
from pathlib import Path

import pytest

from speed import growth, listing, live, offline, tidying, together, writes
from speed.figures import BARE, OURS, QEMU_IMG, Case, Figures, alternating, percentile


def test_medians_and_ratios() -> None:
    case = Case("live merge", "active", "ms", {OURS: [30.0, 10.0, 20.0], BARE: [5.0, 40.0]})
    assert (case.median(OURS), case.median(BARE)) == (20.0, 22.5)
    assert case.ratio(BARE) == 20.0 / 22.5
    assert case.ratio(OURS) is None
    assert Case("look", "python", "ms", {"python": [1.0]}).ratio("python") is None


def test_peers_take_turns_and_each_is_first_at_times() -> None:
    assert list(alternating(3, "abc")) == list("abcbcacab")


def test_the_table_shows_medians_and_ours_to_theirs() -> None:
    figures = Figures()
    for value in (100.0, 300.0, 200.0):
        figures.add("live merge", "active", OURS, value)
        figures.add("live merge", "active", BARE, value / 10)
    assert list(figures.table()) == [
        "",
        "live merge      qmpmerge      bare QMP",
        "active      ms       200  20.0 (10.00)",
    ]


def test_percentiles_are_values_that_were_measured() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], share) for share in (1, 25, 50, 51, 95, 100)] == [1, 1, 2, 3, 4, 4]


def merge_live(figures: Figures, folder: Path) -> None:
    live.measure(figures, folder, 1, None, [1])
    live.deep(figures, folder, 1, None, [6])
    growth.layers(figures, folder, 1, [3])
    growth.disks(figures, folder, 1, [2])


def merge_offline(figures: Figures, folder: Path) -> None:
    offline.measure(figures, folder, 1, [4])
    offline.sparse(figures, folder, 1, [3])
    offline.deep(figures, folder, 1, [6])


def look(figures: Figures, folder: Path) -> None:
    listing.start(figures, 1)
    listing.chains(figures, folder, 1, [3])
    listing.images(figures, folder, 1, [3])
    listing.checks_of_a_merge(figures, folder, 1, 12)
    listing.vms(figures, folder, 1, [1])


def merge_many(figures: Figures, folder: Path) -> None:
    together.measure(figures, folder, 1, 2, [1])
    tidying.measure(figures, folder, 1, 1)


def write(figures: Figures, folder: Path) -> None:
    writes.measure(figures, folder, 1, [1])
    writes.pauses(figures, folder, 1)


PEERS: dict[Callable[[Figures, Path], None], dict[str, set[str]]] = {
    merge_live: {"active, pivot, 1 MiB in 3 layers": {BARE}, "one of 6 layers": {BARE}},
    merge_offline: {
        "middle layers, 4 MiB in 10 layers": {QEMU_IMG},
        "whole chain, 3 clusters of 1 TiB": {offline.COMPARED, QEMU_IMG},
        "one of 6 layers: CPU": {QEMU_IMG},
    },
    look: {"chain IMAGE, 3 layers: CPU": {QEMU_IMG}, "disks, 3 layers": {BARE}},
    merge_many: {
        "active, pivot, 2 disks of 1 MiB": {together.LIBRARY, BARE},
        "1 VMs of 2 disks": {tidying.ALONE},
    },
    write: {
        "intermediate, 1 MiB: worst write and flush": {BARE, writes.ALONE},
        "active, pivot, 1 MiB: 95 of 100 are within": {BARE, writes.ALONE},
        "the guest's pause": {BARE},
        "the guest's pause, by TCP": {BARE},
    },
}


@pytest.mark.parametrize("measure", PEERS)
def test_every_section_measures_every_peer(measure: Callable[[Figures, Path], None], tmp_path: Path) -> None:
    figures = Figures()
    measure(figures, tmp_path)
    cases = {case["case"]: case for case in figures.document()}
    assert {name: set(cases[name]["ratios"]) for name in PEERS[measure]} == PEERS[measure]
    runs = [
        (name, who, run) for name, case in cases.items() for who, peer in case["peers"].items() for run in peer["runs"]
    ]
    assert [one for one in runs if one[2] <= 0] == []
    if measure is look:
        assert cases["disks, 3 layers: QMP commands"]["peers"][OURS]["median"] == 5
