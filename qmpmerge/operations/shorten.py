"""
One disk of a `tidy`: which way it is shortened, and what it waits for where others of the same `tidy` write to what it does.

Each merge is one of `operations.commit`, with its checks and its proof.
"""

import contextlib
import os
from asyncio import Lock
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

from qmpmerge.chain.chain import Chain, Inode
from qmpmerge.chain.outcome import Outcome
from qmpmerge.engine import earlier, proof, resume
from qmpmerge.engine.pace.progress import Progress, Report
from qmpmerge.engine.pace.shares import Shares
from qmpmerge.engine.request import Request
from qmpmerge.errors import Dependents, InUse, Locked, NotSeen, Refused, SharedBase, Unfinished
from qmpmerge.journal import store
from qmpmerge.operations import commit
from qmpmerge.targets.target import Target

Direction = Literal["auto", "commit", "pull"]

Door = Callable[..., AbstractAsyncContextManager[Target]]
"""What makes a session, as `targets.open.open` does with `write` and `dry_run`."""

Written = Callable[[Request], set[Inode]]
"""What a request writes to, and nobody else of us may have meanwhile."""

OTHERS = (Dependents, InUse, Locked, NotSeen, SharedBase)
"""Why a commit is refused for the sake of others, seen or not. What a pull must be refused for too its own checks tell."""


@dataclass
class Shorten:
    """All disks of one `tidy`, as many at a time as it likes."""

    request: Request
    """In the way that is tried first."""
    direction: Direction
    door: Door
    shares: Shares
    report: Report
    allow: Sequence[str]
    _turns: dict[Inode, Lock] = field(default_factory=dict)

    async def disk(self, target: Target, name: str, chain: Chain, disk: str) -> Outcome:
        """That of a running QEMU whose `chain` it is; `name` is the target's. Raises what `commit.carry_out` raises."""

        def written(request: Request) -> set[Inode]:
            plan = request.plan(chain, disk)
            return set() if plan.is_empty else {image.inode for image in plan.written if image.inode is not None}

        return await self._merged(target, name, disk, written)

    async def image(self, path: str, files: set[Inode]) -> Outcome:
        """
        The chain whose active image is, or was, at `path`; `files` are those of its images that can be told without opening it:
        chains that share one take turns, since who opens one holds all of it.
        """
        async with self._turn(files):
            return await self._opened(path)

    async def _opened(self, path: str) -> Outcome:
        """A chain that is short enough is only looked at: it may be in use."""
        try:
            async with self.door(path, write=False, dry_run=self.request.dry_run) as target:
                view = await target.chain()
                if self.request.plan(view.chain, view.disk.name).is_empty and not store.about(view.chain):
                    return proof.unchanged(view)
        except Unfinished as error:
            if self.request.dry_run or error.path != path:
                raise
            outcome = await resume.settle_image(path, allow=self.allow)
            if outcome is not None and not os.path.exists(path):
                return outcome
        async with self.door(path, write=True, dry_run=self.request.dry_run) as target:
            return await self._merged(target, path, None, lambda _request: set())

    async def _merged(self, target: Target, name: str, disk: str | None, written: Written) -> Outcome:
        *tried, last = await self._ways(target, disk)
        for request in tried:
            if any(file in self._turns and self._turns[file].locked() for file in written(request)):
                continue  # another disk of ours is built on it
            try:
                return await self._carried_out(target, name, disk, request, written(request))
            except Refused as error:
                if not all(isinstance(one, OTHERS) for one in error.parts):
                    raise
        return await self._carried_out(target, name, disk, last, written(last))

    async def _ways(self, target: Target, disk: str | None) -> list[Request]:
        """What is to be tried, one after the other; a pull that an earlier run has begun is gone on with."""
        if self.direction != "auto" or not self.request.keep:
            return [self.request]
        pull = replace(self.request, direction="pull")
        view = await target.chain(disk)
        is_at_work = earlier.under_way(view, pull.plan(view.chain, view.disk.name)) is not None
        return [pull] if is_at_work else [self.request, pull]

    async def _carried_out(
        self, target: Target, name: str, disk: str | None, request: Request, written: set[Inode]
    ) -> Outcome:
        async with self._turn(written), self.shares.one(target) as share:

            def report(progress: Progress) -> None:
                share.see(progress.job)
                self.report(replace(progress, target=name))

            return await commit.carry_out(target, disk, replace(request, speed=share.speed), report)

    @contextlib.asynccontextmanager
    async def _turn(self, files: Iterable[Inode]) -> AsyncIterator[None]:
        """Nobody else of us has these meanwhile: to each other we would be another qmpmerge."""
        async with contextlib.AsyncExitStack() as stack:
            for file in sorted(files):
                await stack.enter_async_context(self._turns.setdefault(file, Lock()))
            yield
