"""What is reported of a job at work."""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpmerge.chain.chain import Image
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.qemu.jobs import Job


class Shortage(Value):
    """
    `filesystem` is the mount point under the base, or the base itself where it is no file of this host. `needed` bytes
    more, at most, make room for what is still to be copied.
    """

    filesystem: str
    needed: int


class Progress(Value):
    """
    How far a merge is: its `job` as seen last. `counts` says what `done` and `total` (bytes) are: what has to be copied
    (``copied``), of which an active merge gets more while the guest writes; or the virtual disk, which all others walk
    (``scanned``), until we know how much of it that is. `rate` is bytes a second, `seconds_left` what the rest takes at it;
    both None while nothing sensible can be said.

    `shortage` is what a job waits for that ran out of space. `note` is a sentence, said once, about a job that was there
    before us.
    Of an active merge `dirty_rate` is what the guest writes again, in bytes a second, and `converging` whether it gets
    ready like this; None while nobody can say. `hint` is a sentence for the user, said once. `target`
    is whose disk it is where one command merges those of several (`tidy`).
    """

    disk: str
    job: "Job"
    counts: str
    rate: int | None = None
    seconds_left: float | None = None
    shortage: Shortage | None = None
    note: str | None = None
    dirty_rate: int | None = None
    converging: bool | None = None
    hint: str | None = None
    target: str | None = None

    @property
    def status(self) -> str:
        """That of the job."""
        return self.job.status

    @property
    def done(self) -> int:
        """That of the job."""
        return self.job.done

    @property
    def total(self) -> int:
        """That of the job."""
        return self.job.total

    @property
    def percent(self) -> float | None:
        """None before QEMU knows the total: an active merge starts with 0 of 0."""
        return min(100.0, 100 * self.done / self.total) if self.total else None


Report = Callable[[Progress], None]
"""Who is told of progress. May do nothing at all."""


class ReportRaised(Exception):
    """A caller's `report` has raised `error`, which is none of ours whatever its type."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def unreported(progress: Progress) -> None:
    """Tells nobody."""


class Meter:
    """Turns sightings of a job into `Progress`: rate over the last seconds, time left at that rate."""

    WINDOW_SECONDS = 10.0

    def __init__(self, disk: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._disk = disk
        self._counts = ""
        self._clock = clock
        self._sightings: list[tuple[float, int]] = []

    def read(self, job: "Job", counts: str, shortage: Shortage | None = None) -> Progress:
        """What to tell about this sighting, of a job that counts this now."""
        now = self._clock()
        if counts != self._counts:
            self._counts, self._sightings = counts, []
        self._sightings = [seen for seen in self._sightings if now - seen[0] <= self.WINDOW_SECONDS]
        self._sightings.append((now, job.done))
        rate = self._rate() if shortage is None else None
        left = max(0, job.total - job.done)
        return Progress(
            disk=self._disk,
            job=job,
            counts=self._counts,
            rate=rate,
            seconds_left=round(left / rate, 1) if rate else None,
            shortage=shortage,
        )

    def _rate(self) -> int | None:
        (first, done), (last, done_now) = self._sightings[0], self._sightings[-1]
        # Never from the first second: the job's first steps say nothing about the rest.
        return max(0, round((done_now - done) / (last - first))) or None if last - first >= 1 else None


CLUSTER = 64 * 1024


def of(base: Image, left: int) -> Shortage:
    """The shortage of a job that has `left` bytes to copy into `base`."""
    try:
        space = os.statvfs(os.path.dirname(base.file)) if base.has_path else None
    except OSError:
        space = None
    if space is None:
        return Shortage(base.file, max(left, CLUSTER))
    # QEMU has just been told that there is no room, whatever the count of free blocks says: never less than a cluster.
    return Shortage(mount_point(base.file), max(left - space.f_bavail * space.f_frsize, CLUSTER))


def mount_point(path: str) -> str:
    """The folder on which the filesystem of `path` is mounted."""
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path
