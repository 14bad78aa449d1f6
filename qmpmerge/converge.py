"""
Convergence: whether an active merge will ever be ready, and what helps where it will not.

A guest that writes faster than the copy is made keeps the job from being ready for ever. The job tells both rates: `len`
grows by what the guest has written again, `offset` by what was copied. QEMU updates `len` only between two passes of up to
16 MiB, so rates are taken from one such update to another.

With `--converge` a ladder is climbed, a rung each time that the last one was not enough:

    lift      the job's own speed limit is taken off
    throttle  the guest's writes are limited to half of the copy's rate, then to a quarter, down to a floor
    pause     the guest is paused, for at most the time that the user gives, where the rest can be copied in it

What was there before comes back whatever happens: by ourselves at the end, and by a `deadman` where we are killed.

Left out, since they do not help: merging the frozen part in rounds, with a new overlay on top each time. Measured with a
guest that wrote 40 MiB/s over 16 MiB and a copy of 8 MiB/s, five rounds took 1.9, 2.0, 2.0, 2.0 and 2.0 s: what is written
during a round is what the next one must copy, which is all that the job's own bitmap would have, and each round leaves an
overlay to be merged. Switching the job to write-blocking (`block-job-change`) is refused for commit jobs.
"""

import asyncio
import contextlib
import functools
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from qmpmerge import deadman, shield
from qmpmerge.blockgraph import Disk, qdev_id
from qmpmerge.errors import CommandError, Error
from qmpmerge.jobs import Job, Progress
from qmpmerge.monitor import Monitor

MIB = 1024 * 1024
SETTLE_SECONDS = 3.0
"""Over this long rates are measured before anything is said of them."""

WINDOW_SECONDS = 10.0
HEADWAY = 0.95
"""A guest that dirties this much of what is copied meanwhile leaves no headway."""

HANGING_SECONDS = 2.0
"""How much longer than allowed the guest may stand still where our process hangs."""

GROUP = "qmpmerge-throttle-"
_SIX = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


@dataclass(frozen=True)
class Converge:
    """
    How far the ladder may be climbed: `floor` is what the guest may write at the least, in bytes a second, `pause` how
    many seconds it may stand still. `tell` hears of each rung.
    """

    floor: int = MIB
    pause: float = 0.0
    tell: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Rates:
    """Bytes a second: what the guest dirties, what is copied; and how many bytes are left to copy."""

    dirty: float
    copy: float
    rest: int

    @property
    def converging(self) -> bool:
        """Whether the job gets ready like this. A small rest says nothing: a job that waits at its limit shows none."""
        return self.dirty < HEADWAY * self.copy

    @property
    def eta(self) -> float | None:
        """Seconds until it is ready, None for never."""
        return self.rest / (self.copy - self.dirty) if self.converging else None


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

    def read(self, job: Job, told: Progress) -> Progress:
        """Look at this sighting, and add to `told` what it says. A job that is about to be ready is none to help."""
        if job.status == "running" and job.total:
            self._see((self._clock(), job))
        self.speed = job.speed
        if self.rates is None or job.status != "running":
            return told
        converging = self.rates.converging
        if not converging:
            self.stuck.set()
        hint = None if converging or self.helped or self._hinted else HINT
        self._hinted = self._hinted or hint is not None
        return replace(told, dirty_rate=self.rates.dirty, converging=converging, eta=self.rates.eta, hint=hint)

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


HINT = "the guest writes as fast as is copied, so this never gets ready: `--converge` helps, or less work in the guest"


Rung = Callable[[], Awaitable[None]]


@dataclass
class Ladder:
    """What was done about a job that does not converge, rung by rung."""

    monitor: Monitor
    disk: Disk
    job: str
    watch: Watch
    wanted: Converge
    rungs: list[str] = field(default_factory=list)
    _undo: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _climbing: "asyncio.Task[None] | None" = None

    def start(self) -> None:
        """Climb while others follow the job."""
        self._climbing = asyncio.ensure_future(self.climb())

    async def stop(self) -> None:
        """Climb no more. A guest that was paused runs again; one that was slowed down stays so until `come_down`."""
        task, self._climbing = self._climbing, None
        if task is None:
            return
        task.cancel()
        await shield.finished(asyncio.wait({task}))
        if not task.cancelled():
            task.result()  # a bug of ours is not kept quiet

    async def climb(self) -> None:
        """A rung each time that the job is seen to be stuck; ends when there is none left."""
        with contextlib.suppress(Error):  # a lost session is told by whoever follows the job
            rungs = self._ladder()
            await self.watch.stuck.wait()
            while (rung := next(rungs, None)) is not None:
                await rung()
                self.watch.begin_anew()
                await self.watch.stuck.wait()
            self._say("it still does not get ready, and there is nothing left to try")

    async def come_down(self) -> None:
        """Undo what was done to the guest; what cannot be undone by ourselves is left to the deadman."""
        try:
            await self._undo.aclose()
        except (Error, CommandError) as error:
            self._say(f"whether the guest is as it was cannot be said ({error}): see `qmpmerge doctor`")

    def _ladder(self) -> "Iterator[Rung]":
        if self.watch.speed:
            yield self._lift
        yield from self.throttling()
        if self.wanted.pause:
            yield self.pause

    def _say(self, text: str) -> None:
        self.rungs.append(text)
        self.wanted.tell(f"{self.disk.name}: {text}")

    async def _lift(self) -> None:
        self._say(f"the job's own limit of {mib(self.watch.speed)}/s is taken off")
        with contextlib.suppress(CommandError):  # it has just ended
            await self.monitor.execute("block-job-set-speed", device=self.job, speed=0)

    # --- throttling the guest -----------------------------------------------------------------------------------

    def throttling(self) -> "Iterator[Rung]":
        """Down by halves from the copy's rate to the floor; given up where QEMU will not have it."""
        throttle = Throttle(self.monitor, self.disk)
        while not throttle.refused and throttle.target != self.wanted.floor:
            yield functools.partial(self._throttle, throttle)

    async def _throttle(self, throttle: "Throttle") -> None:
        copied = self.watch.rates.copy if self.watch.rates is not None else 0
        target = max(self.wanted.floor, int((throttle.target or copied) / 2))
        try:
            if not throttle.was:
                await self._undo.enter_async_context(throttle.undone())
            await throttle.limit(target)
        except (CommandError, OSError) as error:
            throttle.refused = True
            reason = error.description if isinstance(error, CommandError) else str(error)
            self._say(f"the guest's writes cannot be limited: {reason}")
        else:
            self._say(f"the guest's writes are limited to {mib(target)}/s until the end")

    # --- pausing the guest --------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Pause the guest, where the rest can be copied in the time that is allowed."""
        rates = self.watch.rates
        needed = rates.rest / rates.copy if rates is not None and rates.copy else 0.0
        if needed > self.wanted.pause:
            self._say(f"the guest is not paused: {needed:.1f} s are needed, {self.wanted.pause:g} s are allowed")
            return
        try:
            if not (await self.monitor.execute("query-status"))["running"]:
                self._say("the guest does not run, so there is nothing to pause")
                return
            async with self._paused():
                # The end of the merge ends this too, by a cancellation.
                await asyncio.sleep(self.wanted.pause)
            self._say(f"the guest runs again: {self.wanted.pause:g} s were not enough")
        except (CommandError, OSError) as error:
            self._say(f"the guest cannot be paused: {error}")

    @contextlib.asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        limit = self.wanted.pause + HANGING_SECONDS
        async with deadman.armed(self.monitor.descriptor, [("cont", {})], limit=limit) as switch:
            try:
                await self.monitor.execute("stop")
                self._say(f"the guest is paused, for {self.wanted.pause:g} s at the most")
                yield
            finally:
                await shield.finished(self.monitor.execute("cont"))
                switch.disarm()


class Throttle:
    """A limit on the writes of one disk's guest, in a throttle group of its own, and what was there before."""

    def __init__(self, monitor: Monitor, disk: Disk) -> None:
        self._monitor = monitor
        self._disk = disk
        self._device: dict[str, Any] = {}
        self.was: dict[str, Any] = {}
        self.target = 0
        self.refused = False

    @contextlib.asynccontextmanager
    async def undone(self) -> AsyncIterator[None]:
        """Put back what was there at the end of the block, and when we die in it. Raises CommandError, OSError."""
        await self._look()
        before = {**self._device, **self._limits()}
        async with deadman.armed(self._monitor.descriptor, [("block_set_io_throttle", before)]) as switch:
            try:
                yield
            finally:
                await shield.finished(self._monitor.execute("block_set_io_throttle", **before))
                switch.disarm()

    async def limit(self, target: int) -> None:
        """Let the guest write `target` bytes a second at the most, but no more than it could before."""
        if self.was["bps"]:  # QEMU takes no limit on writes beside one on both
            limits: dict[str, Any] = {"bps": min(target, self.was["bps"]), "bps_rd": 0, "bps_wr": 0}
        else:
            limits = {"bps": 0, "bps_rd": self.was["bps_rd"], "bps_wr": min(target, self.was["bps_wr"] or target)}
        kept = {name: self.was[name] for name in ("iops", "iops_rd", "iops_wr")}
        self.target = target
        name = re.sub(r"[^A-Za-z0-9._-]", "-", self._disk.name)
        group = f"{GROUP}{os.getpid()}-{name}"
        await self._monitor.execute("block_set_io_throttle", **self._device, **limits, **kept, group=group)

    async def _look(self) -> None:
        for entry in await self._monitor.execute("query-block"):
            is_it = entry["device"] == self._disk.drive if self._disk.drive else self._is_device(entry)
            if is_it and "inserted" in entry:
                self._device = {"device": self._disk.drive} if self._disk.drive else {"id": entry["qdev"]}
                self.was = entry["inserted"]
                return
        raise CommandError("block_set_io_throttle", "QEMU tells no device of this disk")

    def _is_device(self, entry: Any) -> bool:
        return bool(self._disk.qdev) and qdev_id(entry.get("qdev", "")) == self._disk.qdev

    def _limits(self) -> dict[str, Any]:
        """All limits that there were, as the command takes them."""
        others = [
            name for name in self.was if re.fullmatch(r"(bps|iops)(_rd|_wr)?_max(_length)?|iops_size|group", name)
        ]
        return {name: self.was[name] for name in (*_SIX, *others)}


def mib(count: float) -> str:
    """In MiB, as people read it."""
    return f"{count / MIB:.3g} MiB"


@contextlib.asynccontextmanager
async def climbing(
    monitor: Monitor, disk: Disk, job: str, watch: Watch, wanted: Converge | None
) -> AsyncIterator[Ladder]:
    """
    While the block runs, help the job where it does not converge; yields the ladder, whose `rungs` say what was done.

    At the end of the block the guest is as it was before. Without `wanted` nothing is done.
    """
    ladder = Ladder(monitor, disk, job, watch, wanted or Converge())
    if wanted is not None:
        watch.helped = True
        ladder.start()
    try:
        yield ladder
    finally:
        await ladder.stop()
        await shield.finished(ladder.come_down())
