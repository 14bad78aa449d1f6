"""
Sizes and times, as people write them.

A unit that means two things is refused where the wrong one would do harm: ``Mb`` (megabits) and a time in ``M`` (months).
"""

import math
import re

import click

LONGEST_SECONDS = 1e9
"""Thirty years; the timers of Python and of the kernel cannot be set to any time."""

_NUMBER = r"\d{1,19}(?:\.\d{1,19})?"
_SIZE = rf"({_NUMBER}) ?(?:([KkMGT])(?:i?B)?|([kmgt])(?:i?b)?|B)?(?:/s)?"
POWERS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}

_SECONDS = {
    "ms": 0.001,
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
    **dict.fromkeys(("w", "week", "weeks"), 604800),
}
_PART = rf"({_NUMBER}) ?([a-z]+) ?"


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks alone
    """Bytes, or a number with a unit: ``64M``, ``64MB`` and ``64MiB`` are the same, as QEMU counts; ``/s`` may follow."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """``64M`` is 67108864."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(_SIZE, str(value).strip(" "), re.ASCII)
        size = -1
        if match:
            number, unit = match[1], POWERS[(match[2] or match[3] or "").upper()]
            size = math.ceil(float(number) * unit) if "." in number else int(number) * unit  # 0 is no limit
        if not 0 <= size < 1 << 63:  # QMP's int
            self.fail(f"{value!r} is no size: write bytes, or a number with K, M, G or T, as in 64M", param, ctx)
        return size


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks alone
    """Seconds, or numbers with units: ``90``, ``10m``, ``1h30m``. `positive` takes no 0, `with_unit` no bare number."""

    name = "time"

    def __init__(self, *, positive: bool = False, with_unit: bool = False) -> None:
        self._positive = positive
        self._with_unit = with_unit

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``7d`` is 604800."""
        if isinstance(value, float):
            return value
        text = str(value).strip(" ")
        seconds = _seconds(text)
        if not 0 <= seconds <= LONGEST_SECONDS:
            self.fail(f"{value!r} is no time: write seconds, or a number with s, m, h or d, as in 10m", param, ctx)
        if self._with_unit and text[-1].isdigit():
            self.fail(f"{value!r} has no unit: write {text}d for days, or s, m or h", param, ctx)
        if self._positive and seconds == 0:
            self.fail("no time at all is too short", param, ctx)
        return seconds


def _seconds(text: str) -> float:
    """NaN for what is no time."""
    if re.fullmatch(_NUMBER, text, re.ASCII):
        return float(text)
    parts = re.findall(_PART, text, re.ASCII) if re.fullmatch(rf"(?:{_PART})+", text, re.ASCII) else []
    return sum(float(number) * _SECONDS.get(unit, math.nan) for number, unit in parts) if parts else math.nan
