"""
What a check is asked about, and how files are told apart.
"""

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass

from qmpmerge import bitmaps
from qmpmerge.bitmaps import Bitmap, Handling
from qmpmerge.chain import Image
from qmpmerge.hosts import ChainView, Host
from qmpmerge.outcome import Ending
from qmpmerge.plan import CommitPlan
from qmpmerge.space import Estimate

Identity = tuple[str, int, int]
"""Which file or device it is, whatever it is called."""


@dataclass(frozen=True)
class Question:
    """All that a check may want to know. `pid` is QEMU's, None where it is not known; `opened` is what it has open."""

    host: Host
    pid: int | None
    opened: set[Identity]
    view: ChainView
    plan: CommitPlan
    ending: Ending
    handling: Handling
    search: Collection[str]
    estimate: Estimate

    @property
    def written(self) -> list[Image]:
        """The images that QEMU will write to."""
        return [self.plan.base, *([self.plan.overlay] if self.plan.overlay is not None else [])]

    @property
    def touched(self) -> list[Image]:
        """The images that QEMU will write to, or that leave the chain, base first."""
        return [self.plan.base, *self.plan.merged, *self.written[1:]]

    @property
    def bitmaps(self) -> list[Bitmap]:
        """The dirty bitmaps that would be lost."""
        return [] if self.keeps else bitmaps.of(self.view.layout, self.plan.merged)

    @property
    def keeps(self) -> bool:
        """Whether the guest keeps its overlay, and all that is in it."""
        return self.plan.pivots and self.ending == "keep"


def process(host: Host, plan: CommitPlan) -> tuple[int | None, set[Identity]]:
    """QEMU's pid and what it has open; what answers on the monitor may be a relay, such as ssh, which is not QEMU."""
    from qmpmerge import processes

    opened = _open_files(host.pid) if host.pid is not None else set()
    ours = {identity(image.file) for image in plan.chain if image.has_path}
    if host.pid is None or not (opened & ours or processes.vm_of(host.pid) is not None):
        return None, set()
    return host.pid, opened


def _open_files(pid: int) -> set[Identity]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return set()
    return {found for name in names if (found := identity(f"{folder}/{name}")) is not None}


def identity(path: str) -> Identity | None:
    """The inode of a file, the device number of a block device: several device nodes can lead to one device."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(status.st_mode):
        return "device", status.st_rdev, 0
    return "file", status.st_dev, status.st_ino
