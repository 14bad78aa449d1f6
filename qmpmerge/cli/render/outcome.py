"""What a merge came to, in a few labelled lines."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qmpmerge.chain.chain import draw
from qmpmerge.cli.render import humanize

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Checked, MergedFile, Outcome

FATES = {
    "stash": "renamed to NAME.merged",
    "delete": "deleted",
    "gone": "gone already",
    "keep": "left as before",
}

MEANINGS = {
    "vm-state": "the VM is in a state for it",
    "not-seen": "all images can be looked at",
    "busy": "the disk is free of other jobs",
    "attached": "nobody else in this QEMU uses the images",
    "temporary": "the drive writes to its image for good (no `snapshot=on`)",
    "shorter-layer": "no merged image is smaller than the base",
    "replaced": "the names lead to the files that QEMU has open",
    "doubtful": "no pull has found damage in what is copied, or written to",
    "disagrees": "the headers tell the same chain as QEMU",
    "no-format": "the format of the base is recorded",
    "backing-string": "the overlay can name the base",
    "in-use": "nobody else uses the images",
    "dependents": "no other image is built on what changes",
    "shared-base": "the base is of use to this VM alone",
    "no-space": "there is room for what is copied",
    "device-too-small": "the device of the base is large enough",
    "cannot-grow": "the base can be enlarged as far as it must",
    "not-writable": "QEMU may write to the images",
    "would-lose": "no snapshots or bitmaps are lost, and no encryption",
    "known-bad": "this QEMU is not known to crash on it",
    "flush-unavailable": "the base can be made durable",
}
"""The checks in plain words, by their names."""


def lines(outcome: "Outcome") -> Iterator[str]:
    """All but the verdict and the hints."""
    planned = outcome.verdict == "planned"
    if outcome.before.same_files(outcome.after):
        yield f"chain   {draw(outcome.after.images)}"
    else:
        yield f"before  {draw(outcome.before.images)}"
        yield f"after   {draw(outcome.after.images)}"
    yield from files(outcome.merged, planned=planned)
    if planned:
        yield from _of_plan(outcome)
    yield from unpassed(outcome.checks)
    for rung in outcome.converge:
        yield f"helped  {rung}"


def files(merged: "Sequence[MergedFile]", *, planned: bool = False) -> Iterator[str]:
    """What was done with merged files, or would be: ``files   a.qcow2, b.qcow2: renamed to NAME.merged in /vm``."""
    alike: dict[str, list[str]] = {}
    for one in merged:
        folder, name = os.path.split(one.file) if one.file.startswith("/") else ("", one.file)
        fate = f"{'to be ' if planned else ''}{FATES.get(one.action, one.action)}{f' in {folder}' if folder else ''}"
        fate += f": {one.obstacle}" if planned and one.obstacle else ""
        now = os.path.basename(one.now or "")
        usual = f"{name}.merged" if one.action == "stash" and not planned else name
        alike.setdefault(fate, []).append(f"{name} (now {now})" if folder and now not in ("", usual) else name)
    for fate, names in alike.items():
        yield f"files   {', '.join(names)}: {fate}"


def _of_plan(outcome: "Outcome") -> Iterator[str]:
    if outcome.estimate is not None:
        yield from humanize.estimate(outcome.estimate)
    passed = [check for check in outcome.checks if check.result == "passed"]
    if passed:
        yield f"checks  {len(passed)} of {len(outcome.checks)} passed"
    for check in passed:
        if check.scope:
            yield f"        {MEANINGS.get(check.name, check.name)} (looked at {check.scope})"
    if outcome.pivots:
        yield f"then    start the VM from {outcome.after.active.label}"
    if outcome.other_way is not None:
        yield f"or      {humanize.other_way(outcome.other_way, outcome.estimate)}"


def unpassed(checks: "Sequence[Checked]") -> Iterator[str]:
    """What was not looked at is not passed, and has to be told always."""
    for check in checks:
        meaning = f"that {MEANINGS.get(check.name, 'this is right')}"
        if check.result == "not checked":
            looked_at = f"; looked at {check.scope}" if check.scope else ""
            yield f"not checked  {meaning} ({check.name}): {check.reason}{looked_at}"
        elif check.result == "forced":
            yield f"forced  {check.name}: it is not sure {meaning}"
