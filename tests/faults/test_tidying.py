"""A sample of one VM, and the proof that what is wrong would be found: all of it is `scripts/faults TT`."""

from pathlib import Path

import pytest

from faults import tidying
from faults.cases import LIVE, LIVE_ACTIVE, OFFLINE
from faults.stage import Stock, Story
from faults.sweeps import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Stock(tmp_path, (), b""), tmp_path, sample=0)


@pytest.mark.parametrize("story", [LIVE_ACTIVE, OFFLINE], ids=str)
def test_what_was_killed_is_done_by_the_next(story: Story, bench: Bench) -> None:
    found = tidying.sweep(bench, story, "qmpmerge", count=1).figures()
    assert (found["faults"], found["wrong_at"]) == (2, [])


def test_what_nobody_has_done_is_wrong(bench: Bench) -> None:
    with tidying.scene(bench, LIVE, 1) as now:
        lock = now.chains[0].active.with_name(".base.raw.qmpmerge-lock")
        lock.touch()
        now.chains[1].content.put(0x77, 0, 4096)
        wrong = tidying.wrong_with(now)
    assert sum("the chain is " in one for one in wrong) == 2
    assert [one for one in wrong if one.startswith("left behind: ")] and [
        one for one in wrong if "differs at [0" in one
    ]
