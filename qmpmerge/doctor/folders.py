"""
The doctor's look at a folder with all that is below: what the names in it tell, and all chains that lie there.

Symlinks to folders are not followed and other filesystems not entered, so it comes to an end; each of these is said.
"""

import asyncio
import os
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Inode
from qmpmerge.doctor import images, leftovers
from qmpmerge.doctor.findings import Finding, Looked, sort
from qmpmerge.errors import CannotList
from qmpmerge.images import files, notes, qcow2, stashed
from qmpmerge.images.dependents import AWAY
from qmpmerge.images.walk import Layer
from qmpmerge.processes import holders

NAMED_AT_MOST = 10
"""Images that a sentence names; golden images can have a thousand built on them."""


@dataclass
class Tree:
    """A folder with all that is below: the `folders`, the files in each, and findings about what was not looked at."""

    path: str
    folders: dict[str, list["os.DirEntry[str]"]] = field(default_factory=dict)
    unseen: list[Finding] = field(default_factory=list)

    @property
    def files(self) -> Iterator["os.DirEntry[str]"]:
        """Those of all folders, what a symlink leads to by its own name where it has one there."""
        entries = [entry for found in self.folders.values() for entry in found]
        yield from sorted(entries, key=lambda entry: (entry.is_symlink(), entry.path))


async def tree(path: str) -> Tree:
    """List it; others have their turn meanwhile. Raises CannotList for `path` itself."""
    found = Tree(path)
    passed: set[Inode | None] = set()
    waiting = [path]
    while waiting:
        await asyncio.sleep(0)
        folder = waiting.pop()
        identity = files.inode(folder)
        if identity not in passed:
            passed.add(identity)
            waiting += reversed(_listed(found, folder))
    return found


def _listed(found: Tree, folder: str) -> list[str]:
    """Note the files of a folder, and return the folders in it that are to be looked at."""
    try:
        with os.scandir(folder) as entries:
            there = sorted(entries, key=lambda entry: entry.name)
        device = os.stat(folder).st_dev
    except OSError as error:
        if folder == found.path:
            raise CannotList(folder=folder, reason=error.strerror or str(error)) from None
        why = "what lies there, and is wrong, is not known: ask as a user who may list it"
        found.unseen.append(_not_looked_at(folder, f"it cannot be listed ({error.strerror})", why))
        return []
    found.folders[folder] = [entry for entry in there if _leads_to_a_file(entry)]
    below = [entry for entry in there if entry.is_dir(follow_symlinks=False)]
    return [entry.path for entry in below if _is_to_be_entered(found, entry, device)]


def _is_to_be_entered(found: Tree, entry: "os.DirEntry[str]", device: int) -> bool:
    if entry.name == AWAY:
        what = "what was put out of reach lies here, and is not looked at"
        why = "it takes up room: remove what you know that nobody needs"
        found.unseen.append(Finding("out-of-reach", "note", entry.path, what, why))
        return False
    if entry.stat(follow_symlinks=False).st_dev == device:
        return True
    command = shlex.join(["qmpmerge", "doctor", entry.path])
    why = "it is looked at where it is named"
    found.unseen.append(_not_looked_at(entry.path, "another filesystem begins here", why, command))
    return False


def _not_looked_at(where: str, what: str, why: str, command: str | None = None) -> Finding:
    return Finding("not-looked-at", "care", where, what, why, command)


def _leads_to_a_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


async def look(
    tree: Tree, *, allow: Collection[str] = (), known: Collection[object] = (), asked: Collection[object] = ()
) -> Looked:
    """
    All that is found there. Headers may name what lies below the folder, and in `allow`. Chains whose active image is one of
    `known` were looked at already, and VMs of the pids `asked` were asked themselves.
    """
    findings = [*tree.unseen]
    for folder in tree.folders:
        await asyncio.sleep(0)
        findings += [*leftovers.in_folder(folder), *leftovers.elsewhere(folder), *_unread(folder)]
    overlays = _overlays(tree)
    findings += _shared(overlays)
    walked = [images.walked(top, (*allow, tree.path)) for top in _tops(overlays)]
    findings += [found for found in walked if isinstance(found, Finding)]
    chains = [found for found in walked if not isinstance(found, Finding) and found[-1].inodes.isdisjoint(known)]
    findings += await _chains(chains, asked)
    return Looked(sort(findings), frozenset(inode for layers in chains for layer in layers for inode in layer.inodes))


async def _chains(chains: list[tuple[Layer, ...]], asked: Collection[object]) -> list[Finding]:
    """Who uses them is asked once, and each image is looked into once."""
    findings: list[Finding] = []
    users = holders.users(list(dict.fromkeys(layer.file for layers in chains for layer in layers)))
    marked: dict[frozenset[Inode], Layer] = {}
    for layers in chains:
        chain = images.as_chain(layers)
        using = tuple(user for user in users if user.file in chain.files)
        findings += images.of_chain(chain, using, asked)
        marked |= {} if using else {layer.inodes: layer for layer in layers}
    for layer in marked.values():
        findings += await images.marks(layer)
    return findings


def _overlays(tree: Tree) -> dict[str, str | None]:
    """The qcow2 images, each with the real path of what its header names; stashed ones are left out."""
    found: dict[str, str | None] = {}
    passed: set[Inode | None] = set()
    for entry in tree.files:
        identity = files.inode(entry.path)
        if identity in passed:
            continue
        passed.add(identity)
        try:
            is_aside = stashed.is_stashed(entry.path) or notes.base_of(entry.path) is not None
            header = qcow2.read(entry.path) if not is_aside else None
        except OSError:
            continue
        if header is not None:
            name = backing.named_path(header.backing) if header.backing is not None else None
            place = os.path.join(os.path.dirname(entry.path), name) if name is not None else None
            found[entry.path] = os.path.realpath(place) if place is not None else None
    return found


def _tops(overlays: dict[str, str | None]) -> list[str]:
    """Those on which no other of the images is built; of images that go round in a circle, one."""
    below = set(overlays.values())
    names = {os.path.realpath(path): path for path in overlays}
    tops = {path: None for name, path in sorted(names.items()) if name not in below}
    passed: set[str] = set()
    for path in (*tops, *sorted(overlays)):
        if path not in passed:
            tops[path] = None
        current: str | None = path
        while current is not None and current not in passed:
            passed.add(current)
            current = names.get(overlays[current] or "")
    return list(tops)


def _unread(folder: str) -> Iterator[Finding]:
    for file in (file for file, is_unread in files.unread(folder) if is_unread):
        why = "what it is built on, or is built on it, is not known: ask as a user who may read it"
        yield _not_looked_at(file, "it may not be read, and was not looked at", why)


def _shared(overlays: dict[str, str | None]) -> Iterator[Finding]:
    """Images with more than one overlay: which of them is wanted nobody can say from here."""
    built: dict[str, list[str]] = {}
    for path, name in sorted(overlays.items()):
        if name is not None:
            built.setdefault(name, []).append(path)
    for below, above in sorted(built.items()):
        if len(above) > 1:
            more = f" and {len(above) - NAMED_AT_MOST} more" if len(above) > NAMED_AT_MOST else ""
            what = f"more than one image is built on it: {', '.join(above[:NAMED_AT_MOST])}{more}"
            is_golden = os.path.dirname(below) not in map(os.path.dirname, above)
            why = (
                "as it is with a golden image: no merge changes it that does not name it"
                if is_golden
                else "one that an earlier merge left shows older data; where all are wanted, a merge into it ruins the others"
            )
            yield Finding("shared-image", "note" if is_golden else "care", below, what, why)
