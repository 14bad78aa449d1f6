"""
The doctor's look at several targets: VMs, images, and folders with all that is below.

Of a folder's images it is also told what `active` says: a launch script asks that.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from qmpmerge import given
from qmpmerge.doctor import folders, images
from qmpmerge.doctor import target as doctor
from qmpmerge.doctor.findings import SEVERITIES, Finding, Looked, Severity, sort
from qmpmerge.errors import Error, worst
from qmpmerge.given import Paths
from qmpmerge.images import formats, overlays
from qmpmerge.images.formats import Found
from qmpmerge.operations import active
from qmpmerge.targets import open as doors
from qmpmerge.targets.open import is_image
from qmpmerge.targets.target import Target
from qmpmerge.value import Value

Door = Callable[[str], AbstractAsyncContextManager[Target]]
"""What makes a session with a running QEMU, as `targets.open.open` does."""


class Examined(Value):
    """A target: the findings about it that no target before it had, or the error for which it was not looked at."""

    target: str
    findings: tuple[Finding, ...] = ()
    error: Error | None = None

    @property
    def verdict(self) -> str:
        """``done``, or that of the error."""
        return "done" if self.error is None else self.error.verdict


class Examination(Value):
    """All targets, as they were named; how many VMs (and storage daemons) and image files were looked at."""

    targets: tuple[Examined, ...]
    vms: int
    images: int

    @property
    def findings(self) -> tuple[tuple[str, Finding], ...]:
        """All of them, each with its target: the worst first."""
        found = [(one.target, finding) for one in self.targets for finding in one.findings]
        return tuple(sorted(found, key=lambda pair: SEVERITIES.index(pair[1].severity)))

    @property
    def severity(self) -> Severity | None:
        """That of the worst finding; None where there is none."""
        return next((finding.severity for _target, finding in self.findings), None)

    @property
    def errors(self) -> list[Error]:
        """Why targets were not looked at."""
        return [one.error for one in self.targets if one.error is not None]

    @property
    def error(self) -> Error | None:
        """The worst of them, None where every target was looked at."""
        errors = {error.exit_code: error for error in reversed(self.errors)}
        return errors.get(worst(errors))

    @property
    def verdict(self) -> str:
        """``done``, or that of the worst error."""
        return "done" if self.error is None else self.error.verdict


async def examine(
    target: "Target | str | os.PathLike[str]",
    *,
    allow: Paths = (),
    search: Paths = (),
    form: str | None = None,
) -> tuple[Finding, ...]:
    """
    All findings about one target, the worst first: a session with a running QEMU, or whatever `examine_all` takes. Empty where
    all of it was looked at and nothing is wrong.

    Raises what a session with a QEMU raises, ImageUnreadable, CannotList, ToolMissing.
    """
    if isinstance(target, Target) and target.is_live:
        return (await doctor.look(target, refusal=active.refusal, search=given.paths(search))).findings
    name = target.name if isinstance(target, Target) else os.fspath(target)
    return (await _Run(given.paths(allow), given.paths(search), form, doors.open).look_at(name)).findings


async def examine_all(
    targets: Paths,
    *,
    allow: Paths = (),
    search: Paths = (),
    form: str | None = None,
    door: Door | None = None,
) -> Examination:
    """
    All findings about running QEMUs (by whatever names a `Target` has), images and folders, in which all folders below are
    looked at too. An error of one target stops no other. What two targets show is told of one: of a running QEMU rather than
    of its images, since that knows more.

    `allow`, `form` and `search` are those of `walk.walk` and of `doctor.target.look`; `door` opens running QEMUs, `open` where
    there is none. Raises nothing but bugs.
    """
    named = list(dict.fromkeys(given.paths(targets)))
    run = _Run(given.paths(allow), given.paths(search), form, door or doors.open)
    done = {
        name: await run.examine(name) for name in sorted(named, key=lambda name: (_is_folder(name), _is_path(name)))
    }
    return Examination(tuple(done[name] for name in named), len(run.vms), len(run.images))


@dataclass
class _Run:
    """One look at several targets, and what was seen so far."""

    allow: Collection[str]
    search: Collection[str]
    form: str | None
    door: Door
    vms: set[object] = field(default_factory=set)
    """By their pids, where the kernel tells them."""
    images: set[object] = field(default_factory=set)
    told: set[tuple[str, str, str]] = field(default_factory=set)
    """Name, place and sentence of the findings about files."""

    async def examine(self, name: str) -> Examined:
        """One target, or why not."""
        try:
            looked = await self.look_at(name)
        except Error as error:
            return Examined(name, error=error)
        return Examined(name, tuple(self._news(looked.findings)))

    async def look_at(self, name: str) -> Looked:
        """A VM, an image or a folder."""
        if not _is_path(name):
            return await self._look_at_vm(name)
        path = os.path.abspath(name)
        if os.path.isdir(path):
            return await self._look_at_folder(path)
        looked = await images.look(path, allow=self.allow, search=self.search, form=self.form, asked=self.vms)
        self.images |= looked.images
        return looked

    async def _look_at_vm(self, name: str) -> Looked:
        async with self.door(name) as session:
            identity = session.pid or name
            if identity in self.vms:
                return Looked((), frozenset())
            looked = await doctor.look(session, refusal=active.refusal, search=self.search)
        self.vms.add(identity)
        self.images |= looked.images
        return looked

    async def _look_at_folder(self, path: str) -> Looked:
        tree = await folders.tree(path)
        looked = await folders.look(tree, allow=self.allow, known=self.images, asked=self.vms)
        self.images |= looked.images
        findings = [*looked.findings]
        for folder in tree.folders:
            there = list(_images(folder))
            self.images |= {image.inode for image in there}
            findings += _refused(folder, there, findings)
        return Looked(sort(findings), looked.images)

    def _news(self, findings: Sequence[Finding]) -> Iterator[Finding]:
        """All but those about files that another target has shown."""
        for finding in findings:
            key = (finding.name, finding.where, finding.message)
            if not finding.where.startswith("/"):
                yield finding
            elif key not in self.told:
                self.told.add(key)
                yield finding


def _is_path(name: str) -> bool:
    return is_image(name) or _is_folder(name)


def _is_folder(name: str) -> bool:
    return os.path.isdir(name)


def _images(folder: str) -> Iterator[Found]:
    for image in overlays.in_folder(folder):
        try:
            yield formats.read(image)
        except OSError:  # told already
            continue


def _refused(folder: str, there: Sequence[Found], found: Sequence[Finding]) -> Iterator[Finding]:
    """Images on which nothing is built here, and from which no launch script gets a VM started, where nothing else says why."""
    told = {word for one in found if one.severity != "note" for word in (one.where, *_paths(one.message))}
    below = {inode for image in there for inode in image.below}
    around = overlays.Around(folder)
    for image in (image.file for image in there if image.inode not in below and not image.is_aside):
        error = active.refusal(image, around)
        if error is not None and told.isdisjoint((image, *_paths(str(error)))):
            why = f"`qmpmerge active` refuses, and so does a launch script that asks it: {error.hint}"
            yield Finding(error.name, "care", image, str(error), why)


def _paths(text: str) -> list[str]:
    return [word.strip("(),:;") for word in text.split() if "/" in word]
