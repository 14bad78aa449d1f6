"""
Tidy: every disk of several targets down to its base and its newest overlays, several disks at a time.

Here is decided which disks are meant, and what goes on at the same time; what becomes of each, in `shorten`. One disk's failure
stops no other.
"""

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from qmpmerge import given, shield
from qmpmerge.chain.chain import Inode
from qmpmerge.chain.outcome import Outcome, Policy
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.engine.pace.progress import Report, unreported
from qmpmerge.engine.pace.shares import Shares
from qmpmerge.engine.request import Request
from qmpmerge.errors import Cancelled, Error, InUse, Postponed, TimeUp, worst
from qmpmerge.given import Paths
from qmpmerge.images import files
from qmpmerge.journal import store
from qmpmerge.operations import places
from qmpmerge.operations.places import LeftOut
from qmpmerge.operations.shorten import Direction, Door, Shorten
from qmpmerge.targets import identity, live, offline  # noqa: F401 - nothing is imported once a job is at work
from qmpmerge.targets import open as doors
from qmpmerge.targets.target import Target
from qmpmerge.value import Value

PASSING = "it is a snapshot=on drive: what the guest writes there is meant to be thrown away"


class Tidied(Value):
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


class Tidying(Value):
    """All disks, in the order of their targets, and what is not meant: VMs (`every`), disks of one, images of a folder."""

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
    which the chains are meant whose active image lies right there and is not in use. With `every` all VMs of this host that we
    may touch are targets too. What is named twice, or is open in a VM among the targets, is one.

    `parallel` disks go on at a time, and share `speed` (bytes a second, 0 for unlimited). `direction` ``pull`` pulls what goes
    into the oldest overlay that stays, so that the base is left as it is; ``auto`` does so where a commit is refused for the
    sake of others, and goes on with a pull that was left. At the time limit nothing more is begun, merges of running QEMUs are
    left to them, and those of images are taken back. `door` makes the sessions. The rest is as of `commit`.

    What earlier runs have begun is gone on with, so this can be killed and called again. Cancelling the task cancels what is
    merged, and waits until all old chains are back; `told` hears of those too.

    An error of one disk or target is in its `Tidied`, and stops no other. Raises ValueError for numbers that make no sense,
    OptionsConflict for a pull that is to keep no overlay to pull into.
    """
    given.see(direction, Direction, "direction")
    given.see_count(parallel, "parallel", least=1)
    request = Request(
        direction="pull" if direction == "pull" else "commit",
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
    shorten = Shorten(request, direction, opens, Shares(speed), report or unreported, allowed)
    run = _Tidy(shorten, told or _untold, parallel, left_out)
    disks = await run.all(names)
    return Tidying(tuple(disks), tuple(run.left_out))


def _untold(done: Tidied) -> None:
    """Tells nobody."""


def _door(force: Collection[str], allow: Sequence[str]) -> Door:
    def opened(name: str, *, write: bool, dry_run: bool) -> AbstractAsyncContextManager[Target]:
        return doors.open(name, write=write, dry_run=dry_run, force=force, allow=allow)

    return opened


@dataclass
class _Tidy:
    """So many sessions at the most, and so many disks: what waits for its turn holds no monitor."""

    shorten: Shorten
    told: Told
    parallel: int
    left_out: list[LeftOut]
    files: set[Inode] = field(default_factory=set)
    """The images of the targets before: those of a folder are not the disks of a VM."""
    found: set[str] = field(default_factory=set)
    """What folders hold, and nobody has named: only what is not in use is meant."""

    def __post_init__(self) -> None:
        self.sessions = asyncio.Semaphore(self.parallel)
        self.turns = asyncio.Semaphore(self.parallel)

    @property
    def request(self) -> Request:
        return self.shorten.request

    async def all(self, names: Sequence[str]) -> list[Tidied]:
        """Folders come last: what is not in use there is what no target before has."""
        folders = [name for name in names if os.path.isdir(name)]
        others = [name for name in names if name not in folders]
        done = dict(zip(others, await shield.together(map(self._target, others)), strict=True))
        for folder in folders:
            done[folder] = await self._folder(folder)
        return [one for name in names for one in done[name]]

    async def _target(self, name: str) -> list[Tidied]:
        """All disks of a target in its order, or where cancelled as they ended; one that cannot be opened has no disk."""
        done: list[Tidied] = []
        disk = os.path.basename(name) if doors.is_image(name) or _had_image(name) else None
        try:
            async with self.sessions:
                self._refuse_late()
                if disk is not None:
                    await self._told(done, name, disk, lambda: self._image(name))
                else:
                    await self._vm(name, done)
        except (Error, asyncio.CancelledError) as error:
            if not done or isinstance(error, Error):
                self._tell(done, _failed(name, disk, error))
        return done

    async def _vm(self, name: str, done: list[Tidied]) -> None:
        async with self.shorten.door(name, write=True, dry_run=self.request.dry_run) as target:
            chains = {disk.name: disk.chain for disk in await target.disks() if disk.chain is not None}
            self.files |= {image.inode for chain in chains.values() for image in chain if image.inode is not None}
            passing = [disk for disk, chain in chains.items() if identity.is_temporary(chain.active)]
            self.left_out += [LeftOut(name, PASSING, disk) for disk in passing]
            await shield.together(
                self._told(done, name, disk, functools.partial(self.shorten.disk, target, name, chain, disk))
                for disk, chain in chains.items()
                if disk not in passing
            )
            done.sort(key=lambda one: [*chains].index(one.disk or ""))

    async def _folder(self, folder: str) -> list[Tidied]:
        try:
            images = places.chains(os.path.abspath(folder), self.files)
            if not images:
                self.left_out += places.passed_by(folder, self.files)
        except Error as error:
            return self._tell([], _failed(folder, None, error))
        self.found |= {*images}
        return [one for found in await shield.together(map(self._target, images)) for one in found]

    async def _told(self, done: list[Tidied], name: str, disk: str, work: Callable[[], Awaitable[Outcome]]) -> None:
        """Do `work` in its turn, and tell what comes of it; whatever that is, others go on."""
        try:
            async with self.turns:
                self._tell(done, Tidied(name, disk, await work()))
        except (Error, asyncio.CancelledError) as error:
            used = _is_used(name, error) if name in self.found else None
            if used is not None:
                self.left_out.append(LeftOut(name, used))
            else:
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
        images = places.images(path, self.shorten.allow)
        self.files |= images
        return await self.shorten.image(path, images)


def _failed(name: str, disk: str | None, error: BaseException) -> Tidied:
    if isinstance(error, TimeUp):
        error = Postponed(seconds=error.seconds)
    return Tidied(name, disk, error=error if isinstance(error, Error) else Cancelled())


def _is_used(image: str, error: BaseException) -> str | None:
    """That the error is that somebody has this very image in use."""
    users = error.parts if isinstance(error, Error) else ()
    same = (one for one in users if isinstance(one, InUse) and files.real(one.file) == files.real(image))
    return next((f"it is in use by {', '.join(one.holders)}" for one in same), None)


def _had_image(name: str) -> bool:
    """Whether a merge has taken this name away from an image."""
    return not os.path.exists(name) and store.beside(name) is not None
