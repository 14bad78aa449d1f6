"""What a reply must look like, and that every real one does."""

from pathlib import Path
from typing import Any

import pytest

from qmpmerge.errors import BadReply
from qmpmerge.qemu import reply
from qmpmerge.recording import exchanges, reading

STRIPS = sorted((Path(__file__).parents[2] / "fixtures").glob("qemu-*/*.jsonl"))


def test_every_recorded_reply_has_its_shape() -> None:
    seen = set()
    for strip in STRIPS:
        for run in reading.read(str(strip)).runs:
            for one in exchanges.paired(run.lines):
                if isinstance(one, exchanges.Exchange) and one.name in reply.SHAPES and one.answer is not None:
                    reply.see(str(strip), one.name, one.answer["return"])
                    seen.add((strip.parent, one.name))
    assert len({version for version, _ in seen}) >= 2 and len({name for _, name in seen}) > 3


JOB = {"id": "j", "type": "commit", "status": "running", "current-progress": 1, "total-progress": 2}


@pytest.mark.parametrize(
    ("command", "value", "words"),
    [
        ("query-status", {"status": "running"}, "running is missing"),
        ("query-status", {"status": "running", "running": 1}, "running is 1, neither true nor false"),
        ("query-status", None, "it is null, no object"),
        ("query-jobs", {}, "it is {}, no list"),
        ("query-jobs", [JOB, {**JOB, "id": ["j"]}], '[1].id is ["j"], no text'),
        ("query-jobs", [{**JOB, "total-progress": -1}], "[0].total-progress is -1, no number of 64 bits"),
        ("query-jobs", [{**JOB, "total-progress": 2**64}], f"[0].total-progress is {2**64}, no number of 64 bits"),
        ("query-jobs", [{**JOB, "total-progress": True}], "[0].total-progress is true, no number of 64 bits"),
        ("query-jobs", [{**JOB, "total-progress": 1.0}], "[0].total-progress is 1.0, no number of 64 bits"),
        ("query-jobs", [{**JOB, "error": None}], "[0].error is null, no text"),
        ("query-jobs", [{**JOB, "id": "a\0b"}], '[0].id is "a\\u0000b", no text'),
        ("query-jobs", [{**JOB, "id": "\ud800"}], '[0].id is "\\ud800", no text'),
        ("x-debug-query-block-graph", {"nodes": [], "edges": [{}]}, "edges[0].parent is missing"),
    ],
)
def test_what_has_another_shape_is_told_with_its_place(command: str, value: Any, words: str) -> None:
    with pytest.raises(BadReply) as error:
        reply.see("vm", command, value)
    assert error.value.facts == {"target": "vm", "command": command, "came": words}
    assert error.value.exit_code == 6


def test_what_may_be_missing_and_what_is_not_read_does_not_matter() -> None:
    reply.see("vm", "query-jobs", [{**JOB, "more": object()}, {**JOB, "id": "grün", "error": "No space"}])
    reply.see("vm", "stop", object())


@pytest.mark.parametrize(
    "value", ["\x1b[2J\n\x7f\x9b\u202e\ud800", "x" * 10_000, [[[]]] * 1000, 10**300, float("nan"), {1}]
)
def test_what_came_is_shown_short_and_without_control_characters(value: Any) -> None:
    text = reply.shown(value)
    assert text.isprintable() and text.isascii() and 0 < len(text) < 250


@pytest.mark.parametrize(
    "error", [KeyError(7), IndexError(), ValueError("\x1b"), TypeError(), AttributeError(), RecursionError()]
)
def test_parts_that_do_not_go_together_are_a_bad_reply(error: Exception) -> None:
    with pytest.raises(BadReply, match="parts that do not go together") as raised, reply.making_sense("vm", "query-x"):
        raise error
    assert str(raised.value).isprintable()
