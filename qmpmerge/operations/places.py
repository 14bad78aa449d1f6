"""Where several disks are that one command is meant for: VMs of this host, each once, and the chains of a folder."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from qmpmerge.chain.chain import Inode
from qmpmerge.errors import CannotList, Error
from qmpmerge.images import formats, overlays, stashed, walk
from qmpmerge.images.formats import Found
from qmpmerge.images.overlays import Around
from qmpmerge.journal import store
from qmpmerge.journal.record import Record
from qmpmerge.processes.vms import Vm, vms
from qmpmerge.sockets import Address
from qmpmerge.targets import live
from qmpmerge.targets.open import is_image


@dataclass(frozen=True)
class LeftOut:
    """A running QEMU that is not ours to touch unless it is named, and why."""

    target: str
    reason: str


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
    """The same targets, each once, whether it is named by its name, pid or monitor."""
    seen: set[Address] = set()
    kept = []
    for name in dict.fromkeys(names):
        addresses = set(_addresses(name))
        if not addresses & seen:
            kept.append(name)
        seen |= addresses
    return kept


def _addresses(name: str) -> Iterator[Address]:
    """The monitors of a running QEMU; the path of what else there is."""
    if is_image(name) or os.path.isdir(name):
        yield os.path.realpath(name)
        return
    try:
        found, _vm = live.find(name)
    except Error:  # told when it is opened
        return
    yield from (os.path.realpath(one) if isinstance(one, str) else one for one in found)


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
