"""
Tidy: every disk of several targets down to its base and its newest overlays, several disks at a time.

Each merge is one of `operations.commit`, with its checks and its proof. Here is decided which disks are meant, what goes on at
the same time, and how fast; one disk's failure stops no other.
"""

import asyncio
import contextlib
import functools
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

from qmpmerge import given, shield
from qmpmerge.chain.chain import Inode
from qmpmerge.chain.outcome import Outcome, Policy
from qmpmerge.engine import proof, resume
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.engine.pace.progress import Progress, Report, unreported
from qmpmerge.engine.pace.shares import Shares
from qmpmerge.engine.request import Request
from qmpmerge.errors import (
    Cancelled,
    Dependents,
    Error,
    Postponed,
    Refused,
    SeveralRefusals,
    SharedBase,
    TimeUp,
    Unfinished,
    worst,
)
from qmpmerge.given import Paths
from qmpmerge.journal import store
from qmpmerge.operations import commit, places
from qmpmerge.operations.places import LeftOut
from qmpmerge.targets import live, offline  # noqa: F401 - nothing is imported once a job is at work
from qmpmerge.targets import open as doors
from qmpmerge.targets.target import Target

Direction = Literal["auto", "commit", "pull"]

Door = Callable[..., AbstractAsyncContextManager[Target]]
"""What makes a session, as `targets.open.open` does with `write` and `dry_run`."""


@dataclass(frozen=True)
class Tidied:
    """
    One disk: what came of it, or the error for which it is as it was. `target` is the word for which a command takes it, an
    image's own path where it lies in a folder; `disk` is None where the target's disks could not be looked at.
    """

    target: str
    disk: str | None
    outcome: Outcome | None = None
    error: Error | None = None

    @property
    def verdict(self) -> str:
        """That of the outcome or the error."""
        if self.outcome is not None:
            return self.outcome.verdict
        return self.error.verdict if self.error is not None else "unchanged"


@dataclass(frozen=True)
class Tidying:
    """All disks, in the order of their targets, and the VMs that were not meant (`every`)."""

    tidied: tuple[Tidied, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def error(self) -> Error | None:
        """The worst of all errors, None where there is none."""
        errors = {one.error.exit_code: one.error for one in reversed(self.tidied) if one.error is not None}
        return errors.get(worst(errors))

    @property
    def verdict(self) -> str:
        """That of the worst error; else ``planned``, ``done``, or ``unchanged`` where there was nothing to do."""
        if self.error is not None:
            return self.error.verdict
        verdicts = {one.verdict for one in self.tidied} - {"unchanged"}
        return "unchanged" if not verdicts else "planned" if verdicts == {"planned"} else "done"


Told = Callable[[Tidied], None]
"""Who is told of each disk as soon as it is done."""


async def tidy(
    targets: Paths = (),
    *,
    keep: int,
    every: bool = False,
    direction: Direction = "commit",
    parallel: int = 2,
    speed: int | None = None,
    merged_files: Policy | None = None,
    force: Collection[str] = (),
    allow: Paths = (),
    search: Paths = (),
    dry_run: bool = False,
    agreed: Sequence[Outcome] | None = None,
    timeout: float | None = None,
    patience: Patience | None = None,
    door: Door | None = None,
    told: Told | None = None,
    report: Report | None = None,
) -> Tidying:
    """
    Bring every disk of every target down to its base and its newest `keep` overlays: running QEMUs, images, and folders, of
    which the chains are meant whose active image lies right there, and no QEMU among the targets has. With `every` all VMs of
    this host that we may touch are targets too.

    `parallel` disks go on at a time, and share `speed` (bytes a second, 0 for unlimited). `direction` ``pull`` pulls what goes
    into the oldest overlay that stays, so that the base is left as it is; ``auto`` does so where others use the base, and
    commits elsewhere. At the time limit nothing more is begun, merges of running QEMUs are left to them, and those of images
    are taken back. `door` makes the sessions. The rest is as of `commit`.

    What earlier runs have begun is gone on with, so this can be killed and called again. Cancelling the task cancels what is
    merged, and waits until all old chains are back; `told` hears of those too.

    An error of one disk or target is in its `Tidied`, and stops no other. Raises ValueError for numbers that make no sense.
    """
    given.see(direction, Direction, "direction")
    given.see_amount(parallel, "parallel", least=1)
    request = Request(
        keep=keep,
        merged_files=merged_files,
        force=given.forced(force),
        search=given.paths(search),
        dry_run=dry_run,
        agreed=agreed,
        patience=patience or Patience(timeout),
    )
    allowed = given.paths(allow)
    opens = door or _door(force, allowed)
    found, left_out = places.every() if every else ([], [])
    names = places.once([*given.paths(targets), *found])
    run = _Tidy(request, direction, opens, told or _untold, report or unreported, Shares(speed), parallel, allowed)
    disks = await run.all(names)
    return Tidying(tuple(disks), tuple(left_out))


def _untold(done: Tidied) -> None:
    """Tells nobody."""


def _door(force: Collection[str], allow: Sequence[str]) -> Door:
    def opened(name: str, *, write: bool, dry_run: bool) -> AbstractAsyncContextManager[Target]:
        return doors.open(name, write=write, dry_run=dry_run, force=force, allow=allow)

    return opened


@dataclass
class _Tidy:
    """So many sessions at the most, and so many disks: what waits for its turn holds no monitor."""

    request: Request
    direction: Direction
    door: Door
    told: Told
    report: Report
    shares: Shares
    parallel: int
    allow: Sequence[str]
    files: set[Inode] = field(default_factory=set)
    """The images of the targets before: those of a folder are not the disks of a VM."""
    locks: dict[Inode, asyncio.Lock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sessions = asyncio.Semaphore(self.parallel)
        self.turns = asyncio.Semaphore(self.parallel)

    async def all(self, names: Sequence[str]) -> list[Tidied]:
        """Folders come last: what is not in use there is what no target before has."""
        folders = [name for name in names if os.path.isdir(name)]
        others = [name for name in names if name not in folders]
        done = dict(zip(others, await shield.together(map(self._target, others)), strict=True))
        for folder in folders:
            done[folder] = await self._folder(folder)
        return [one for name in names for one in done[name]]

    async def _target(self, name: str) -> list[Tidied]:
        """All disks of a target, as they are done; one that cannot be opened is an entry without a disk."""
        done: list[Tidied] = []
        try:
            async with self.sessions:
                self._refuse_late()
                if doors.is_image(name) or _had_image(name):
                    await self._told(done, name, os.path.basename(name), lambda: self._image(name))
                else:
                    await self._vm(name, done)
        except (Error, asyncio.CancelledError) as error:
            if not done or isinstance(error, Error):
                self._tell(done, _failed(name, None, error))
        return done

    async def _vm(self, name: str, done: list[Tidied]) -> None:
        async with self.door(name, write=True, dry_run=self.request.dry_run) as target:
            chains = {disk.name: disk.chain for disk in await target.disks() if disk.chain is not None}
            self.files |= {image.inode for chain in chains.values() for image in chain if image.inode is not None}
            await shield.together(
                self._told(done, name, disk, functools.partial(self._merged, target, name, disk)) for disk in chains
            )

    async def _folder(self, folder: str) -> list[Tidied]:
        try:
            images = places.chains(os.path.abspath(folder), self.files)
        except Error as error:
            return self._tell([], _failed(folder, None, error))
        return [one for found in await shield.together(map(self._target, images)) for one in found]

    async def _told(self, done: list[Tidied], name: str, disk: str, work: Callable[[], Awaitable[Outcome]]) -> None:
        """Do `work` in its turn, and tell what comes of it; whatever that is, others go on."""
        try:
            async with self.turns:
                self._tell(done, Tidied(name, disk, await work()))
        except (Error, asyncio.CancelledError) as error:
            self._tell(done, _failed(name, disk, error))

    def _tell(self, done: list[Tidied], entry: Tidied) -> list[Tidied]:
        done.append(entry)
        self.told(entry)
        return done

    def _refuse_late(self) -> None:
        """Raises Postponed after the time limit."""
        patience = self.request.patience
        if patience.left is not None and patience.left <= 0:
            raise Postponed(seconds=patience.timeout or 0.0)

    async def _image(self, path: str) -> Outcome:
        """Chains that share an image take turns: who opens one holds all of it."""
        images = places.images(path, self.allow)
        self.files |= images
        async with contextlib.AsyncExitStack() as stack:
            for image in sorted(images):
                await stack.enter_async_context(self.locks.setdefault(image, asyncio.Lock()))
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
            return await self._merged(target, path, None)

    async def _merged(self, target: Target, name: str, disk: str | None) -> Outcome:
        first: Literal["commit", "pull"] = "pull" if self.direction == "pull" else "commit"
        try:
            return await self._carried_out(target, name, disk, replace(self.request, direction=first))
        except Refused as error:
            if self.direction != "auto" or not _is_for_others(error) or not self.request.keep:
                raise
        return await self._carried_out(target, name, disk, replace(self.request, direction="pull"))

    async def _carried_out(self, target: Target, name: str, disk: str | None, request: Request) -> Outcome:
        async with self.shares.one(target) as share:

            def report(progress: Progress) -> None:
                share.see(progress.job)
                self.report(replace(progress, target=name))

            return await commit.carry_out(target, disk, replace(request, speed=share.speed), report)


def _failed(name: str, disk: str | None, error: BaseException) -> Tidied:
    if isinstance(error, TimeUp):
        error = Postponed(seconds=error.seconds)
    return Tidied(name, disk, error=error if isinstance(error, Error) else Cancelled())


def _had_image(name: str) -> bool:
    """Whether a merge has taken this name away from an image."""
    return not os.path.exists(name) and store.beside(name) is not None


def _is_for_others(refusal: Refused) -> bool:
    """Whether all that stands against a commit is that others use what it writes to."""
    refusals = refusal.refusals if isinstance(refusal, SeveralRefusals) else [refusal]
    return all(isinstance(one, SharedBase | Dependents) for one in refusals)
