"""The other direction is as short a chain, of the same images, whatever is asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.other_way import other_way, sparing
from qmpmerge.chain.plan import Plan

NAMES = "abcde"


def linear(count: int, sizes: tuple[int, ...] = ()) -> Chain:
    below = [None, *NAMES]
    sizes = sizes or (8,) * count
    images = zip(NAMES[:count], below, sizes, strict=False)
    return Chain(tuple(Image(f"/vm/{name}", "qcow2", size, backing=under) for name, under, size in images))


def letters(chain: Chain) -> str:
    return "".join(image.name for image in chain)


@pytest.mark.parametrize(
    ("planned", "other"),
    [
        (plan.commit(linear(4)), "d"),
        (plan.commit(linear(4), base="2"), "ad"),
        (plan.commit(linear(4), shallow=True), "abd"),
        (plan.commit(linear(4), top="3"), "ad"),
        (plan.commit(linear(5), base="2", top="3"), "abde"),
        (plan.pull(linear(4)), "a"),
        (plan.pull(linear(4), base="1"), "ab"),
        (plan.pull(linear(4), top="3"), "ad"),
        (plan.pull(linear(4), shallow=True), "abc"),
    ],
)
def test_the_chain_afterwards(planned: Plan, other: str) -> None:
    assert letters(other_way(planned).result) == other


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    chain = linear(draw(st.integers(2, 5)))
    base = draw(st.integers(0, len(chain) - 2))
    top = draw(st.integers(base + 1, len(chain) - 1))
    commits = draw(st.booleans())
    return plan.between("commit", chain, base + 1, top + 1) if commits else plan.between("pull", chain, base, top)


@given(plans())
def test_it_gets_as_short_and_is_the_other_direction(planned: Plan) -> None:
    other = other_way(planned)
    assert (len(other.result), other.direction != planned.direction) == (len(planned.result), True)
    assert other.is_empty is False


@given(plans())
def test_a_merge_writes_to_nothing_that_the_pull_leaves_alone(planned: Plan) -> None:
    if planned.direction == "pull":
        assert planned.base not in other_way(planned).written


@given(plans())
def test_sparing_changes_what_no_image_shows_and_keeps_base_where_it_can(planned: Plan) -> None:
    spared = sparing(planned)
    assert spared.direction == "pull" and not spared.is_empty and not spared.changed
    nothing_between = planned.pivots and len(planned.merged) == 1
    assert nothing_between or spared.base == planned.base


def test_sparing_pulls_all_where_a_shorter_layer_stands_in_the_way() -> None:
    assert letters(sparing(plan.commit(linear(4, (8, 4, 8, 8)))).result) == "d"
