"""
The witness: what we were about to do, in a small file beside the active image, for whoever comes after a crash.

After a pivot nothing inside the images says which one is right, so it is written down beforehand, step by step:

    copying     the job was asked for; the old chain is right
    switching   intermediate: base is durable and compared, the overlay's header may be rewritten any time now
                active: base and top are equal, top's name may be taken away, and then the device may move, any time now
    switched    seen in QEMU's graph: the new chain is right
    proved      graph and headers show the new chain, durably: only the merged files remain to be dealt with

The file goes when nothing remains. It is believed only as far as inodes and headers agree with it, and only where it
belongs to us or to root.
"""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from qmpmerge.chain.chain import Chain, Image, Inode
from qmpmerge.chain.outcome import Policy
from qmpmerge.chain.plan import CommitPlan, commit
from qmpmerge.images import files
from qmpmerge.processes import proc
from qmpmerge.processes.proc import Process

Phase = Literal["copying", "switching", "switched", "proved"]


@dataclass(frozen=True)
class Seen:
    """What a file looked like at a moment when nobody wrote: any write since then shows."""

    size: int
    changed: int
    """st_mtime_ns"""


@dataclass(frozen=True)
class Witness:
    """
    One merge. `chain` is the chain before it, `base` and `top` are indexes there, `away` the names that its files get by
    the index (nothing for those that cannot be renamed). `device` is the drive's or device's own id, "" where a disk has
    no name but its nodes'.

    `seen` is what base and top looked like while nothing was dirty and nobody wrote, by index; empty where that was not
    so. `before` is what the other merged images looked like, which nobody writes to. `path` is where the witness lies.
    """

    path: str
    target: str
    disk: str
    job: str
    chain: Chain
    base: int
    top: int
    device: str = ""
    policy: Policy = "stash"
    phase: Phase = "copying"
    qemu: Process | None = None
    tool: Process | None = None
    is_live: bool = True
    verified: bool = False
    away: dict[int, str] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)
    before: dict[int, Seen] = field(default_factory=dict)

    @property
    def plan(self) -> CommitPlan:
        """What was to be done."""
        return commit(self.chain, base=f"[{self.base}]", top=f"[{self.top}]")

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody is at work on it any more."""
        return self.tool is None or self.tool == proc.process(os.getpid()) or not self.tool.is_alive

    def place(self, index: int) -> str | None:
        """Where the file of the image at `index` is now; None where neither name leads to it."""
        image = self.chain[index]
        names = [image.file, *([self.away[index]] if index in self.away else [])]
        return next((name for name in names if self.is_file(name, image)), None)

    def is_file(self, name: str, image: Image) -> bool:
        """Whether a name leads to the image that the witness means. Device numbers can change with a reboot."""
        found = files.inode(name)
        if found is None or image.inode is None:
            return False
        return found == image.inode or (found[1] == image.inode[1] and self.is_of_an_earlier_boot)

    @property
    def is_of_an_earlier_boot(self) -> bool:
        """Whether the machine has been started since."""
        return self.tool is not None and self.tool.boot != proc.boot_id()

    def concerns(self, inodes: "set[Inode]") -> bool:
        """Whether one of these files is part of the merge; what lies below its base may be shared by many."""
        return any(image.inode in inodes for image in self.chain.images[self.base - 1 :] if image.inode is not None)


def looks(chain: Chain, indexes: Iterable[int]) -> dict[int, Seen]:
    """What files look like that nobody writes to, by index."""
    found = {}
    for index in indexes:
        with contextlib.suppress(OSError):
            found[index] = seen(chain[index].file)
    return found


def seen(place: str) -> Seen:
    """What a file looks like now. Raises OSError."""
    status = os.stat(place)
    return Seen(status.st_size, status.st_mtime_ns)
