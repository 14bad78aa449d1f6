"""
Ranges of bytes: joined, widened and narrowed to whole blocks, and taken from one another.
"""

from collections.abc import Iterable, Sequence

Range = tuple[int, int]
"""First byte, and the byte behind the last."""


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes, in order and apart."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif start < end:
            found.append((start, end))
    return found


def aligned(ranges: Iterable[Range], step: int) -> list[Range]:
    """The ranges made wide enough to begin and end at multiples of `step`."""
    return joined((down(start, step), up(end, step)) for start, end in ranges)


def without(ranges: Iterable[Range], taken: Sequence[Range]) -> list[Range]:
    """What is left of `ranges` without `taken`; both in order, and without what they have in common with themselves."""
    left: list[Range] = []
    place = 0
    for begin, end in ranges:
        start = begin
        while place < len(taken) and taken[place][1] <= start:
            place += 1
        number = place
        while number < len(taken) and taken[number][0] < end:
            if taken[number][0] > start:
                left.append((start, taken[number][0]))
            start = max(start, taken[number][1])
            number += 1
        if start < end:
            left.append((start, end))
    return left


def common(one: Sequence[Range], other: Sequence[Range]) -> list[Range]:
    """What both have."""
    return without(one, without(one, other))


def length(ranges: Iterable[Range]) -> int:
    """Their bytes."""
    return sum(end - start for start, end in ranges)


def down(place: int, step: int) -> int:
    """The multiple of `step` at or before it."""
    return place // step * step


def up(place: int, step: int) -> int:
    """The multiple of `step` at or behind it."""
    return -(-place // step) * step
