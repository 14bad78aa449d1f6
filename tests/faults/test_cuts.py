"""Which states a power cut can leave."""

import random

from faults import cuts
from faults.cuts import State
from faults.log import Operation


def write(file: str, offset: int, data: bytes) -> Operation:
    return Operation(file, "write", offset, len(data), data)


def flush(file: str) -> Operation:
    return Operation(file, "flush")


def contents(images: dict[str, bytes], operations: list[Operation]) -> set[tuple[bytes, ...]]:
    states = cuts.states(operations, random.Random(1), 1000)
    return {tuple(cuts.after(images, operations, state).values()) for state in states}


def test_unflushed_writes_may_be_missing_in_any_subset() -> None:
    operations = [write("a", 0, b"1"), write("a", 1, b"2")]
    assert contents({"a": b".."}, operations) == {(b"..",), (b"1.",), (b".2",), (b"12",)}


def test_a_flush_keeps_what_was_written_to_its_own_file_before_it() -> None:
    operations = [write("a", 0, b"1"), write("b", 0, b"1"), flush("a"), write("a", 0, b"2")]
    found = contents({"a": b".", "b": b"."}, operations)
    assert found == {(a, b) for a in (b".", b"1") for b in (b".", b"1")} | {(b"2", b"."), (b"2", b"1")}
    at_the_end = [state for state in cuts.states(operations, random.Random(1), 1000) if state.length == 4]
    assert all(0 not in state.missing for state in at_the_end)


def test_a_failed_flush_keeps_nothing() -> None:
    failed = Operation("a", "flush", failed=True)
    assert contents({"a": b"."}, [write("a", 0, b"1"), failed, write("a", 0, b"2")]) == {(b".",), (b"1",), (b"2",)}


def test_files_grow_and_shrink() -> None:
    operations = [write("a", 3, b"1"), Operation("a", "truncate", 2), Operation("a", "zero", 0, 1)]
    assert cuts.after({"a": b"xx"}, operations, State(1, ())) == {"a": b"xx\0001"}
    assert cuts.after({"a": b"xx"}, operations, State(3, ())) == {"a": b"\0x"}
    assert cuts.after({"a": b"xx"}, operations, State(2, (0,))) == {"a": b"xx"}


def test_of_many_a_sample_is_taken_the_same_for_a_seed() -> None:
    operations = [write("a", place, b"1") for place in range(30)]
    first, second = (list(cuts.states(operations, random.Random(7), 24)) for _ in range(2))
    assert first == second
    assert 20 < len(first) < 60
    missing = {state.missing for state in first}
    assert {(), tuple(range(30)), (29,)} <= missing
