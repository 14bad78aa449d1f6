"""What a `tidy` came to: of each disk what is its own, and once what is the same of many."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qmpmerge.cli.render import humanize
from qmpmerge.cli.render import outcome as merge

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Outcome
    from qmpmerge.errors import Error
    from qmpmerge.operations.tidy import Tidied

ALIKE = ("cancelled", "postponed")
"""Verdicts that many disks come to at once, for the same reason."""


def is_alike(one: "Tidied") -> bool:
    """Whether it is told together with all others that ended so."""
    return one.verdict in ALIKE


def takes(outcome: "Outcome") -> Iterator[str]:
    """Of a plan the files and bytes, as the dry run of `commit` has them."""
    if outcome.verdict == "planned":
        yield from merge.files(outcome.merged, planned=True)
        if outcome.estimate is not None:
            yield from humanize.estimate(outcome.estimate)


def alike(done: "Sequence[Tidied]") -> Iterator[tuple["Error", str]]:
    """Each error of many alike, and the names of those: ``vm1 vda, vm1 vdb and 38 more``."""
    found: dict[str, list[Tidied]] = {}
    for one in filter(is_alike, done):
        found.setdefault(f"{one.verdict} {one.error}", []).append(one)
    for entries in found.values():
        if entries[0].error is not None:
            yield entries[0].error, _names(entries)


def unpassed(done: "Sequence[Tidied]") -> Iterator[str]:
    """What was not looked at, and of which disks."""
    found: dict[str, list[Tidied]] = {}
    for one in done:
        for line in merge.unpassed(one.outcome.checks if one.outcome is not None else ()):
            found.setdefault(line, []).append(one)
    for line, entries in found.items():
        yield f"{_names(entries)}: {line}"


def summary(done: "Sequence[Tidied]") -> str:
    """``40 disks: 38 merged, 1 failed, 1 refused; not looked at: vm9``; not of those of which that was told."""
    counted = Counter(one.verdict for one in done if one.disk is not None)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common())
    count = counted.total()
    told = f"{count} disk{'' if count == 1 else 's'}{f': {verdicts}' if verdicts else ''}"
    missed = [one.target for one in done if one.disk is None and not is_alike(one)]
    return f"{told}; not looked at: {', '.join(missed)}" if missed else told


def _names(entries: "Sequence[Tidied]") -> str:
    """The first two by name, and how many more."""
    names = sorted(humanize.name(one.target, one.disk) for one in entries)
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more"
