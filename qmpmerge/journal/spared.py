"""
Which merged images keep their names, whatever was to become of them: others need them, or nobody can see whether they do; or
they may alone have what is right.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from qmpmerge.chain.outcome import Policy
from qmpmerge.chain.plan import Plan
from qmpmerge.images import dependents, notes, qcow2
from qmpmerge.images.dependents import Look
from qmpmerge.journal import locks
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.journal.record import Record

NOT_COMPARED = "what was copied was not compared"
NOT_ALL_COMPARED = "it was not compared, or not all of it"


class Spared(Value):
    """The `reasons` for which images keep their names, by their indexes, and how much was looked at to find who needs them."""

    reasons: dict[int, str]
    looked_at: str = ""


def kept(record: "Record", doubtful: Mapping[int, str], search: Collection[str] = ()) -> dict[int, str]:
    """By their indexes, why; `doubtful` as the operation knows it from its begin."""
    plan, policy = record.plan, record.policy
    return by_plan(plan, policy, record.place, doubtful, verified=record.verified, search=search).reasons


def by_plan(
    plan: Plan,
    policy: Policy,
    place: Callable[[int], str | None],
    doubtful: Mapping[int, str],
    *,
    verified: bool,
    search: Collection[str] = (),
    pid: int | None = None,
) -> Spared:
    """
    That nobody else has the images of a commit was seen before it began; those that a pull leaves were only read, and may be
    anybody's: see `_by_pull`. What was to be deleted, and was not compared, is not put aside either: nobody compares it any
    more. `place` tells where the file of an image is now, by its index; `doubtful` are its `doubts`.
    """
    leaving = range(plan.base_index + 1, plan.chain.index(plan.top) + 1)
    if plan.direction == "commit" or policy == "keep":
        index, user = needed(plan)
        used = {
            one: f"{user} is built on it" for one in leaving if one <= index and plan.chain[one] != plan.chain.active
        }
        return Spared(used if policy == "keep" else below(plan, doubtful) | used)
    if policy == "delete" and not verified:
        return Spared(dict.fromkeys(leaving, NOT_COMPARED) | below(plan, doubtful))
    return _by_pull(plan, {index: place(index) for index in leaving}, doubtful, search, pid)


def doubts(plan: Plan) -> dict[int, str]:
    """
    Which of the images that leave, or are copied up into, hold what an earlier job has copied up that failed or was taken back,
    by their indexes, and a sentence. It cannot be told from the rest any more, and may hide what is right below.
    """
    from qmpmerge.images import compare  # `clean` has no need of it

    receiver = (plan.receiver,) if plan.direction == "pull" or compare.fills(plan) else ()
    found = {
        plan.chain.index(image): f"what a job that was taken back has copied into {image.file} was not compared"
        for image in (*plan.merged, *receiver)
        if locks.is_partial(image)
    }
    failure = locks.noted(plan.receiver).suspect if plan.direction == "pull" else None
    if failure is not None:
        failed = f"what a job that failed ({failure}) has copied into {plan.receiver.file} was not compared"
        found[plan.chain.index(plan.receiver)] = failed
    return found


def unchecked(plan: Plan, doubtful: Mapping[int, str]) -> list[str]:
    """What users have to know of these `doubts`."""
    keep = "; keep what lay below it" if plan.direction == "pull" else ""
    return [f"not checked: {doubt}{keep}" for doubt in doubtful.values()]


def below(plan: Plan, doubtful: Mapping[int, str]) -> dict[int, str]:
    """The images that leave from below one of these `doubts`, and may alone have what is right; by their indexes, why."""
    return {index: doubtful[max(doubtful)] for index in range(plan.base_index + 1, max(doubtful, default=0))}


def _by_pull(
    plan: Plan,
    places: Mapping[int, str | None],
    doubtful: Mapping[int, str],
    search: Collection[str] = (),
    pid: int | None = None,
) -> Spared:
    """
    It is looked for who is built on what leaves the chain, below the folders of `search` too, and among what QEMUs have open,
    and who has it open himself, but for the QEMU of this `pid`. What one needs that is kept is kept, and so is what has
    internal snapshots or dirty bitmaps, which no stream copies, and what is `below` a doubt. `places` are where the files are
    now, by the images' indexes.
    """
    from qmpmerge.processes import holders  # most merges have no need of it

    lower = [folder for image in plan.merged for folder in dependents.folders_above(image, plan.chain.active)]
    look = dependents.look_now(plan.merged, plan.chain, [*search, *lower], holders.qemu_files())
    found: dict[int, str] = {}
    alone = below(plan, doubtful)
    for index in sorted(places, reverse=True):
        reasons = [*filter(None, [alone.get(index)]), *_reasons(plan, index, places[index], look, pid)]
        if index + 1 in found:
            reasons.append(f"{plan.chain[index + 1].file} stays, and is built on it")
        if reasons:
            found[index] = "; ".join(reasons[:2])
    return Spared(found, look.told)


def _reasons(plan: Plan, index: int, place: str | None, look: Look, pid: int | None) -> Iterator[str]:
    """What speaks against taking its name from an image, by itself; the worst first."""
    image = plan.chain[index]
    users = [one.file for one in look.dependents if one.image == image.file]
    if users:
        yield f"{users[0]} {f'and {len(users) - 1} more are' if users[1:] else 'is'} built on it"
    if place is not None and (reason := in_use(place, pid)) is not None:
        yield reason
    if place is not None and (reason := _holds_alone(place)) is not None:
        yield reason
    if look.unseen:
        yield f"who needs it cannot be seen: {'; '.join(look.unseen)}"
    elif dependents.is_outside(image, plan.receiver) and not look.covers(os.path.dirname(os.path.realpath(image.file))):
        yield "others may be built on it that `--search` was not told to look for"


def _holds_alone(place: str) -> str | None:
    """What goes with the image, for nothing copies it; as its header tells it, which QEMU writes as it closes the image."""
    try:
        header = qcow2.read(place)
    except OSError as error:
        return f"what it holds cannot be seen: {error.strerror or error}"
    if header is None or not (header.snapshots or header.has_bitmaps):
        return None
    what = " and ".join([*["internal snapshots"] * bool(header.snapshots), *["dirty bitmaps"] * header.has_bitmaps])
    return f"nothing else has its {what}"


def needed(plan: Plan, *, merged_too: bool = True) -> tuple[int, str]:
    """
    Up to which index the merged images are needed by an image outside the chain, and by which; 0 for none of them. One that was
    merged itself and has kept its name needs them, but no VM is started from it.
    """
    found = dependents.look_now(plan.merged, plan.chain).dependents
    built_on = [one for one in found if merged_too or notes.base_of(one.file) is None]
    users = {found.image: found.file for found in built_on}
    indexes = [index for index, image in enumerate(plan.chain, 1) if image.file in users]
    return (max(indexes), users[plan.chain[max(indexes)].file]) if indexes else (0, "")


def in_use(place: str, pid: int | None = None) -> str | None:
    """Who holds the file besides this process, None where nobody does as far as we can see."""
    from qmpmerge.processes import holders  # most merges have no need of it

    users = holders.staying([place], excluding=[pid] if pid is not None else [])
    if users:
        return f"in use by {', '.join(map(str, users))}"
    if pid is not None:
        return None  # what it has open it has locked
    return "locked by a process that we may not see" if holders.is_locked(place) else None
