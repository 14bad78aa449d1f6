"""Ranges of bytes: joined, widened and narrowed, and taken from one another."""

from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.images import ranges
from qmpmerge.images.ranges import Range

some = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda one: (one[0], sum(one))), max_size=8)


def numbers(found: list[Range]) -> set[int]:
    return {number for start, end in found for number in range(start, end)}


@given(some)
def test_a_union_is_in_order_and_apart(given: list[Range]) -> None:
    joined = ranges.joined(given)
    assert numbers(joined) == numbers(given)
    assert ranges.length(joined) == len(numbers(given))
    assert all(earlier[1] < later[0] for earlier, later in zip(joined, joined[1:], strict=False))


@given(some, some)
def test_what_is_left_and_what_is_common(given: list[Range], taken: list[Range]) -> None:
    given, taken = ranges.joined(given), ranges.joined(taken)
    left, common = ranges.without(given, taken), ranges.common(given, taken)
    assert numbers(left) == numbers(given) - numbers(taken)
    assert numbers(common) == numbers(given) & numbers(taken)
    assert ranges.length([*left, *common]) == len(numbers(given))


@given(some, st.integers(1, 16))
def test_widened_to_whole_blocks(given: list[Range], step: int) -> None:
    blocks = {number // step for number in numbers(given)}
    assert numbers(ranges.aligned(given, step)) == {block * step + byte for block in blocks for byte in range(step)}
