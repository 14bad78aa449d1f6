"""
What helps where an active merge will never be ready.

A guest that writes faster than the copy is made keeps the job from being ready for ever; `rates` tells.

With `--converge` a ladder is climbed, a rung each time that the last one was not enough:

    lift      the job's own speed limit is taken off
    throttle  the guest's writes are limited to half of the copy's rate, then to a quarter, down to `FLOOR`
    pause     the guest is paused, for at most the time that the user gives, where the rest can be copied in it

What was there before comes back whatever happens: by ourselves at the end, and by a dead man's switch where we are killed.

Left out, since they do not help: merging the frozen part in rounds, with a new overlay on top each time. Measured with a
guest that wrote 40 MiB/s over 16 MiB and a copy of 8 MiB/s, five rounds took 1.9, 2.0, 2.0, 2.0 and 2.0 s: what is written
during a round is what the next one must copy, which is all that the job's own bitmap would have, and each round leaves an
overlay to be merged. Switching the job to write-blocking (`block-job-change`) is refused for commit jobs.
"""

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qmpmerge import shield
from qmpmerge.engine import log
from qmpmerge.engine.pace.rates import Watch
from qmpmerge.errors import Error, QemuRefused
from qmpmerge.guest import deadman, pause
from qmpmerge.guest.throttle import Throttle
from qmpmerge.qemu import mutex
from qmpmerge.qemu.blockgraph import Disk
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.engine.run import Run

MIB = 1024 * 1024
FLOOR = MIB
"""What a guest may write at the least, in bytes a second."""
HANGING_SECONDS = 2.0
"""How much longer than allowed the guest may stand still where our process hangs."""


class Converge(Value):
    """
    That the ladder may be climbed. `pause` is how many seconds the guest may stand still, 0 for never; `tell` hears of each
    rung.
    """

    pause: float = 0.0
    tell: Callable[[str], None] = lambda text: None


Rung = Callable[[], Awaitable[None]]


@dataclass
class Ladder:
    """What was done about a job that does not converge, rung by rung."""

    monitor: Monitor
    disk: Disk
    job: str
    watch: Watch
    wanted: Converge
    target: str = ""
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
        """Undo what was done to the guest; what cannot be undone by ourselves is left to the dead man's switch."""
        try:
            await self._undo.aclose()
        except Error as error:
            self._say(f"whether the guest is as it was cannot be said ({error}): see `qmpmerge doctor`")

    def _ladder(self) -> "Iterator[Rung]":
        if self.watch.speed:
            yield self._lift
        yield from self.throttling()
        if self.wanted.pause:
            yield self.pause

    def _say(self, text: str) -> None:
        self.rungs.append(text)
        log.step("converge", "{rung}", about=self.job, target=self.target, rung=text)
        self.wanted.tell(f"{self.disk.name}: {text}")

    async def _lift(self) -> None:
        self._say(f"the job's own limit of {mib(self.watch.speed)}/s is taken off")
        with contextlib.suppress(QemuRefused):  # it has just ended
            await self.monitor.execute("block-job-set-speed", device=self.job, speed=0)

    # --- throttling the guest -----------------------------------------------------------------------------------

    def throttling(self) -> "Iterator[Rung]":
        """Down by halves from the copy's rate to the floor; given up where QEMU will not have it."""
        throttle = Throttle(self.monitor, self.disk)
        while not throttle.refused and throttle.target != FLOOR:
            yield functools.partial(self._throttle, throttle)

    async def _throttle(self, throttle: Throttle) -> None:
        copied = self.watch.rates.copy if self.watch.rates is not None else 0
        target = max(FLOOR, int((throttle.target or copied) / 2))
        try:
            if not throttle.was:
                await self._undo.enter_async_context(throttle.undone())
            await throttle.limit(target)
        except (QemuRefused, OSError) as error:
            throttle.refused = True
            reason = error.reason if isinstance(error, QemuRefused) else str(error)
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
            async with mutex.taken(mutex.PAUSE, self.monitor) as turn:
                if not (await self.monitor.execute("query-status"))["running"]:
                    self._say("the guest does not run, so there is nothing to pause")
                    return
                async with self._paused(turn):
                    # The end of the merge ends this too, by a cancellation.
                    await asyncio.sleep(self.wanted.pause)
            self._say(f"the guest runs again: {self.wanted.pause:g} s were not enough")
        except (QemuRefused, OSError, mutex.NoTurn) as error:
            self._say(f"the guest cannot be paused: {error}")

    @contextlib.asynccontextmanager
    async def _paused(self, turn: socket.socket) -> AsyncIterator[None]:
        limit = self.wanted.pause + HANGING_SECONDS
        async with deadman.armed(self.monitor.descriptor, deadman.qmp("cont"), limit=limit, turn=turn) as switch:
            with log.held():
                try:
                    await pause.stop(self.monitor, switch)
                    self._say(f"the guest is paused, for {self.wanted.pause:g} s at the most")
                    yield
                finally:
                    await shield.finished(pause.go_on(self.monitor))
                    switch.dismiss()


def mib(count: float) -> str:
    """In MiB, as people read it."""
    return f"{count / MIB:.3g} MiB"


@contextlib.asynccontextmanager
async def climbing(run: "Run", wanted: Converge) -> AsyncIterator[Ladder]:
    """
    While the block runs, help the job where it does not converge; yields the ladder, whose `rungs` say what was done.

    At the end of the block the guest is as it was before.
    """
    ladder = Ladder(run.target.monitor, run.disk, run.job, run.watch, wanted, run.target_name)
    run.watch.helped = True
    ladder.start()
    try:
        yield ladder
    finally:
        await ladder.stop()
        await shield.finished(ladder.come_down())
