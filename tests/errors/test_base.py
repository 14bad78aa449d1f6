"""The error tree: every error that a user can meet says what happened, what state the disks are in and what to do next."""

import copy
import json
import pickle
import re
import shlex
import subprocess
import sys
import traceback
import types
import typing
from typing import Any

import pytest
from pages.errors import concrete
from rig.command import invoke

from qmpmerge.errors import (
    EXIT_CODES,
    WORST,
    BaseIsTop,
    Cancelled,
    Error,
    Failed,
    NoSuchDisk,
    Postponed,
    RecordLeft,
    Refused,
    SessionLost,
    SeveralRefusals,
    ShorterLayer,
    StillRunning,
    TimedOut,
    TimeUp,
    Unknown,
    Unreachable,
    Untouched,
    worst,
)

PLACEHOLDER = re.compile(r"\{\w*(:\w*)?\}")


CONCRETE = concrete()
every_error = pytest.mark.parametrize("kind", CONCRETE, ids=lambda kind: kind.__name__)

EXAMPLES: dict[object, Any] = {
    str: "words",
    int: 7,
    float: 0.5,
    bool: True,
    list[str]: ["one", "two"],
    list[int]: [7, 8],
    list[Refused]: [BaseIsTop(base="/one"), BaseIsTop(base="/two")],
}


def example(kind: type[Error]) -> Any:
    """An error of this kind with a fact of the right type in every field."""
    hints = typing.get_type_hints(kind)
    facts = {name: _value(name, hints[name]) for name in kind.fact_names}
    return kind(**facts)


def _value(name: str, declared: object) -> object:
    options = [option for option in typing.get_args(declared) if option is not types.NoneType]
    if isinstance(declared, types.UnionType):
        declared = options[0]
    value = EXAMPLES[declared]
    return f"the-{name}" if declared is str else value


def test_the_tree_was_found() -> None:
    assert {ShorterLayer, StillRunning, Cancelled} < set(CONCRETE)
    assert len(CONCRETE) >= 40


# --- each of them -------------------------------------------------------------------------------------------------


@every_error
def test_an_error_takes_its_facts_and_nothing_else(kind: type[Error]) -> None:
    with pytest.raises(TypeError, match="unexpected"):
        kind(nonsense=1)
    if kind.fact_names:
        with pytest.raises(TypeError, match="missing"):
            kind()
    assert kind.__doc__ and not kind.__doc__.startswith(kind.__name__ + "("), "a docstring of its own"


@every_error
def test_an_error_is_told_apart_by_identity_and_can_be_a_key(kind: type[Error]) -> None:
    one, two = example(kind), example(kind)
    assert one != two and len({one, two}) == 2


@every_error
def test_an_error_is_a_sentence_with_its_facts_in_it(kind: type[Error]) -> None:
    said = str(example(kind))
    assert said and not PLACEHOLDER.search(said)
    assert not said.endswith((".", "!", " ")) and "\n" not in said and "  " not in said


@every_error
def test_an_error_says_what_to_do_next(kind: type[Error]) -> None:
    hint = example(kind).hint
    assert hint and not PLACEHOLDER.search(hint)
    assert not hint.endswith((".", "!", " ")) and "\n" not in hint and "  " not in hint
    assert hint.count("`") % 2 == 0, "commands stand in backticks"


TYPED = {"option", "command", "cure", "pull", "below"}
"""Facts that are words for a shell already."""


@every_error
def test_commands_in_a_hint_can_be_typed_whatever_the_facts_are(kind: type[Error]) -> None:
    """Each fact in a command is a word of it, or a part of one."""
    error = example(kind)
    for name, fact in error.facts.items():
        if isinstance(fact, str) and name not in TYPED:
            setattr(error, name, f"the {name}'s $(x)")
    if isinstance(error, SessionLost):
        error.image = ""  # else its hint is another one
    commands = [part for part in kind.advice.split("`")[1::2] if "{" in part]
    typed = [shlex.split(part) for part in error.hint.split("`")[1::2]]
    for command in commands:
        names = [
            name
            for name in kind.fact_names
            if f"{{{name}}}" in command and isinstance(getattr(error, name), str) and name not in TYPED
        ]
        wanted = [getattr(error, name) for name in names]
        assert any(all(any(one in word for word in words) for one in wanted) for words in typed), (command, typed)


@every_error
def test_an_error_mentions_every_fact_that_is_text(kind: type[Error]) -> None:
    error = example(kind)
    unsaid = [
        fact
        for name, fact in error.facts.items()
        if isinstance(fact, str) and fact not in f"{error} {error.hint}" and name not in ALLOWED_SILENT
    ]
    assert not unsaid


ALLOWED_SILENT = {"target"}
"""The user has just typed it."""


@every_error
def test_an_error_has_a_verdict_with_an_exit_code(kind: type[Error]) -> None:
    assert kind.verdict in EXIT_CODES
    assert example(kind).exit_code == EXIT_CODES[kind.verdict] != 0


@every_error
def test_the_facts_survive_json(kind: type[Error]) -> None:
    facts = example(kind).facts
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == set(kind.fact_names)


@every_error
def test_braces_in_a_fact_are_left_alone(kind: type[Error]) -> None:
    error = example(kind)
    for name, fact in error.facts.items():
        if isinstance(fact, str):
            setattr(error, name, "{target} {0} {")
    assert str(error) and error.hint  # a name with braces is no format string


@every_error
def test_an_error_shows_its_facts(kind: type[Error]) -> None:
    shown = repr(example(kind))
    assert shown.startswith(f"{kind.__name__}(") and shown.endswith(")")
    assert all(f"{name}=" in shown for name in kind.fact_names)


@every_error
def test_a_copy_says_the_same(kind: type[Error]) -> None:
    error = example(kind)
    error.add_note("seen in a test")
    for other in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is kind and other is not error
        assert (repr(other), str(other), other.document) == (repr(error), str(error), error.document)
        assert other.__notes__ == error.__notes__
    assert copy.copy(error).__notes__[-1] == "seen in a test"


@every_error
def test_a_traceback_ends_with_the_hint_and_what_was_noted_besides(kind: type[Error]) -> None:
    error = example(kind)
    error.add_note("seen in a test")
    *_, hint, noted = "".join(traceback.format_exception(error)).splitlines()
    assert (hint, noted) == (f"hint: {error.hint}", "seen in a test")


def test_the_command_shows_a_hint_once() -> None:
    said = invoke("disks", "/nowhere/monitor")
    assert said.code == 4 and said.err.count("hint: ") == 1 and said.err.count("qmpmerge vms") == 1


# --- all of them --------------------------------------------------------------------------------------------------


def test_names_are_kebab_case_and_no_two_errors_share_one() -> None:
    names = [example(kind).name for kind in CONCRETE]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)
    assert example(ShorterLayer).name == "shorter-layer"


@pytest.mark.parametrize(
    ("branch", "codes"),
    [(Refused, {3}), (Unreachable, {4}), (Untouched, {3, 4}), (Failed, {5}), (Unknown, {6})],
)
def test_a_branch_says_in_which_state_the_disks_are(branch: type[Error], codes: set[int]) -> None:
    found = {example(kind).exit_code for kind in CONCRETE if issubclass(kind, branch)}
    assert found == codes


def test_every_error_is_on_exactly_one_branch() -> None:
    branches = (Refused, Unreachable, Failed, Unknown, StillRunning, Postponed, Cancelled)
    assert [kind for kind in CONCRETE if sum(issubclass(kind, branch) for branch in branches) != 1] == []
    assert (example(StillRunning).exit_code, example(Cancelled).exit_code) == (7, 130)


def test_the_exit_codes_are_those_of_the_design() -> None:
    assert {verdict for verdict, code in EXIT_CODES.items() if code == 0} >= {
        "merged",
        "pivoted",
        "pulled",
        "kept",
        "ready",
        "planned",
        "unchanged",
    }
    assert {verdict: code for verdict, code in EXIT_CODES.items() if code != 0} == {
        "refused": 3,
        "unreachable": 4,
        "failed": 5,
        "unknown": 6,
        "running": 7,
        "postponed": 7,
        "cancelled": 130,
    }


def test_the_worst_of_several_outcomes() -> None:
    assert set(WORST) == {1, *EXIT_CODES.values()}, "a usage error is found before there is any outcome"
    assert [worst(codes) for codes in ([], [0, 7], [130, 7], [4, 3], [0, 3, 5, 6], [6, 1])] == [0, 7, 130, 4, 6, 1]


def test_a_list_of_facts_is_read_as_words() -> None:
    assert NoSuchDisk(disk="x", target="vm1", known=["vda", "vdb"]).hint.endswith("vda, vdb")
    assert NoSuchDisk(disk="x", target="vm1", known=[]).hint.endswith("none")


def test_an_error_can_be_raised_again_with_other_facts() -> None:
    error = BaseIsTop(base="/b")
    assert error.facts == {"base": "/b", "is_lowest": False, "pulls": False} and "/b" in str(error)


def test_what_a_time_limit_raises_is_a_timeout_error() -> None:
    limits = {kind for kind in CONCRETE if issubclass(kind, TimeoutError)}
    assert {StillRunning, Postponed, TimeUp, TimedOut, RecordLeft} <= limits
    assert all(issubclass(kind, StillRunning | Postponed | TimeUp | TimedOut | RecordLeft) for kind in limits)
    assert str(example(StillRunning)) == "job the-job goes on in QEMU"  # and no errno is in it


ELSEWHERE = """
import pickle, sys
from qmpmerge.errors import BaseIsTop, SeveralRefusals, ShorterLayer
both = [BaseIsTop(base="/one"), ShorterLayer(image="a", size=1, base="b", base_size=2)]
sys.stdout.buffer.write(pickle.dumps(SeveralRefusals(refusals=both)))
"""


def test_an_error_comes_back_from_another_process() -> None:
    """Which has imported nothing else; `multiprocessing` would leave a process of its own behind in this one."""
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, check=True)
    error = pickle.loads(done.stdout)
    assert isinstance(error, SeveralRefusals)
    one, two = error.refusals
    assert (repr(one), repr(two)) == (
        "BaseIsTop(base='/one', is_lowest=False, pulls=False)",
        "ShorterLayer(image='a', size=1, base='b', base_size=2, instead='merge into an image above the short one')",
    )
