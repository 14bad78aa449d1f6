"""
The sweeps: one merge for each operation, with a fault in exactly that one.
"""

import errno
import itertools
import os
import random
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from faults import cuts, oracle
from faults.log import Fault, Operation, Victims
from faults.oracle import Judgement
from faults.stage import Case, Doer, Played, Stock, Story, play

T = TypeVar("T")
WORKERS = os.cpu_count() or 2


@dataclass(frozen=True)
class Bench:
    """
    What every sweep needs: images to copy, a folder to work in, chance with a seed. With `sample` a sweep takes only so
    many of its points, and those where it is decided.
    """

    stock: Stock
    folder: Path
    seed: int = 0
    sample: int | None = None

    def case(self) -> Case:
        return Case(self.stock, self.folder)

    def some(self, everything: Sequence[T], decisive: Iterable[T] = ()) -> list[T]:
        """A sample in the order of `everything`, the decisive ones among it."""
        if self.sample is None or self.sample >= len(everything):
            return list(everything)
        chosen = {*random.Random(self.seed).sample(everything, self.sample), *decisive}
        return [one for one in everything if one in chosen]


@dataclass
class Point:
    """One fault and what came of it."""

    fault: str
    played: Played
    found: Judgement
    reached: bool = True


@dataclass
class Sweep:
    """
    All points of one kind of fault in one kind of merge. `lost` are writes that the guest saw flushed, or blocks of the
    images, that are gone; `wrong` are points at which the disk or the verdict was wrong.
    """

    story: Story
    doer: Doer
    points: list[Point] = field(default_factory=list)

    @property
    def wrong(self) -> list[Point]:
        return [point for point in self.points if not point.found.is_right]

    def figures(self) -> dict[str, Any]:
        """What the table and the JSON file tell."""
        return {
            "faults": len(self.points),
            "wrong": len(self.wrong),
            "wrong_at": [f"{point.fault}: {'; '.join(point.found.wrong)}" for point in self.wrong],
            "blocks_lost": sum(point.found.lost for point in self.points),
            "writes_acknowledged": sum(len(point.played.acknowledged) for point in self.points),
            "machine_died": sum("error" in point.fault and not point.played.alive for point in self.points),
            "asked": sum(point.found.asked for point in self.points),
            "stale_launch_path": sum(point.found.stale for point in self.points),
            "leaks": sum(point.found.leaks for point in self.points),
            "left": sum(bool(point.found.left) for point in self.points),
            "verdicts": dict(Counter(point.played.verdict for point in self.points)),
        }


def each(work: Callable[[int], Point], numbers: Iterable[int] | None) -> Iterator[Point]:
    """Points for these numbers; for None for all from 1 up, until one does not come to its operation."""
    with ThreadPoolExecutor(WORKERS) as pool:
        if numbers is not None:
            yield from (point for point in pool.map(work, numbers) if point.reached)
            return
        counted = itertools.count(1)
        while True:
            batch = list(pool.map(work, itertools.islice(counted, WORKERS * 4)))
            yield from (point for point in batch if point.reached)
            if not any(point.reached for point in batch[-2:]):
                return


def numbers_of(bench: Bench, story: Story, doer: Doer, *, gated: str = "storage") -> list[int] | None:
    """The operations at which a sweep strikes: None for all, else a sample with the operations around the switch."""
    if bench.sample is None:
        return None
    with bench.case() as case:
        play(case, story, doer, gated=gated)
        operations = case.log.operations
        top = case.names[story.relinked]
    header = [
        number for number, one in enumerate(operations, 1) if one.file == top and one.kind == "write" and not one.offset
    ]
    last = header[-1] if header else len(operations)
    window = range(last, min(last + 3, len(operations) + 1))
    return bench.some(range(1, len(operations) + 1), window)


# --- kills ------------------------------------------------------------------------------------------------------------


def kills(bench: Bench, story: Story, doer: Doer, *, victims: Victims = "actor", gated: str = "storage") -> Sweep:
    """SIGKILL after each operation in turn, and one more when the merge is said to be done."""

    def killed(number: int) -> Point:
        return one(bench, story, doer, Fault(number, victims=victims), f"kill after {number}", gated=gated)

    sweep = Sweep(story, doer, list(each(killed, numbers_of(bench, story, doer, gated=gated))))
    if not (story.offline and doer == "qmpmerge"):
        sweep.points.append(one(bench, story, doer, None, "kill when it is done", kill_at_end=True))
    return sweep


def one(
    bench: Bench,
    story: Story,
    doer: Doer,
    fault: Fault | None,
    name: str,
    *,
    kill_at_end: bool = False,
    gated: str = "storage",
) -> Point:
    """One merge with one fault, judged; where it was ours and was killed, it is then done again on the images."""
    with bench.case() as case:
        played = play(case, story, doer, fault, kill_at_end=kill_at_end, gated=gated)
        reached = fault is None or fault.reached is not None
        found = oracle.judge(case, played)
        told = f"{name} ({fault.reached})" if fault is not None and fault.reached is not None else name
        if reached and doer == "qmpmerge" and found.is_right and (kill_at_end or not (fault and fault.errno)):
            found.wrong += again(case, played)
        return Point(told, played, found, reached)


def again(case: Case, first: Played) -> list[str]:
    """What went wrong when the same merge was asked for again, on images not in use any more."""
    story = Story(pivots=first.story.pivots, offline=True, pulls=first.story.pulls)
    second = play(case, story, "qmpmerge")
    if second.verdict == "refused: in-use":  # see `oracle`
        time.sleep(1)
        second = play(case, story, "qmpmerge")
    for _ in case.names:
        if second.verdict == "refused: known-bad":  # with lazy refcounts a kill leaves images that are marked as dirty
            _carry_out(second.document["error"]["hint"])
            second = play(case, story, "qmpmerge")
    second.acknowledged, second.begun = first.acknowledged, first.begun
    finished = second.done or second.verdict in oracle.DONE_ALREADY
    if first.story.pivots and (first.done or first.story.writes):
        return []  # the guest may live on base already: there is nothing to do again
    found = oracle.judge(case, second)
    return [f"again: {word}" for word in found.wrong] + ([] if finished else [f"again: {second.verdict}"])


def _carry_out(hint: str) -> None:
    """Type the command of a hint."""
    subprocess.run(shlex.split(hint.split("`")[1]), capture_output=True, check=True)


# --- errors -----------------------------------------------------------------------------------------------------------


def errors(bench: Bench, story: Story, doer: Doer, *, for_ever: bool = False) -> Sweep:
    """The k-th write or flush fails with EIO, once or, on that file, for ever."""
    how = "for ever" if for_ever else "once"

    def failing(number: int) -> Point:
        fault = Fault(number, errno=errno.EIO, for_ever=for_ever)
        return one(bench, story, doer, fault, f"error {how} at {number}")

    return Sweep(story, doer, list(each(failing, numbers_of(bench, story, doer))))


# --- power cuts -------------------------------------------------------------------------------------------------------


def power_cuts(bench: Bench, story: Story, doer: Doer, *, most: int = 24) -> Sweep:
    """
    The power goes at any time: every flush is where the set of unflushed operations is largest, and any subset of them
    may be missing. A sample of about `most` states for each flush where there are more.
    """
    sweep = Sweep(story, doer)
    with bench.case() as case:
        images = {path.name: path.read_bytes() for path in case.paths}
        played = play(case, story, doer)
        operations = list(case.log.operations)
    states = bench.some(list(cuts.states(operations, random.Random(bench.seed), most)))

    def cut(state: cuts.State) -> Point:
        return Point(str(state), played, judged_cut(bench, images, operations, state, played))

    with ThreadPoolExecutor(WORKERS) as pool:
        sweep.points += pool.map(cut, states)
    return sweep


def judged_cut(
    bench: Bench, images: dict[str, bytes], operations: Sequence[Operation], state: cuts.State, played: Played
) -> Judgement:
    with bench.case() as case:
        for name, data in cuts.after(images, operations, state).items():
            (case.images / name).write_bytes(data)
        return oracle.judge(case, played, at=state.length)
