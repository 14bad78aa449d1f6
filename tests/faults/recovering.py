"""
`qmpmerge recover`, killed at each of its steps and run again.
"""

import subprocess
import sys
from functools import cache

from rig.folder import litter

from faults import oracle
from faults.gate import Gate
from faults.log import Fault, Log
from faults.stage import Story, play, recover
from faults.sweeps import Bench, Point, Sweep, each

ENTRIES = 4
"""From how many states of a merge that was killed: spread over its second half, where the switch is."""


@cache
def is_there() -> bool:
    """Whether this qmpmerge has the command."""
    line = [sys.executable, "-m", "qmpmerge", "recover", "--help"]
    return subprocess.run(line, capture_output=True).returncode == 0


def sweep(bench: Bench, story: Story, _doer: str) -> Sweep:
    """A merge is killed with its machine; recover is killed after each operation on a file; then it is run to its end."""
    points: list[Point] = []
    for number in entries(bench, story):
        points += each(lambda step, number=number: killed(bench, story, number, step), None)  # type: ignore[misc]
    return Sweep(story, "qmpmerge", points)


def entries(bench: Bench, story: Story) -> list[int]:
    """The operations after which the merges are killed."""
    with bench.case() as case:
        count = play(case, story, "qmpmerge", gated="names").count_at_end
    return bench.some(sorted({count - step * count // (2 * ENTRIES) for step in range(ENTRIES)}), [count])


def killed(bench: Bench, story: Story, number: int, step: int) -> Point:
    with bench.case() as case:
        first = play(case, story, "qmpmerge", Fault(number, victims="all"), gated="names")
        log = Log(Fault(step, victims="all"))
        with Gate(case.images, log) as gate:
            recover(case, before=gate.before("names"))
        assert log.fault is not None
        told = recover(case)
        found = oracle.judge(case, first)
        if "Traceback" in told.complaints or told.code not in (0, 3, 6):
            found.wrong.append(f"recover: exit code {told.code}: {told.complaints[-500:]}")
        left = [name for name in litter(case.images) if "qmpmerge" in name and not name.endswith("-lock")]
        if left and told.code == 0:
            found.wrong.append(f"recover is done and leaves {left}")
        reached = log.fault.reached
        return Point(f"merge killed after {number}, recover at {reached}", first, found, reached is not None)
