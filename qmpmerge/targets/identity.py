"""
Which file an image is: the one that QEMU has open, whatever its name leads to by now.

QEMU tells names, the kernel files. A name can be taken from a file, or be given to another one, at any time; and QEMU opens
base, overlay and old active image by their names again when it needs them writable, or no longer so. So it is looked as
late as possible, which leaves the microseconds between the last look and that open; nobody can close them from outside.

Two open images that have exchanged their names look right here: the kernel does not tell which was opened by which.
"""

import functools
import os
import shlex
from typing import TYPE_CHECKING

from qmpmerge.chain.chain import Image, Inode
from qmpmerge.errors import Displaced, LeftDisplaced, NotUnderItsName, Replaced
from qmpmerge.images import stashed
from qmpmerge.processes import proc
from qmpmerge.sockets import typed
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.chain.plan import Plan
    from qmpmerge.targets.target import Target


AGAIN = "run the same command again"


class Opened:
    """The files that QEMU, process `pid`, has open at this moment: none where that cannot be seen."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._files = (proc.open_files(pid) or {}) if pid is not None else {}

    def __bool__(self) -> bool:
        return bool(self._files)

    def is_at(self, path: str) -> bool:
        """Whether what the path leads to, a device by whatever name, is open."""
        return proc.identity(path) in self._files

    def descriptor(self, inode: Inode | None) -> int | None:
        """One of its descriptors of this file."""
        return self._files.get(("file", *inode)) if inode is not None else None

    def located(self, path: str, known: Inode | None) -> Inode | None:
        """
        The file that is open by the name `path`; None where that is not known. `known` is what it was earlier.

        Where it cannot be seen it is what the name leads to; not where that was another file earlier, which may have been
        opened since, or not. A name that leads nowhere cannot have been.
        """
        here = proc.inode_of(path)
        if not self:
            return here or known if None in (here, known) or here == known else None
        is_known = self.descriptor(known) is not None
        if self.is_at(path):
            return here if known == here or not is_known else None
        return known if is_known else self._by_present_name(path)

    def _by_present_name(self, path: str) -> Inode | None:
        """As the kernel calls it now: removed, put aside by one of us, or in folders that are not ours."""
        real = os.path.realpath(path)
        aside = next((name for name in stashed.names_of(real) if self.is_at(name)), None)
        names = (path, real, f"{path} (deleted)", f"{real} (deleted)")
        return proc.inode_of(aside) if aside else next((self.links[name] for name in names if name in self.links), None)

    @functools.cached_property
    def links(self) -> dict[str, Inode]:
        """What is open by the kernel's present name for it."""
        files = {number: one[1:] for one, number in self._files.items() if one[0] == "file"}
        return {proc.read_link(f"/proc/{self._pid}/fd/{number}"): inode for number, inode in files.items()}


class Astray(Value):
    """
    An image whose name `file` does not lead to it: `there` is what it leads to, `inode` what was meant, None where that is
    not known. `descriptor` is QEMU's, `now` the name that the image has now, None where it has none that is known.
    """

    file: str
    inode: Inode | None
    there: Inode | None
    pid: int | None = None
    descriptor: int | None = None
    now: str | None = None

    @property
    def found(self) -> str:
        """What is wrong, in words that tell the two files apart."""
        name = "the name leads nowhere" if self.there is None else f"the name leads to inode {self.there[1]}"
        if self.inode is None:
            return name
        meant = f"inode {self.inode[1]}" if self.there is None or self.there[0] == self.inode[0] else "another device's"
        return f"{name}, QEMU has {meant} open, {f'now {self.now}' if self.now else 'which has no name that is known'}"

    def cure(self, target: "Target", *, renamed: str, saved: str) -> str:
        """
        How to get the image back under its name, in commands that work as they are: by another name, then go on with
        `renamed`; else by a copy of what QEMU has open, with QEMU at an end after it, then go on with `saved`.
        """
        name = shlex.quote(self.file)
        aside = f"`mv -nT -- {name} {shlex.quote(f'{self.file}.other')}`, " if self.there is not None else ""
        if self.now is not None:
            return f"give it its name back: {aside}`mv -nT -- {shlex.quote(self.now)} {name}`; then {renamed}"
        if self.inode is None:
            return f"put the file that QEMU has open back under its name, then {renamed}"
        if not target.is_live:
            return f"what had it open ends with us: {aside}put a copy of it at {name}; then {saved}"
        stop, end = (f"`{typed(target.monitor.name, (command, {}))}`" for command in ("stop", "quit"))
        if self.pid is not None and proc.command_name(self.pid).startswith("qemu-storage-"):
            stop = "end whoever writes to it"
        copy = f"cp --sparse=always --preserve=mode,ownership -- {self._descriptor()} {name}"
        return (
            f"its data is in QEMU's descriptor only: save it before QEMU ends, {stop}, {aside}`{copy}`, {end}; "
            f"then {saved}"
        )

    def _descriptor(self) -> str:
        """A path to what QEMU has open; where we may not look, the command that finds it, for who may."""
        if self.descriptor is not None:
            return f"/proc/{self.pid}/fd/{self.descriptor}"
        assert self.inode is not None, "there is nothing to look for"
        folders = f"/proc/{self.pid or '[0-9]*'}/fd"
        return f'"$(find -L {folders} -type f -inum {self.inode[1]} 2> /dev/null | head -n 1)"'


def astray(image: Image, pid: int | None) -> Astray | None:
    """
    How the name of an image does not lead to it; None where it does, where it has none, and where that cannot be seen.

    A single stat where all is well.
    """
    if not image.has_path or not _is_name(image):
        return None
    there = proc.inode_of(image.file)
    if image.is_renamed:
        return Astray(image.file, None, there, pid)
    if image.inode is not None and there == image.inode:
        return None
    opened = Opened(pid)
    if image.inode is None:
        is_seen = opened and pid is not None and proc.sees_our_files(pid)
        return Astray(image.file, None, there, pid) if is_seen and not opened.is_at(image.file) else None
    number = opened.descriptor(image.inode)
    link = proc.read_link(f"/proc/{pid}/fd/{number}") if number is not None else ""
    if link == image.file:
        return None  # the name leads there for QEMU, whose folders are not ours
    now = link if proc.inode_of(link) == image.inode else None
    return Astray(image.file, image.inode, there, pid, number, now)


def refusal(astray: Astray, target: "Target", *, active: str | None = None) -> Replaced:
    """Nothing is done to a chain of which an image is astray; `active` is its active image where a job is at work on it."""
    cure = astray.cure(target, renamed=AGAIN, saved=_anew(active))
    return Replaced(file=astray.file, found=astray.found, cure=cure)


def swapped(file: str, instead: str | None = None) -> Replaced:
    """What was opened by this name is another file than the one that had it a moment before; `instead` what that is called."""
    opened = f" (QEMU has {instead} open)" if instead is not None else ""
    found = f"its name was given to another file while it was being opened{opened}"
    return Replaced(file=file, found=found, cure=f"find out who renames files there, then {AGAIN}")


def displaced(astray: Astray, target: "Target") -> Displaced:
    """An image is astray that the merge was to write to, which was taken back."""
    return Displaced(file=astray.file, found=astray.found, cure=astray.cure(target, renamed=AGAIN, saved=_anew()))


def left(astray: Astray, target: "Target", job: str, *, option: str, active: str) -> LeftDisplaced:
    """The job is at work that has written to an image which is astray, and must not end; `option` is for who follows it."""
    cure = astray.cure(target, renamed="QEMU can end the job", saved=_anew(active))
    return LeftDisplaced(target=target.name, job=job, option=option, file=astray.file, found=astray.found, cure=cure)


def _anew(active: str | None = None) -> str:
    """What is to be done once QEMU has ended: a merge that it was at work on did not happen."""
    forget = f"`qmpmerge recover {shlex.quote(active)} --use top`, " if active is not None else ""
    return f"{forget}start the VM as before, and {AGAIN}"


def unproven(astray: Astray, target: "Target", plan: "Plan") -> NotUnderItsName:
    """An image of the new chain is astray."""
    recover = f"qmpmerge recover {shlex.quote(plan.chain.active.file)}"
    saved = f"`{recover} --use base`, and start the VM from {plan.result.active.file}"
    cure = astray.cure(target, renamed=f"`{recover}`", saved=saved)
    return NotUnderItsName(file=astray.file, found=astray.found, cure=cure)


def is_temporary(image: Image) -> bool:
    """What a `snapshot=on` drive has on top: a file of QEMU's, ``vl.XXXXXX``, which it has removed at once (block.c)."""
    is_file = image.has_path or image.is_elsewhere
    return is_file and os.path.basename(image.file).startswith("vl.") and not os.path.lexists(image.file)


def is_open(image: Image, pid: int | None) -> bool | None:
    """Whether QEMU has this very file open; None where that cannot be seen."""
    opened = Opened(pid)
    if not opened or image.inode is None:
        return None
    return opened.descriptor(image.inode) is not None or opened.is_at(image.file)


def _is_name(image: Image) -> bool:
    """Not that of a descriptor that QEMU was given."""
    return not image.file.startswith("/dev/fdset/")
