"""
A sample of the sweeps, the operations around the switch always among it, and the proof that they would find what is wrong.

All of them: scripts/faults.
"""

import errno
from collections.abc import Callable
from functools import partial

import pytest

from faults import darkness, gate, sweeps, tools
from faults.cases import LIVE, LIVE_ACTIVE, NETWORK, OFFLINE, PULLS, WRITING, WRITING_ACTIVE
from faults.log import Fault
from faults.stage import LAYOUTS, Story, make_stock
from faults.sweeps import Bench, Sweep

pytestmark = pytest.mark.skipif(bool(gate.available()), reason=gate.available() or "here is one")

errors = partial(sweeps.errors, for_ever=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("faults")
    return Bench(make_stock(folder / "stock", LAYOUTS["qcow2"]), folder, seed=1, sample=1)


@pytest.mark.parametrize(
    ("story", "sweep"),
    [(LIVE, sweeps.kills), (WRITING, sweeps.kills), (OFFLINE, sweeps.kills), (NETWORK, sweeps.kills),
     (LIVE, sweeps.power_cuts), (LIVE, errors), (LIVE_ACTIVE, sweeps.kills),
     (LIVE, partial(tools.at_commands, victim="tool")), (LIVE_ACTIVE, partial(tools.at_commands, victim="both")),
     (WRITING_ACTIVE, darkness.sweep)],
)  # fmt: skip
def test_nothing_is_lost_and_nothing_called_what_it_is_not(
    story: Story, sweep: Callable[[Bench, Story, str], Sweep], bench: Bench
) -> None:
    found = sweep(bench, story, "qmpmerge").figures()
    assert found["faults"] > 0
    assert found["wrong_at"] == []


def test_a_middle_image_whose_storage_fails_for_good_costs_no_guest(bench: Bench) -> None:
    """QEMU aborts where a header fails that it has opened for writing for that alone, and it cannot go back."""
    fault = Fault(1, errno=errno.EIO, for_ever=True)
    point = sweeps.one(bench, PULLS["LMP"], "qmpmerge", fault, "its first write")
    assert (point.reached, point.found.wrong, point.played.alive) == (True, [], True)


@pytest.mark.parametrize(("story", "sweep"), [(LIVE, sweeps.kills), (LIVE, errors), (NETWORK, sweeps.kills)])
def test_a_plain_block_commit_goes_wrong_there(
    story: Story, sweep: Callable[[Bench, Story, str], Sweep], bench: Bench
) -> None:
    """The very same faults: the judge finds silent losses where there are some."""
    found = sweep(bench, story, "block-commit").figures()
    assert found["wrong"] > 0
    assert found["blocks_lost"] > 0
