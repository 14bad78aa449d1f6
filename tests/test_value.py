"""A value is a frozen dataclass in all that can be seen of it, and its class takes next to no time to make."""

import ast
import copy
import inspect
import pickle
from abc import ABC, abstractmethod
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

import qmpmerge
from qmpmerge.value import Value


class Plan(Value, ABC):
    """What both have."""

    name: str
    tags: list[str] = field(default_factory=list)
    seen: int = field(default=0, compare=False, repr=False)

    @cached_property
    def longest(self) -> str:
        return max(self.tags, key=len)

    @property
    @abstractmethod
    def kind(self) -> str: ...


class Commit(Plan):
    """With a field more, and something that must hold."""

    depth: int = 1
    kind = "commit"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("no name")


class Pull(Commit):
    """Equal fields, and another thing."""


@dataclass(frozen=True)
class Real:
    """What `Commit` would be."""

    name: str
    tags: list[str] = field(default_factory=list)
    seen: int = field(default=0, compare=False, repr=False)
    depth: int = 1


@pytest.mark.parametrize(
    "given, named", [(("a",), {}), (("a", ["b"], 2, 3), {}), (("a",), {"depth": 5}), ((), {"seen": 1, "name": "a"})]
)
def test_it_is_made_shown_and_taken_apart_as_a_dataclass(given: tuple[Any, ...], named: dict[str, Any]) -> None:
    ours, real = Commit(*given, **named), Real(*given, **named)
    assert asdict(ours) == asdict(real) and repr(ours) == repr(real).replace("Real", "Commit")
    assert [(one.name, one.default) for one in fields(ours)] == [(one.name, one.default) for one in fields(real)]
    assert Commit.__match_args__ == Real.__match_args__
    assert asdict(replace(ours, depth=9)) == asdict(replace(real, depth=9))
    assert Commit("a").tags is not Commit("a").tags
    assert inspect.signature(Commit) == inspect.signature(Real) and "depth: int = 1" in str(inspect.signature(Commit))


@pytest.mark.parametrize(
    "given, named, said",
    [
        ((), {}, "name is missing"),
        (("a", [], 0, 1, 2), {}, "given 5"),
        (("a",), {"name": "b"}, "given 1 and name"),
        (("a",), {"other": 1}, "and other"),
        (("a", []), {"tags": [], "other": 1}, "tags, other"),
        ((), {"other": 1}, "other"),
    ],
)
def test_what_does_not_fit_is_a_type_error(given: tuple[Any, ...], named: dict[str, Any], said: str) -> None:
    for kind in (Commit, Real):
        with pytest.raises(TypeError) as raised:
            kind(*given, **named)
        assert kind is Real or said in str(raised.value)


def test_it_is_equal_by_what_is_compared_and_only_to_its_own_kind() -> None:
    one = Commit("a", seen=1)
    assert one == Commit("a", seen=2) != Commit("b", seen=2)
    assert one != Pull("a", seen=1) and one != "a"
    assert hash(Number(1, "x")) == hash(Number(1, "y")) and {Number(1, "x"), Number(1, "y"), Number(2)} == {
        Number(1),
        Number(2),
    }


class Number(Value):
    """With one field that counts."""

    number: int
    note: str = field(default="", compare=False)


def test_it_cannot_be_changed_and_keeps_what_must_hold() -> None:
    one: Any = Commit("a", ["b", "cc"])
    for name in ("name", "longest", "new"):
        with pytest.raises(FrozenInstanceError):
            setattr(one, name, "x")
    with pytest.raises(FrozenInstanceError):
        del one.name
    for make in (lambda: Commit(""), lambda: replace(one, name="")):
        with pytest.raises(ValueError, match="no name"):
            make()
    assert one.longest == "cc" == vars(one)["longest"] and one == Commit("a", ["b", "cc"])
    with pytest.raises(TypeError, match="abstract"):
        Plan("a")  # type: ignore[abstract]


def test_a_caller_makes_more_of_it_without_a_decorator() -> None:
    """Fields, signature and the rest are as of ours; `dataclass` would make methods of its own, for what can be assigned to."""

    class Rated(qmpmerge.MergedFile):
        """With a field more."""

        rating: int = 0

    assert Rated("/vm/a.qcow2", rating=3) == replace(Rated("/vm/a.qcow2"), rating=3) != Rated("/vm/a.qcow2")
    assert str(inspect.signature(Rated)).endswith("rating: int = 0) -> None")
    with pytest.raises(TypeError, match="frozen"):
        dataclass(frozen=True)(Rated)
    with pytest.raises(FrozenInstanceError):
        dataclass(Rated)("/vm/a.qcow2")


def test_it_can_be_copied_and_sent_to_another_process() -> None:
    one = Commit("a", ["b"], 7)
    for other in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other == one and other.seen == 7 and type(other) is Commit


def test_no_other_frozen_dataclass_is_made_at_start_up() -> None:
    """Each takes twenty times as long; seventy of them were a sixth of the time of a merge's dry run."""
    frozen = [
        f"{file.name}: {node.name}"
        for file in Path(qmpmerge.__file__).parent.rglob("*.py")
        if file.parent.name != "testing"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
        and any("dataclass" in ast.unparse(one) and "frozen" in ast.unparse(one) for one in node.decorator_list)
    ]
    assert frozen == ["value.py: Value"]
