"""
Whether an active merge will ever be ready, from what is seen of its job.

The job tells both rates: `len` grows by what the guest has written again, `offset` by what was copied. QEMU updates `len`
only between two passes of up to 16 MiB, so rates are taken from one such update to another.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from qmpmerge.engine.pace.progress import Progress
from qmpmerge.qemu.jobs import Job
from qmpmerge.value import Value

SETTLE_SECONDS = 3.0
"""Over this long rates are measured before anything is said of them."""

WINDOW_SECONDS = 10.0
HEADWAY = 0.95
"""A guest that dirties this much of what is copied meanwhile leaves no headway."""

HINT = "the guest writes faster than the job copies, so this never gets ready: `--converge` helps, or less work in the guest"


class Rates(Value):
    """Bytes a second: what the guest dirties, what is copied; and how many bytes are left to copy."""

    dirty: float
    copy: float
    rest: int

    @property
    def converging(self) -> bool:
        """Whether the job gets ready like this. A small rest says nothing: a job that waits at its limit shows none."""
        return self.dirty < HEADWAY * self.copy

    @property
    def seconds_left(self) -> float | None:
        """Seconds until it is ready, None for never."""
        return round(self.rest / (self.copy - self.dirty), 1) if self.converging else None


class Watch:
    """The sightings of one job, and what they say about its end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hinted = False
        self.helped = False
        self.speed = 0
        self.stuck = asyncio.Event()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what was seen: something has been done about it."""
        self._first: tuple[float, Job] | None = None
        self._last: tuple[float, Job] | None = None
        self._updates: list[tuple[float, Job]] = []
        self.rates: Rates | None = None
        self.stuck.clear()

    def read(self, job: Job, sighting: Progress) -> Progress:
        """Look at this sighting, and add to `sighting` what it says. A job that is about to be ready is none to help."""
        if job.status == "running" and job.total:
            self._see((self._clock(), job))
        self.speed = job.speed
        if self.rates is None or job.status != "running":
            return sighting
        converging = self.rates.converging
        if not converging:
            self.stuck.set()
        hint = None if converging or self.helped or self._hinted else HINT
        self._hinted = self._hinted or hint is not None
        return replace(
            sighting,
            dirty_rate=round(self.rates.dirty),
            converging=converging,
            seconds_left=self.rates.seconds_left,
            hint=hint,
        )

    def _see(self, seen: tuple[float, Job]) -> None:
        now, job = seen
        self._first = self._first or seen
        if self._last is not None and job.total != self._last[1].total:
            self._updates.append(seen)
        self._last = seen
        while len(self._updates) > 2 and now - self._updates[0][0] > WINDOW_SECONDS:
            del self._updates[0]
        self.rates = self._between(*self._ends()) or self.rates

    def _ends(self) -> tuple[tuple[float, Job], tuple[float, Job]]:
        """From one update of `len` to another; where there was none, over all that was seen."""
        assert self._first is not None and self._last is not None, "there is a sighting"
        if self._updates:
            return self._updates[0], self._updates[-1]
        return self._first, self._last

    def _between(self, first: tuple[float, Job], last: tuple[float, Job]) -> Rates | None:
        seconds = last[0] - first[0]
        copied = last[1].done - first[1].done
        if seconds < SETTLE_SECONDS or copied <= 0:
            return None
        dirtied = max(0, last[1].total - first[1].total)
        return Rates(dirtied / seconds, copied / seconds, self._rest())

    def _rest(self) -> int:
        """What is left to copy: as it is told, or what a job that waits at its limit found to do at its last passes."""
        assert self._last is not None, "there is a sighting"
        totals = [job.total for _time, job in self._updates]
        passes = [later - total for total, later in zip(totals, totals[1:], strict=False)]
        return max(self._last[1].total - self._last[1].done, *passes, 0)
