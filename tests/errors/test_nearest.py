"""What a mistyped name was meant to be, and when nobody can tell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.errors.nearest import LONGEST, nearest, question, slips


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("VM1", ["vm1", "vm2"], "vm1"),
        ("vm1", ["VM1", "Vm1"], None),  # two that differ in case alone
        ("wbe", ["web", "db"], "web"),
        ("websrv", ["webserv", "db"], "webserv"),
        ("vdx", ["vda"], "vda"),
        ("vdx", ["vda", "vdb"], None),
        ("vm3", ["vm1", "vm2"], None),  # another number is another thing
        ("snap12", ["snap1", "snap2"], None),
        ("web", ["web1"], "web1"),
        ("web", ["web1", "web2"], None),
        ("web1", ["web"], None),
        ("base.qcow2", ["base.raw"], "base.raw"),
        ("x.qcow2", ["y.qcow2"], None),  # alike in what they end with alone
        ("ab", ["ac"], None),  # too short to be half right
        ("", ["a", "vda"], None),
        ("vda", [], None),
        ("nope", ["vda"], None),
        ("x" * 100_000, ["x" * (LONGEST + 1)], None),
        ("X" * (LONGEST + 1), ["x" * (LONGEST + 1)], "x" * (LONGEST + 1)),
    ],
)
def test_meant(word: str, known: list[str], meant: str | None) -> None:
    assert nearest(word, known) == meant


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "acb", 1), ("commit", "comit", 1), ("abc", "xyz", 3)],
)
def test_slips(one: str, other: str, count: int) -> None:
    assert slips(one, other) == slips(other, one) == count


letters = st.text("abC1.", max_size=8)


@given(letters, st.lists(letters, max_size=6))
def test_what_is_suggested_is_there_and_not_far_off(word: str, known: list[str]) -> None:
    found = nearest(word, known)
    assert found is None or found in known
    assert nearest(word.swapcase(), [word]) == word  # whatever it is


def test_a_question_can_be_typed() -> None:
    assert question("a b") == "did you mean `'a b'`? "
    assert question(None) == ""
