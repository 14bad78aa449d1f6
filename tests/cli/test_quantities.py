"""Sizes and times in all spellings that people use, and what is no size and no time."""

import click
import pytest
from rig.command import invoke

from qmpmerge.cli.quantities import Duration, Size

MIB = 1024 * 1024

SIZES = {
    "0": 0,
    "4096": 4096,
    "512B": 512,
    "64K": 65536,
    "64k": 65536,
    "64kB": 65536,
    "64KiB": 65536,
    **dict.fromkeys(("64M", "64m", "64MB", "64mb", "64MiB", "64 MiB", "64 MiB/s", "64M/s", "65536K"), 64 * MIB),
    "1.5G": 1536 * MIB,
    **dict.fromkeys(("0.1", "0.9B", "0.0001K"), 1),  # and not 0, which is no limit
    "1.5 GiB": 1536 * MIB,
    "2T": 2 * 1024**4,
    "100 MB/s": 100 * MIB,
    "7 B/s": 7,
}

TIMES = {
    **dict.fromkeys(("90", "90s", "90 s", "90sec", "90 seconds", "1m30s", "1 min 30 s", "1.5m", "1.5 min"), 90.0),
    **dict.fromkeys(("1h30m", "1h 30m", "1.5h", "90min", "90 minutes", "1 hour 30 minutes"), 5400.0),
    **dict.fromkeys(("2d", "2 days", "2days", "48h", "1d24h"), 172800.0),
    "7d": 604800.0,
    "1w": 604800.0,
    "2 weeks": 1209600.0,
    "500ms": 0.5,
    "0.5": 0.5,
    "0": 0.0,
}


@pytest.mark.parametrize("text", SIZES)
def test_a_size(text: str) -> None:
    assert Size().convert(text, None, None) == SIZES[text]


@pytest.mark.parametrize(
    "text", ["", "M", "64X", "64 M B", "1e6", "-1", "0x10", "1,5G", "64MM", "64/s/s", "1_000", "8E"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="as in 64M"):
        Size().convert(text, None, None)


@pytest.mark.parametrize("text", ["100Mb", "100Mb/s", "100 Mbit", "100Mbps", "1Gb/s"])
def test_bits_are_not_taken_for_bytes(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


@pytest.mark.parametrize("text", TIMES)
def test_a_time(text: str) -> None:
    assert Duration().convert(text, None, None) == TIMES[text]


@pytest.mark.parametrize(
    "text", ["", "m", "10x", "1h30", "1:30", "PT10M", "-1", "1e3", "10 m m", "1,5h", "m10", "1h,30m"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(click.BadParameter, match="as in 10m"):
        Duration().convert(text, None, None)


@pytest.mark.parametrize("text", ["6M", "6 M", "1H", "3D"])
def test_months_are_not_taken_for_minutes(text: str) -> None:
    """`clean --older-than 6M` would remove all that is older than six minutes."""
    with pytest.raises(click.BadParameter):
        Duration().convert(text, None, None)


@pytest.mark.parametrize("text", ["0", "0m", "0.0 s"])
def test_no_time_at_all_can_be_too_short(text: str) -> None:
    assert Duration().convert(text, None, None) == 0
    with pytest.raises(click.BadParameter, match="too short"):
        Duration(positive=True).convert(text, None, None)


def test_an_age_has_a_unit() -> None:
    assert Duration(with_unit=True).convert("7 d", None, None) == 604800
    with pytest.raises(click.BadParameter, match="write 7d for days"):
        Duration(with_unit=True).convert("7", None, None)


@pytest.mark.parametrize("text", ["9" * 5000, "1m" * 5000 + "!", "1 " * 5000, "1." + "9" * 4000, "9" * 19 + "w"])
def test_long_words_are_refused_at_once(text: str) -> None:
    for kind in (Size(), Duration()):
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["commit", "nope", "--speed", "100Mb"], "--speed"),
        (["commit", "nope", "--timeout", "6M"], "--timeout"),
        (["commit", "nope", "--converge-pause", "1:30"], "--converge-pause"),
        (["job", "nope", "x", "follow", "--timeout", "6M"], "--timeout"),
        (["clean", ".", "--older-than", "6M"], "--older-than"),
        (["job", "nope", "x", "speed", "100Mb"], "SIZE"),
    ],
)
def test_the_same_words_everywhere(words: list[str], option: str) -> None:
    told = invoke(*words)
    assert (told.code, option in told.err) == (2, True), told.err
