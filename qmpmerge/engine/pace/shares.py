"""A speed that jobs which are at work at the same time share."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from qmpmerge.errors import Error
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.target import Target


class Shares:
    """
    `total` is in bytes a second, 0 for no limit; with None nobody is told anything. A share changes when others begin or end,
    and its job is told when it is seen next, within half a second: for so long all together may be faster.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._count = 0

    @property
    def speed(self) -> int | None:
        """What each may copy now: never nothing, which would be no limit."""
        return self._total and max(1, self._total // max(1, self._count))

    @contextlib.asynccontextmanager
    async def one(self, target: Target) -> AsyncIterator["Share"]:
        """Count a job of this target during the block."""
        self._count += 1
        share = Share(self, target)
        try:
            yield share
        finally:
            self._count -= 1
            await share.close()


class Share:
    """That of one job."""

    def __init__(self, shares: Shares, target: Target) -> None:
        self._shares = shares
        self._target = target
        self._telling: asyncio.Task[None] | None = None

    @property
    def speed(self) -> int | None:
        """In bytes a second, None for what it is already."""
        return self._shares.speed

    def see(self, job: Job) -> None:
        """Told of each sighting."""
        speed = self.speed
        is_telling = self._telling is not None and not self._telling.done()
        if speed is not None and speed != job.speed and not is_telling:
            self._telling = asyncio.ensure_future(self._tell(job, speed))

    async def _tell(self, job: Job, speed: int) -> None:
        with contextlib.suppress(Error):  # a session that was lost is the engine's to deal with
            await jobs.set_speed(self._target.monitor, job, speed)

    async def close(self) -> None:
        """What was sent is answered."""
        if self._telling is not None:
            await asyncio.wait({self._telling})
