"""
Which merged images keep their names, whatever was to become of them: others need them, or nobody can see whether they do.
"""

import os
from collections.abc import Collection

from qmpmerge.images import dependents, notes
from qmpmerge.journal.record import Record


def kept(record: Record, search: Collection[str] = ()) -> dict[int, str]:
    """
    By their indexes, why. That nobody else has the images of a commit was seen before it began; those that a pull leaves were
    only read, and may be anybody's. So it is looked for who is built on them, below the folders of `search` too, and among what
    QEMUs have open, and who has them open himself; and what one needs that is kept is kept.
    """
    if record.direction == "commit" or record.policy == "keep":
        index, user = needed(record)
        indexes = range(record.base + 1, index + 1)
        return {one: f"{user} is built on it" for one in indexes if record.chain[one] != record.chain.active}
    found: dict[int, str] = {}
    reasons = _others(record, search)
    for index in range(record.top, record.base, -1):
        if index in reasons:
            found[index] = reasons[index]
        elif index + 1 in found:
            found[index] = f"{record.chain[index + 1].file} stays, and is built on it"
    return found


def _others(record: Record, search: Collection[str]) -> dict[int, str]:
    """What speaks against taking its name from each image, by itself."""
    from qmpmerge.processes import holders  # most merges have no need of it

    look = dependents.look_now(record.plan.merged, record.chain, search, holders.qemu_files())
    users = {one.image: f"{one.file} is built on it" for one in look.dependents}
    unseen = f"who needs it cannot be seen: {'; '.join(look.unseen)}" if look.unseen else None
    reasons = {}
    for index in range(record.base + 1, record.top + 1):
        image, place = record.chain[index], record.place(index)
        reason = users.get(image.file) or (in_use(place) if place is not None else None) or unseen
        if reason is None and dependents.is_outside(image, record.plan.receiver):
            folder = os.path.dirname(os.path.realpath(image.file))
            reason = (
                None if look.covers(folder) else "others may be built on it that `--search` was not told to look for"
            )
        if reason is not None:
            reasons[index] = reason
    return reasons


def needed(record: Record, *, merged_too: bool = True) -> tuple[int, str]:
    """
    Up to which index the merged images are needed by an image outside the chain, and by which; 0 for none of them. One that was
    merged itself and has kept its name needs them, but no VM is started from it.
    """
    found = dependents.look_now(record.plan.merged, record.chain).dependents
    built_on = [one for one in found if merged_too or notes.base_of(one.file) is None]
    users = {found.image: found.file for found in built_on}
    indexes = [index for index, image in enumerate(record.chain, 1) if image.file in users]
    return (max(indexes), users[record.chain[max(indexes)].file]) if indexes else (0, "")


def in_use(place: str) -> str | None:
    """Who holds the file, None where nobody does as far as we can see."""
    from qmpmerge.processes import holders  # most merges have no need of it

    users = holders.users([place])
    if users:
        return f"in use by {', '.join(map(str, users))}"
    return "locked by a process that we may not see" if holders.is_locked(place) else None
