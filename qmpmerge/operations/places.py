"""Where several disks are that one command is meant for: VMs of this host, each once, and the chains of a folder."""

import itertools
import os
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

from qmpmerge.chain.chain import Inode
from qmpmerge.errors import CannotList, Error
from qmpmerge.images import formats, overlays, stashed, walk
from qmpmerge.images.formats import Found
from qmpmerge.images.overlays import Around
from qmpmerge.journal import store
from qmpmerge.journal.record import Record
from qmpmerge.processes import proc
from qmpmerge.processes.vms import Vm, vms
from qmpmerge.sockets import Address
from qmpmerge.targets import live
from qmpmerge.targets.open import is_image
from qmpmerge.value import Value

MOST_FOLDERS = 100
"""In which images are looked for that somebody may have meant."""


class LeftOut(Value):
    """What is not meant, and why: a VM, one of its disks, an image or a folder; `hint` says what may be done about it."""

    target: str
    reason: str
    disk: str | None = None
    hint: str | None = None


def every() -> tuple[list[str], list[LeftOut]]:
    """
    The running QEMUs of this host that we may touch, by name or pid, and the others. Anybody can start a process that looks
    like one and tells us which files to rename: only those of root and of ourselves are not left out.
    """
    found = vms()
    named = Counter(vm.name for vm in found)
    names = {
        vm.pid: vm.name if vm.name and _is_a_name(vm.name) and named[vm.name] == 1 else f"pid:{vm.pid}" for vm in found
    }
    reasons = {vm.pid: _reason(vm) for vm in found}
    left_out = [LeftOut(names[pid], reason) for pid, reason in reasons.items() if reason is not None]
    return [names[pid] for pid, reason in reasons.items() if reason is None], left_out


def _is_a_name(name: str) -> bool:
    """Whether a command takes it for one."""
    return "/" not in name and ":" not in name and not name.startswith("-") and not os.path.lexists(name)


def _reason(vm: Vm) -> str | None:
    if vm.libvirt:
        return "libvirt manages it"
    if not vm.monitors:
        return "it has no QMP monitor"
    if vm.is_foreign:
        return f"user {vm.user} runs it"
    if not any(address.startswith("tcp:") or os.access(address, os.W_OK) for address in vm.monitors):
        return "its monitor is not ours to use"
    return None


def once(names: Iterable[str]) -> list[str]:
    """The same targets, each once: a VM is named by its name, pid or any monitor, or by an image that it has open."""
    seen: set[Address] = set()
    opened: set[Inode] = set()
    kept = []
    named = [*dict.fromkeys(names)]
    running = vms() if len(named) > 1 else []
    for name in named:
        addresses, pids = _place(name, running)
        if not addresses & seen:
            kept.append(name)
        seen |= addresses
        opened = opened.union(*map(proc.open_inodes, pids))
    return [name for name in kept if not (is_image(name) and proc.inode_of(name) in opened)]


def _place(name: str, running: Sequence[Vm]) -> tuple[set[Address], set[int]]:
    """All monitors of a running QEMU, and its pid, as far as we take its word; the path of what else there is."""
    if is_image(name) or os.path.isdir(name):
        return {os.path.realpath(name)}, set()
    try:
        found, _vm = live.find(name)
    except Error:  # told when it is opened
        return set(), set()
    named = {_real(address) for address in found}
    known = (vm for vm in running if not vm.is_foreign)
    theirs = {vm.pid: {_real(live.address(monitor)) for monitor in vm.monitors} for vm in known}
    meant = {pid: addresses for pid, addresses in theirs.items() if addresses & named}
    return named.union(*meant.values()), {*meant}


def _real(address: Address) -> Address:
    return os.path.realpath(address) if isinstance(address, str) else address


def chains(folder: str, known: Collection[Inode]) -> list[str]:
    """
    The active images in a folder that lead to others and are not `known`, as far as headers and notes tell. Where a merge was
    not finished its record tells, wherever the names of its images are. Raises CannotList.
    """
    try:
        there = {image.inode: image for image in _images(folder)}
    except OSError as error:
        raise CannotList(folder=folder, reason=error.strerror or str(error)) from None
    around = Around(folder)
    below = {inode for image in there.values() for inode in image.below}
    records = [found for found in store.in_folder(folder) if isinstance(found, Record)]
    recorded = [record for record in records if not record.concerns(set(known))]
    leaves = [
        image.file
        for inode, image in there.items()
        if inode not in {*below, *known}
        and not any(record.concerns({inode}) for record in records)
        and _is_active(image, folder, around)
    ]
    return list(dict.fromkeys([*leaves, *(record.chain.active.file for record in recorded)]))


def passed_by(folder: str, known: Collection[Inode]) -> list[LeftOut]:
    """
    The folder, where none of its own images has layers, and folders below hold some that do and are not `known`: somebody has
    named the wrong one. Of a large tree the first folders are looked at. Raises CannotList.
    """
    if chains(folder, ()):
        return []
    below = itertools.islice((place for place, _folders, _files in os.walk(folder) if place != folder), MOST_FOLDERS)
    place = next((place for place in below if _holds_chains(place, known)), None)
    if place is None:
        return []
    hint = f"name the folders below it that hold images, such as {shlex.quote(place)}"
    return [LeftOut(folder, "no chain has its active image right there", hint=hint)]


def _holds_chains(folder: str, known: Collection[Inode]) -> bool:
    try:
        return any((image.below or image.dangling) and image.inode not in known for image in _images(folder))
    except OSError:  # it may not be listed
        return False


def images(path: str, allow: Collection[str]) -> set[Inode]:
    """The files of the chain whose active image is, or was, at `path`, as far as they can be told without opening it."""
    found = store.beside(path)
    told = {image.inode for image in found.chain if image.inode is not None} if isinstance(found, Record) else set()
    try:
        return told.union(*(layer.inodes for layer in walk.walk(path, allow=allow)))
    except Error:  # told when it is opened
        return told


def _images(folder: str) -> Iterator[Found]:
    """A file by its own name, where it has one here and a symlink too."""
    for image in sorted(overlays.in_folder(folder), key=lambda path: (not os.path.islink(path), path)):
        try:
            yield formats.read(image)
        except OSError:  # no image that QEMU could open
            continue


def _is_active(image: Found, folder: str, around: Around) -> bool:
    """Whether it has layers, is not what a merge has put aside, and is built on nowhere."""
    if image.is_aside or stashed.original_of(image.file) or not (image.below or image.dangling):
        return False
    return image.file in overlays.above(image.file, folder, around).leaves
