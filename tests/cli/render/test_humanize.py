"""Numbers and names in words: what a terminal is shown."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.chain.outcome import Estimate
from qmpmerge.cli.render import humanize
from qmpmerge.engine.pace.progress import Progress
from qmpmerge.qemu.jobs import Job

KIB, MIB, GIB, TIB, PIB = (1024**power for power in range(1, 6))

# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (None, "-"),
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (1536, "1.5 KiB"),
        (99 * KIB + 512, "99.5 KiB"),
        (100 * KIB + 512, "100 KiB"),
        (MIB - KIB, "1023 KiB"),
        (MIB, "1 MiB"),
        (GIB, "1 GiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (10 * TIB, "10 TiB"),
        (PIB, "1 PiB"),
        (5000 * PIB, "5000 PiB"),
        (1.5 * MIB, "1.5 MiB"),
    ],
)
def test_a_size_is_said_in_the_largest_unit_that_fits(count: float | None, said: str) -> None:
    assert humanize.size(count) == said


def test_a_size_that_rounds_up_to_the_next_unit_is_said_in_that_unit() -> None:
    assert humanize.size(MIB - 1) in ("1 MiB", "1.0 MiB")
    assert humanize.size(GIB - 1) in ("1 GiB", "1.0 GiB")


@given(st.integers(0, 1024 * PIB - 1))
def test_a_size_in_words_is_right_to_one_part_in_twenty_and_stays_short(count: int) -> None:
    said = humanize.size(count)
    number, unit = said.split(" ")
    assert float(number) * 1024 ** ("B", "KiB", "MiB", "GiB", "TiB", "PiB").index(unit) == pytest.approx(
        count, rel=0.05
    )
    assert len(said) <= len("1023.9 KiB")


# --- times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (42, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (100 * 3600, "100 h 0 min"),
    ],
)
def test_a_duration_is_said_in_at_most_two_units(seconds: float, said: str) -> None:
    assert humanize.duration(seconds) == said


@given(st.floats(0, 1e7))
def test_a_duration_never_says_sixty_of_anything(seconds: float) -> None:
    assert not re.search(r"\b60 (s|min)\b", humanize.duration(seconds))


# --- progress -----------------------------------------------------------------------------------------------------

JOB = Job("qmpmerge-commit-vda", "commit", "running", 3 * GIB, 10 * GIB)
COPYING = Progress("vda", JOB, "copied", rate=250 * MIB, seconds_left=28.4)


def at(**job: Any) -> Progress:
    return replace(COPYING, job=replace(JOB, **job))


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (COPYING, "vda: 30 %, copied 3 GiB of 10 GiB, 250 MiB/s, 28 s left"),
        (replace(COPYING, counts="scanned"), "vda: 30 %, scanned 3 GiB of 10 GiB, 250 MiB/s, 28 s left"),
        (replace(COPYING, rate=None, seconds_left=None), "vda: 30 %, copied 3 GiB of 10 GiB"),
        (replace(at(done=0, total=0), rate=None, seconds_left=None), "vda: copied 0 B of 0 B"),
        (replace(at(done=10 * GIB), seconds_left=0.0), "vda: 100 %, copied 10 GiB of 10 GiB, 250 MiB/s"),
        (replace(at(done=11 * GIB), seconds_left=0.0), "vda: 100 %, copied 11 GiB of 10 GiB, 250 MiB/s"),
        (at(status="created"), "vda: 30 %, copied 3 GiB of 10 GiB, 250 MiB/s, 28 s left"),
        (replace(at(status="ready"), seconds_left=None), "vda: 30 %, copied 3 GiB of 10 GiB, 250 MiB/s, ready"),
        (replace(at(status="no space"), rate=None, seconds_left=None), "vda: 30 %, copied 3 GiB of 10 GiB, no space"),
        (replace(COPYING, disk="v\x1bc", rate=None, seconds_left=None), r"v\x1bc: 30 %, copied 3 GiB of 10 GiB"),
    ],
)
def test_a_progress_line_says_exactly_this(told: Progress, line: str) -> None:
    assert humanize.progress(told) == line


@given(done=st.integers(0, PIB), total=st.integers(0, PIB))
def test_a_percentage_is_never_over_a_hundred(done: int, total: int) -> None:
    percent = at(done=done, total=total).percent
    assert (percent is None) == (total == 0)
    assert percent is None or 0 <= percent <= 100


# --- what was found out before a merge -------------------------------------------------------------------------------


def test_an_estimate_says_what_is_sure() -> None:
    sure = Estimate(copy=5000 * MIB, growth=2 * MIB, free=3 * MIB, rate=100 * MIB, rate_given=True)
    assert list(humanize.estimate(sure)) == [
        "copies  4.9 GiB, 50 s at 100 MiB/s (as given)",
        "space   the base grows by up to 2 MiB; 3 MiB free",
    ]
    assert list(humanize.estimate(Estimate(copy=0, growth=MIB, at_least=True))) == [
        "copies  at least 0 B, less than 1 s at 200 MiB/s (assumed)",
        "space   the base grows by up to 1 MiB and what the guest writes meanwhile",
    ]
    space = [list(humanize.estimate(Estimate(copy=0, growth=0, at_least=live)))[1] for live in (True, False)]
    assert space == ["space   the base grows by what the guest writes meanwhile", "space   the base does not grow"]
    assert list(humanize.estimate(Estimate(reason="it is far"))) == ["copies  not known: it is far"]
