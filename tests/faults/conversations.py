"""
Conversations with a QEMU that says one wrong thing: every command, every reply, every way of being wrong, by a seed.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rig import conversations
from rig.conversations import CHANGING, LOOKING, Found, Scene, Stock, Told
from rig.mutations import Findings

COUNT = 1000
WORKERS = 2
WEIGHT = 3
"""A command that changes something is had so much more often than one that only looks."""


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


def tries(seed: int, folder: Path) -> Iterator[tuple[str, Findings]]:
    """`COUNT` of them, and first each once without a lie, which tells the messages that there are to lie in."""
    stock, chance = Stock.make(folder / "stock"), Random(seed)
    plans = [Plan.of(chance) for _ in range(COUNT)]
    said: dict[tuple[str, bool], list[str]] = {}
    for plan in plans:
        if (plan.scene.name, plan.known) not in said:
            told, found = _one(stock, folder / "plain", plan)
            said[plan.scene.name, plan.known] = told.liar.told
            yield str(told), _findings(found)

    def lied(number: int) -> tuple[Told, Found]:
        plan = plans[number]
        lie, at = conversations.choose(said[plan.scene.name, plan.known], plan.seed)
        return _one(stock, folder / str(number), plan, lie, at)

    with ThreadPoolExecutor(WORKERS) as pool:
        for told, found in pool.map(lied, range(COUNT)):
            yield str(told), _findings(found)


def _one(stock: Stock, place: Path, plan: Plan, lie: str = "", at: int = 0) -> tuple[Told, Found]:
    """A conversation with a QEMU of its own."""
    try:
        with conversations.staged(stock, place, runs=plan.runs, known=plan.known) as stage:
            return conversations.judged(stage, plan.scene, lie, at, plan.seed)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _findings(found: Found) -> Findings:
    return Findings(found.lines(), len(found.tracebacks), len(found.outside), len(found.lost))
