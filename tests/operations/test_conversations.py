"""
Whatever a QEMU says in one place of a conversation: no traceback, no wrong verdict, nothing lost, and a way to go on.

The conversations are real ones with a real QEMU, but for the one message; a thousand of them are a case of `scripts/faults`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import conversations
from rig.conversations import CHANGING, LOOKING, SCENES, Found, Scene, Stage, Stock, Told
from rig.liar import LIES

LIES_A_SCENE = 5
BY_NAME = {scene.name: scene for scene in SCENES}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return Stock.make(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def stage(stock: Stock, tmp_path: Path) -> Iterator[Stage]:
    with conversations.staged(stock, tmp_path / "own", runs=True, known=True) as stage:
        yield stage


def lies(scene: Scene) -> list[str]:
    """Other ones for each scene, all of them in turn; `scripts/faults FQ` takes each of them everywhere."""
    names, first = list(LIES), SCENES.index(scene) * LIES_A_SCENE
    return [names[number % len(names)] for number in range(first, first + LIES_A_SCENE)]


@pytest.mark.parametrize("scene", CHANGING, ids=lambda scene: scene.name)
def test_one_wrong_word_in_a_merge(scene: Scene, stock: Stock, tmp_path: Path) -> None:
    with conversations.staged(stock, tmp_path / "plain", runs=True, known=True) as stage:
        plain, found = conversations.judged(stage, scene)
    assert plain.run.code == 0 and not found, found.lines()
    lied, chosen = 0, lies(scene)[::2]
    for number, lie in enumerate(chosen):
        _, at = conversations.choose(plain.liar.told, number)
        place = tmp_path / str(number)
        with conversations.staged(stock, place, runs=number % 3 != 0, known=number % 2 == 0) as stage:
            told, wrong = conversations.judged(stage, scene, lie, at, number)
        lied += bool(told.liar.lied)
        found.add(wrong)
    assert not found, "\n".join(found.lines())
    assert lied > len(chosen) / 2


@pytest.mark.parametrize("known", [True, False], ids=["pid", "no-pid"])
def test_one_wrong_word_while_looking(known: bool, stock: Stock, tmp_path: Path) -> None:
    found, lied = Found(), 0
    with conversations.staged(stock, tmp_path / "own", runs=True, known=known) as stage:
        for scene in LOOKING:
            plain, wrong = conversations.judged(stage, scene)
            assert plain.run.code == 0 and not wrong, wrong.lines()
            for number, lie in enumerate(lies(scene)[known::2]):
                _, at = conversations.choose(plain.liar.told, number)
                told, wrong = conversations.judged(stage, scene, lie, at, number)
                lied += bool(told.liar.lied)
                found.add(wrong)
    assert not found, "\n".join(found.lines())
    assert lied > len(LOOKING)


# --- each in its place -------------------------------------------------------------------------------------------------


def told(stage: Stage, scene: str, lie: str, of: str, since: str = "", at: int = 1) -> Told:
    """What became of a command that was lied to; whatever it was, all is as it must be, and another one ends it."""
    told, found = conversations.judged(stage, BY_NAME[scene], lie, at, seed=1, of=of, since=since)
    assert told.as_json and told.liar.lied, "nobody lied"
    assert not found, found.lines()
    return told


@pytest.mark.parametrize("of", ["query-jobs", "query-block", "query-named-block-nodes", "query-status"])
def test_an_error_where_none_was_expected_is_a_refusal_before_anything_is_begun(stage: Stage, of: str) -> None:
    refused = told(stage, "middle", "generic-error", of)
    assert refused.error["name"] == "qemu-refused" and refused.error["facts"]["command"] == of
    assert refused.run.code == 3


@pytest.mark.parametrize("of", ["query-jobs", "query-block", "query-named-block-nodes"])
def test_an_error_where_none_was_expected_is_unknown_once_a_job_was_begun(stage: Stage, of: str) -> None:
    lost = told(stage, "middle", "generic-error", of, since="block-commit")
    assert (lost.error["name"], lost.run.code) == ("not-proven", 6)


@pytest.mark.parametrize("scene", ["middle", "active"])
def test_a_reply_that_cannot_be_decoded_is_asked_for_again_in_a_new_session(scene: str, stage: Stage) -> None:
    merged = told(stage, scene, "null", "query-jobs", since="block-commit")
    assert merged.run.code == 0 and merged.liar.told.count("greeting") == 2


def test_a_reply_that_cannot_be_decoded_is_unknown_with_what_came(stage: Stage) -> None:
    bad = told(stage, "snapshot", "null", "query-status")
    assert (bad.error["name"], bad.run.code) == ("bad-reply", 6)
    assert bad.error["facts"]["command"] == "query-status" and "null" in bad.error["facts"]["came"]


def test_a_job_that_was_refused_and_is_there_is_not_called_refused(stage: Stage) -> None:
    lost = told(stage, "middle", "generic-error", "block-commit")
    assert (lost.error["name"], lost.run.code) == ("not-proven", 6)


def test_an_overlay_that_qemu_uses_is_not_removed_whatever_it_says(stage: Stage) -> None:
    lost = told(stage, "snapshot", "generic-error", "transaction")
    assert (lost.error["name"], lost.run.code) == ("not-proven", 6)
    assert (stage.folder / "d.qcow2").exists() and "d.qcow2" in stage.chain


def test_a_pause_whose_reply_is_an_error_ends_all_the_same(stage: Stage) -> None:
    assert told(stage, "active", "generic-error", "stop").run.code == 6
    assert stage.status == "running"


@pytest.mark.parametrize("of", ["query-block-exports", "stop", "job-complete"])
def test_a_guest_whose_pause_outlives_its_session_runs_again_in_the_next(stage: Stage, of: str) -> None:
    assert told(stage, "active", "closed", of).run.code == 0
    assert stage.status == "running"


def test_a_session_that_ends_as_it_begins_is_none(stage: Stage) -> None:
    """Or was one, where the end comes in only with the first question."""
    assert told(stage, "jobs", "closed", "qmp_capabilities").run.code in (4, 6)
