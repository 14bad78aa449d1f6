"""
The record: what we were about to do, for whoever comes after a crash, or after somebody left.

A job belongs to QEMU, so whoever comes next goes on from where it stands; the record tells what no job remembers once it
has ended. After a pivot nothing inside the images says which one is right, so it is written down beforehand, state by
state. It goes when nothing remains.

A record is a claim. It is believed only where it belongs to us or to root (`store`), and only as far as inodes, headers and
QEMU's graph agree with it (`recovery.evidence`).
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import field, replace
from functools import cached_property

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain, Image, Inode
from qmpmerge.chain.outcome import Policy
from qmpmerge.chain.plan import Direction, Plan
from qmpmerge.chain.state import State
from qmpmerge.errors import Refused
from qmpmerge.folder import File
from qmpmerge.images import files
from qmpmerge.images.files import Seen
from qmpmerge.images.stashed import original_of
from qmpmerge.processes import proc
from qmpmerge.processes.proc import Process
from qmpmerge.value import Value


class Record(Value):
    """
    One merge or pull. `chain` is the chain before it, `base` and `top` are the plan's, by their indexes there (0 for no base),
    `away` the names that its files get by
    the index (nothing for those that cannot be renamed). `device` is the drive's or device's own id, "" where a disk has
    no name but its nodes'. `since` is in seconds since 1970, `old_nodes` are the nodes that the merge leaves open, top down,
    `base_driver` is what QEMU calls base's format.

    `seen` is what base and top looked like while nothing was dirty and nobody wrote, by index; empty where that was not
    so. `was_left_ready` says that the job of an active merge was, so that anybody with the monitor could tell it to move the
    guest, unseen. `before` is what the other merged images looked like, which nobody writes to. `path` is where the record
    lies, `file` is what was written or read there, which stays the record whatever is planted under its name; None for one
    that never was.
    """

    path: str
    target: str
    disk: str
    job: str
    chain: Chain
    base: int
    top: int
    direction: Direction = "commit"
    device: str = ""
    policy: Policy = "stash"
    state: State = State.COPYING
    qemu: Process | None = None
    tool: Process | None = None
    is_live: bool = True
    since: float = 0.0
    old_nodes: tuple[str, ...] = ()
    base_driver: str = ""
    verified: bool = False
    was_left_ready: bool = False
    away: dict[int, str] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)
    before: dict[int, Seen] = field(default_factory=dict)
    file: File | None = field(default=None, compare=False, repr=False)

    @cached_property
    def plan(self) -> Plan:
        """What was to be done."""
        return plan.between(self.direction, self.chain, self.base, self.top)

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody is at work on it any more."""
        return self.tool is None or self.tool == proc.process(os.getpid()) or not self.tool.is_alive

    @property
    def is_of_an_earlier_boot(self) -> bool:
        """Whether the machine has been started since."""
        return self.tool is not None and self.tool.boot != proc.boot_id()

    @property
    def has_old_chain(self) -> bool:
        """Whether the old chain is right where QEMU does not show otherwise, of an active merge."""
        return self.state is State.COPYING and not self.was_left_ready

    def own_name(self, index: int) -> str:
        """What the file of the image at `index` was called: not by the symlink that the chain may know it by."""
        away = self.away.get(index)
        return (away and original_of(away)) or self.chain[index].file

    def place(self, index: int) -> str | None:
        """Where the file of the image at `index` is now; None where neither name leads to it."""
        names = [self.own_name(index), *([self.away[index]] if index in self.away else [])]
        return next((name for name in names if self.is_file(name, self.chain[index])), None)

    def found(self) -> Iterator[Image]:
        """The images that are there, by the names that they have now; what is no file of this host as it is."""
        for index, image in enumerate(self.chain, 1):
            if image.inode is None:
                yield image
            elif (place := self.place(index)) is not None:
                yield replace(image, file=place)

    def is_called(self, path: str) -> bool:
        """Whether an image of the chain has, or had, this name."""
        return path in (*self.chain.files, *self.away.values(), *map(self.own_name, self.away))

    def is_file(self, name: str, image: Image) -> bool:
        """Whether a name leads to the image that the record means."""
        return self.is_inode(files.inode(name), image)

    def is_inode(self, found: Inode | None, image: Image) -> bool:
        """Whether this file is the image that the record means. Device numbers can change with a reboot."""
        if found is None or image.inode is None:
            return False
        return found == image.inode or (found[1] == image.inode[1] and self.is_of_an_earlier_boot)

    def concerns(self, inodes: "set[Inode]") -> bool:
        """Whether one of these files is part of the merge; what lies below its base may be shared by many."""
        return any(
            image.inode in inodes for image in self.chain.images[max(0, self.base - 1) :] if image.inode is not None
        )

    def is_same_merge(self, other: "Record") -> bool:
        """Whether both tell of one merge, which the same QEMU carries out."""
        ours, others = ((one.chain, one.direction, one.base, one.top, one.is_live) for one in (self, other))
        return ours == others and (self.qemu == other.qemu or not self.is_live)

    def is_done(self, chain: Chain) -> bool:
        """Whether the chain is what this merge was to leave; its headers are looked at when it is proved."""
        return chain.same_files(self.plan.result)

    def is_what(self, planned: Callable[[Chain], Plan]) -> bool:
        """Whether what is `planned` of the chain as it was is the very same merge."""
        # By name, not by inode: a merged file may have been moved away since.
        images = tuple(replace(image, inode=None) for image in self.chain)
        try:
            meant = planned(Chain(images))
        except Refused:
            return False
        found = (meant.direction, meant.base_index, meant.chain.index(meant.top))
        return found == (self.direction, self.base, self.top)

    def as_called_now(self, chain: Chain) -> Plan:
        """The plan with the nodes that `chain` has: the QEMU that has the images now may have been started since."""
        nodes = [next((now.node for now in chain if now.same_as(image)), None) for image in self.chain]
        images = tuple(replace(image, node=node) for image, node in zip(self.chain, nodes, strict=True))
        return plan.between(self.direction, Chain(images), self.base, self.top)


def looks(chain: Chain, indexes: Iterable[int]) -> dict[int, Seen]:
    """What files look like that nobody writes to, by index."""
    found = {}
    for index in indexes:
        with contextlib.suppress(OSError):
            found[index] = look(chain[index], chain[index].file)
    return found


def look(image: Image, place: str) -> Seen:
    """What the file of an image looks like, which is at `place` now, and that of its data with it. Raises OSError."""
    seen = [files.seen(file) for file in (place, *([image.data.file] if image.data is not None else []))]
    return Seen(sum(one.size for one in seen), max(one.changed for one in seen))
