"""The bench measures what it says: every section once, on tiny images."""

from pathlib import Path

from speed import growth, listing, live, offline, tidying
from speed.figures import BARE, OURS, QEMU_IMG, Case, Figures, alternating


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


def test_every_section_measures_every_peer(tmp_path: Path) -> None:
    figures = Figures()
    live.measure(figures, tmp_path, 1, None, [1])
    offline.measure(figures, tmp_path, 1, [4])
    listing.start(figures, 1)
    listing.chains(figures, tmp_path, 1, [3])
    listing.checks_of_a_merge(figures, tmp_path, 1, 12)
    listing.vms(figures, tmp_path, 1, [1])
    growth.layers(figures, tmp_path, 1, [3])
    growth.disks(figures, tmp_path, 1, [2])
    tidying.measure(figures, tmp_path, 1, 1)
    cases = {case["case"]: case for case in figures.document()}
    assert set(cases["active, pivot, 1 MiB in 3 layers"]["ratios"]) == {BARE}
    assert set(cases["middle layers, 4 MiB in 10 layers"]["ratios"]) == {QEMU_IMG}
    assert set(cases["1 VMs of 2 disks"]["ratios"]) == {tidying.ALONE}
    assert cases["disks, 3 layers: QMP round trips"]["peers"][OURS]["median"] == 4
    assert all(run > 0 for case in cases.values() for peer in case["peers"].values() for run in peer["runs"])
