"""
Conversations with a QEMU that says one wrong thing: every command, every reply, every way of being wrong, by a seed.
"""

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from rig import conversations
from rig.conversations import CHANGING, LOOKING, Found, Scene, Stock, Told

from faults.stage import Story
from faults.sweeps import WORKERS, Bench, Sweep

COUNT = 1000
WEIGHT = 3
"""A command that changes something is had so much more often than one that only looks."""


class Talk(Story):
    """What such a conversation is about."""

    def __str__(self) -> str:
        return "live, every command"


@dataclass
class Talks(Sweep):
    """All of them: what was wrong, by kinds, and what the commands said."""

    found: Found = field(default_factory=Found)
    told: list[Told] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Those of any sweep, and the kinds of what was wrong."""
        kinds = {kind: len(wrong) for kind, wrong in vars(self.found).items()}
        lied = sum(bool(told.liar.lied) for told in self.told)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return {
            **super().figures(),
            "faults": lied,
            "wrong": len(self.found.lines()),
            "wrong_at": self.found.lines(),
            "verdicts": dict(Counter(str(told.run.code) for told in self.told)),
            "kinds": kinds,
            "notes": [f"{lied} of {len(self.told)} conversations came to the lie; wrong: {counts}"],
        }


@dataclass(frozen=True)
class Plan:
    """One conversation to be had: whether QEMU's pid is `known`, and whether its guest `runs`."""

    scene: Scene
    known: bool
    runs: bool
    seed: int

    @classmethod
    def of(cls, chance: Random) -> "Plan":
        scene = chance.choice(CHANGING * WEIGHT + LOOKING)
        return cls(scene, chance.random() < 0.6, chance.random() < 0.5, chance.randrange(2**32))


def sweep(bench: Bench, story: Story, _doer: str) -> Talks:
    """A thousand, or a sample."""
    place = bench.folder / "conversations"
    stock, talks = Stock.make(place / "stock"), Talks(story, "qmpmerge")
    chance = Random(bench.seed)
    plans = [Plan.of(chance) for _ in range(COUNT if bench.sample is None else bench.sample)]
    said: dict[tuple[str, bool], list[str]] = {}
    for plan in plans:
        if (plan.scene.name, plan.known) not in said:
            told, found = one(stock, place / "plain", plan.scene, known=plan.known)
            talks.found.add(found)
            said[plan.scene.name, plan.known] = told.liar.told

    def lied(number: int) -> tuple[Told, Found]:
        plan = plans[number]
        lie, at = conversations.choose(said[plan.scene.name, plan.known], plan.seed)
        return one(stock, place / str(number), plan.scene, lie, at, plan.seed, known=plan.known, runs=plan.runs)

    with ThreadPoolExecutor(WORKERS) as pool:
        for told, found in pool.map(lied, range(len(plans))):
            talks.told.append(told)
            talks.found.add(found)
    return talks


def one(
    stock: Stock,
    place: Path,
    scene: Scene,
    lie: str = "",
    at: int = 0,
    seed: int = 0,
    *,
    known: bool,
    runs: bool = False,
) -> tuple[Told, Found]:
    """A conversation with a QEMU of its own."""
    try:
        with conversations.staged(stock, place, runs=runs, known=known) as stage:
            return conversations.judged(stage, scene, lie, at, seed)
    finally:
        shutil.rmtree(place, ignore_errors=True)
