"""
Power cuts: what may lie on the disks when a machine goes dark.

A write that no flush of its file has covered may have reached the disk or not, each on its own and in any order; one that
a flush has covered is there.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from faults.log import Operation

CHANGES = ("write", "zero", "truncate", "allocate")
"""What a cut can lose. A discard promises nothing about what is read afterwards; an allocation makes a file longer."""


@dataclass(frozen=True, order=True)
class State:
    """The first `length` operations, without those of the numbers `missing` (from 0)."""

    length: int
    missing: tuple[int, ...]

    def __str__(self) -> str:
        told = ", ".join(str(number + 1) for number in self.missing)
        return f"cut after {self.length}, without {told or 'none missing'}"


def states(operations: Sequence[Operation], chance: random.Random, most: int) -> Iterator[State]:
    """
    The states that any power cut can leave, each once.

    The set of unflushed operations is largest right before a flush and at the end; all that a cut in between can leave
    is a subset of that. Of sets with more than `most` subsets a sample is taken: none missing, all missing, each one
    missing, each one alone there, and random ones.
    """
    seen: set[frozenset[int]] = set()
    for length, operation in enumerate([*operations, None]):
        if operation is not None and (operation.kind != "flush" or operation.failed):
            continue
        pending = unflushed(operations[:length])
        present = frozenset(range(length)) - frozenset(pending)
        for missing in subsets(pending, chance, most):
            there = frozenset(
                number for number in (present | set(pending)) - set(missing) if operations[number].kind in CHANGES
            )
            if there not in seen:
                seen.add(there)
                yield State(length, missing)


def unflushed(operations: Sequence[Operation]) -> list[int]:
    """The numbers of the changes that no flush of their file has covered."""
    pending: dict[str, list[int]] = {}
    for number, operation in enumerate(operations):
        if operation.failed:
            continue
        if operation.kind == "flush":
            pending.pop(operation.file, None)
        elif operation.kind in CHANGES:
            pending.setdefault(operation.file, []).append(number)
    return sorted(number for numbers in pending.values() for number in numbers)


def subsets(pending: Sequence[int], chance: random.Random, most: int) -> Iterator[tuple[int, ...]]:
    """All subsets where they are few, else a sample of about `most`."""
    if 2 ** len(pending) <= most:
        for size in range(len(pending) + 1):
            yield from itertools.combinations(pending, size)
        return
    whole = tuple(pending)
    yield ()
    yield whole
    for number in pending[-(most // 3) :]:
        yield (number,)
        yield tuple(other for other in whole if other != number)
    for _ in range(most // 3):
        yield tuple(number for number in whole if chance.random() < 0.5)


def after(images: Mapping[str, bytes], operations: Sequence[Operation], state: State) -> dict[str, bytes]:
    """The images as they lie there in this state."""
    files = {name: bytearray(data) for name, data in images.items()}
    for number, operation in enumerate(operations[: state.length]):
        file = files.get(operation.file)
        if file is not None and number not in state.missing and not operation.failed:
            change(file, operation)
    return {name: bytes(data) for name, data in files.items()}


def change(file: bytearray, operation: Operation) -> None:
    end = operation.offset + operation.length
    match operation.kind:
        case "truncate":
            grown = max(0, operation.offset - len(file))
            file[operation.offset :] = bytes(grown)
        case "allocate":
            file.extend(bytes(max(0, end - len(file))))
        case "write" | "zero":
            file.extend(bytes(max(0, end - len(file))))
            file[operation.offset : end] = operation.data or bytes(operation.length)
        case _:
            pass
