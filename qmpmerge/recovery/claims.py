"""
Which files a record may have us change: a record says what *somebody* meant.

Whoever could put it where it lies can rename all that lies there, and below, anyway; so those files it may name. Of any
other it takes more than its word: QEMU shows that very file in the disk's chain, or the user has named its folder. A base is
never renamed, so a golden image elsewhere asks for nothing.
"""

import os
import shlex
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Inode
from qmpmerge.errors import CannotRecover, ForeignFile
from qmpmerge.journal import store
from qmpmerge.journal.record import Record
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.recovery.evidence import Way
    from qmpmerge.targets.target import Target


class Vouched(Value):
    """
    What others say of files than the record: `shown` are the images in the chain of the target that the user has named,
    `allow` the files and folders that he has.
    """

    shown: frozenset[Inode | None] = frozenset()
    allow: tuple[str, ...] = ()

    @classmethod
    def by(cls, chain: Chain, target: "Target | None") -> "Vouched":
        """By the chain of this target."""
        allow = () if target is None else target.allowed
        return cls(frozenset(image.inode for image in chain) - {None}, tuple(allow))


def refuse_foreign(record: Record, ways: "Collection[Way]", vouched: Vouched) -> None:
    """
    What ending the merge in one of these ways would change must be the record's to name. Raises ForeignFile, CannotRecover.
    """
    allowed = [os.path.realpath(place) for place in (os.path.dirname(record.path), *_by_links(record), *vouched.allow)]
    changed = dict.fromkeys(file for way in ways for file in _changed(record, way, vouched.shown))
    foreign = [file for file in changed if not any(os.path.commonpath((file, place)) == place for place in allowed)]
    if foreign:
        folders = dict.fromkeys(map(os.path.dirname, foreign))
        options = "".join(f" --allow {shlex.quote(place)}" for place in folders)
        command = f"qmpmerge recover {shlex.quote(_where_it_is_found(record))}{options}"
        raise ForeignFile(path=record.path, files=foreign, command=command)
    if "repoint" in ways:
        _see_old_backing(record)


def _by_links(record: Record) -> list[str]:
    """Folders of symlinks that lead to the image beside which it lies: whoever has put one there calls that image so."""
    images = [image for image in record.chain if image.has_path and os.path.islink(image.file)]
    return [os.path.dirname(image.file) for image in images if store.path_of(image.file) == record.path]


def _changed(record: Record, way: "Way", shown: Collection[Inode | None]) -> Iterator[str]:
    """The files that get another name, or header; but for those that are `shown`."""
    for index in record.away if way != "leave" and not (way == "finish" and record.policy == "keep") else ():
        place, own = record.place(index), record.own_name(index)
        moves = place is not None and (place == own) == (way == "finish")
        if moves and record.chain[index].inode not in shown:
            yield os.path.join(os.path.realpath(os.path.dirname(own)), os.path.basename(own))
    overlay = record.plan.overlay
    if way == "repoint" and overlay is not None and overlay.inode not in shown:
        yield os.path.realpath(overlay.file)


def _where_it_is_found(record: Record) -> str:
    """What `recover` finds the record by: the active image, where it lies beside that."""
    active = record.chain.active
    is_beside = active.has_path and store.path_of(active.file) == record.path
    return active.file if is_beside else os.path.dirname(record.path)


def _see_old_backing(record: Record) -> None:
    """What goes back into the overlay's header must lead to the image that it was built on. Raises CannotRecover."""
    overlay, top = record.plan.overlay, record.plan.top
    if overlay is None or overlay.backing is None:
        return
    name = backing.named_path(overlay.backing)
    leads = (
        overlay.backing == top.file if name is None else backing.leads_from(os.path.dirname(overlay.file), name, top)
    )
    if not leads:
        reason = f"its record says that {overlay.backing} was in its header, which is not {top.file}"
        raise CannotRecover(file=overlay.file, reason=reason)
