"""
Random rounds of snapshots, merges, reboots, kills and advice: no acknowledged write is lost, no stale image started without a
word, and the loop is never stuck. The oracle is tested on a model of 0.1, on which it must see all that went wrong there.
"""

import contextlib
import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st
from rig.living import Living
from rig.model import New, Old
from rig.rounds import KINDS, POLICIES, Game, Round, draw

ROUNDS = st.builds(Round, st.sampled_from(KINDS), st.integers(0, 1 << 16), st.sampled_from(POLICIES))


def played(world: Old, *rounds: Round) -> str:
    return " ".join(Game(world).play(rounds))


# --- the oracle ---------------------------------------------------------------------------------------------------


NIGHT = [Round("snapshot", 1), Round("write", 0)]
WEEK = [Round("snapshot", 0), Round("write", 0), Round("merge", 0)]


class Unasked(Game):
    """A game in which the stale start itself is no fault, to see what the advice does then."""

    def _fault(self, what: str) -> None:
        if not what.startswith("stale"):
            super()._fault(what)


@pytest.mark.parametrize(
    ("story", "launch", "rounds", "fault"),
    [
        ("1: a snapshot, a reboot by the launch path", "base.raw", [*NIGHT, Round("by launch path")], "stale"),
        (
            "2: relink, a snapshot, a reboot",
            "launch.qcow2",
            [Round("merge", 0, "relink"), *NIGHT, Round("by launch path")],
            "stale",
        ),
        ("3: one overlay name", "base.raw", WEEK * 4, "stuck"),
    ],
)
def test_the_stories_of_0_1_are_caught(story: str, launch: str, rounds: list[Round], fault: str) -> None:
    assert fault in played(Old(launch), *rounds)


def test_the_advice_of_0_1_is_caught() -> None:
    """Stories 1 and 4: the newest image is renamed, and `clean` removes it."""
    faults = " ".join(Unasked(Old()).play([*NIGHT, Round("by launch path")]))
    assert "unproved: night.qcow2" in faults and "lost" in faults


@pytest.mark.parametrize("fault", ["stale", "unproved", "lost"])
def test_random_rounds_find_it_too(fault: str) -> None:
    """In a dozen rounds."""
    game = Game if fault == "stale" else Unasked
    find(
        st.lists(ROUNDS, min_size=1, max_size=12),
        lambda rounds: any(fault in one for one in game(Old()).play(rounds)),
        settings=settings(
            max_examples=5_000,
            phases=[Phase.generate],
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@seed(13)
@settings(max_examples=500, deadline=None, database=None, phases=[Phase.generate, Phase.shrink])
@given(st.lists(ROUNDS, max_size=40))
def test_what_is_built_now_passes_as_a_model(rounds: list[Round]) -> None:
    assert Game(New()).play(rounds) == []


# --- on a real QEMU -----------------------------------------------------------------------------------------------

SEED = os.environ.get("QMPMERGE_ROUNDS_SEED", "13")
COUNT = int(os.environ.get("QMPMERGE_ROUNDS", "24"))
"""Rounds that are played; the long case of the fault bench plays more."""

A_GAME = 12
"""Rounds after which it is seen whether all can go on, and a new game begins."""


@pytest.mark.timeout(0 if COUNT > 100 else 300)
@pytest.mark.parametrize("number", range(COUNT // A_GAME))
def test_rounds_on_a_real_qemu(number: int, tmp_path: Path) -> None:
    world = Living(tmp_path)
    with contextlib.closing(world):
        faults = Game(world).play(draw(Random(f"{SEED}-{number}"), A_GAME))
    assert faults == [], "\n".join(world.commands).replace(f"{tmp_path}/", "")
