"""
The doctor's look at images that no session leads to: an image with the chain below it, or all chains of a folder.

Headers and names are all that is read, by the rule for names (`diskwalk`): nothing foreign is followed, nothing probed.
"""

import os
import shlex
from collections.abc import Collection, Iterator

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.doctor import leftovers, target
from qmpmerge.doctor.findings import Finding, Severity, sort
from qmpmerge.errors import ImageUnreadable, Refused
from qmpmerge.images import dependents, files, notes, qcow2, qemuimg, stashed, walk
from qmpmerge.images.walk import Layer
from qmpmerge.processes import holders
from qmpmerge.processes.holders import User

_WHY: dict[str, tuple[Severity, str]] = {
    "disguised": ("care", "whoever opens it without a format follows its header to any file of this host"),
    "foreign-name": ("care", "what lies behind that name is not looked at: it could be any file, device or server"),
    "no-format": ("care", "a raw image could make whoever opens the chain read any file of this host"),
    "backing-loop": ("harm", "no program can open the chain"),
    "too-deep": ("harm", "QEMU 10 and 11 crash at the first read through some 870 images"),
    "unsupported-format": ("note", "qmpmerge cannot merge this chain offline"),
    "image-unreadable": ("harm", "a VM that is started on this chain does not start"),
}


async def examine_path(
    path: "str | os.PathLike[str]",
    *,
    allow: Collection[str] = (),
    search: Collection[str] = (),
    form: str | None = None,
) -> tuple[Finding, ...]:
    """As `operations.examine.examine_path`, without what `active` says of a folder's images."""
    path = os.path.abspath(os.fspath(path))
    if not os.path.exists(path):
        raise ImageUnreadable(file=path, reason="No such file or directory")
    if not os.path.isdir(path):
        return sort([*await _chain(path, allow, form), *_beside(path, allow, search, form)])
    overlays = _overlays(path)
    findings = [*leftovers.in_folder(path), *leftovers.elsewhere(path), *_unread(path), *_shared(overlays)]
    for image in _tops(overlays):
        findings += await _chain(image, allow)
    return sort(findings)


async def _chain(image: str, allow: Collection[str], form: str | None = None) -> list[Finding]:
    try:
        layers = walk.walk(image, allow=allow, form=form)
    except Refused as error:
        severity, why = _WHY[error.name]
        return [Finding(error.name, severity, image, str(error), f"{why}: {error.hint}")]
    chain = _as_chain(layers)
    users = holders.users(chain.files)
    findings = [*_used(chain, users), *target.disguised(chain.images), *_deep(chain)]
    return [*findings, *([] if users else await _marks(layers))]


def _beside(image: str, allow: Collection[str], search: Collection[str], form: str | None) -> list[Finding]:
    """Which chain is meant is known: other images that are built on it are leftovers, or somebody's."""
    try:
        return leftovers.beside(_as_chain(walk.walk(image, allow=allow, form=form)), search)
    except Refused:
        return leftovers.in_folder(os.path.dirname(image))


def _as_chain(layers: tuple[Layer, ...]) -> Chain:
    return Chain(tuple(map(_image, layers)))


def _image(layer: Layer) -> Image:
    status = os.stat(layer.file)
    return Image(layer.file, layer.format, 0, inode=(status.st_dev, status.st_ino), slice=layer.slice)


def _used(chain: Chain, users: tuple[User, ...]) -> Iterator[Finding]:
    """One finding a user, about the topmost image that it has open: a VM knows more than the headers do."""
    for user in {(user.pid, user.name): user for user in users}.values():
        if user.vm is not None and user.vm.monitors:
            command = f"qmpmerge doctor {shlex.quote(user.vm.name or f'pid:{user.pid}')}"
            yield Finding("in-use", "note", user.file, f"{user} has it open", "what QEMU knows is told there", command)
        else:
            why = "what is said here may be out of date"
            yield Finding("in-use", "note", user.file, f"{user} has it open", why, user.release)
        if user.file != chain.active.file and user.vm is not None:
            what = f"{user} has {user.file}, below it, open, and this image not"
            why = "if a merge left it, it shows older data; else every write of that VM to what lies below ruins it"
            yield Finding("used-below", "care", chain.active.file, what, why)


def _deep(chain: Chain) -> Iterator[Finding]:
    if len(chain) >= target.DEEP:
        yield target.deep(chain.active.file, chain, shlex.quote(chain.active.file))


async def _marks(layers: tuple[Layer, ...]) -> list[Finding]:
    """What QEMU has marked in the headers of images that nobody has open."""
    findings = []
    for layer in layers:
        if layer.format != "qcow2" or layer.encrypted:
            continue
        try:
            header = await (
                qemuimg.info(layer.file, "qcow2") if layer.slice is None else qemuimg.info_of(_image(layer))
            )
        except ImageUnreadable as error:
            severity, why = _WHY[error.name]
            findings.append(Finding(error.name, severity, layer.file, str(error), f"{why}: {error.hint}"))
            continue
        if header.corrupt:
            why = "QEMU opens it only for reading: save what it holds before you repair it"
            command = shlex.join(["qemu-img", "check", "-r", "all", "-f", "qcow2", layer.file])
            findings.append(Finding("corrupt", "harm", layer.file, "it is marked as corrupt", why, command))
        for name in header.open_bitmaps:
            command = shlex.join(["qemu-img", "bitmap", "--remove", "-f", "qcow2", layer.file, name])
            findings.append(target.inconsistent(layer.file, name, command))
    return findings


def _overlays(folder: str) -> dict[str, str | None]:
    """The qcow2 images of a folder, each with the real path of what its header names; stashed ones are left out."""
    images: dict[str, str | None] = {}
    for entry in dependents.files(folder):
        try:
            is_aside = stashed.is_stashed(entry.path) or notes.base_of(entry.path) is not None
            header = qcow2.read(entry.path) if not is_aside else None
        except OSError:
            continue
        if header is not None:
            name = backing.named_path(header.backing) if header.backing is not None else None
            images[entry.path] = os.path.realpath(os.path.join(folder, name)) if name is not None else None
    return images


def _tops(overlays: dict[str, str | None]) -> list[str]:
    """Those on which no other image of the folder is built; of images that go round in a circle, one."""
    tops = sorted(path for path in overlays if os.path.realpath(path) not in overlays.values())
    names = {os.path.realpath(path): path for path in overlays}
    passed: set[str] = set()
    for path in (*tops, *sorted(overlays)):
        if path not in tops and path not in passed:
            tops.append(path)
        current: str | None = path
        while current is not None and current not in passed:
            passed.add(current)
            current = names.get(overlays[current] or "")
    return tops


def _unread(folder: str) -> Iterator[Finding]:
    for file in (file for file, is_unread in files.unread(folder) if is_unread):
        why = "what it is built on, or is built on it, is not known: ask as a user who may read it"
        yield Finding("not-looked-at", "note", file, "it may not be read, and was not looked at", why)


def _shared(overlays: dict[str, str | None]) -> Iterator[Finding]:
    """Images with more than one overlay: which of them is wanted nobody can say from here."""
    for below in sorted({name for name in overlays.values() if name is not None}):
        above = sorted(path for path, name in overlays.items() if name == below)
        if len(above) > 1:
            what = f"more than one image is built on it: {', '.join(above)}"
            why = "one that an earlier merge left shows older data; where all are wanted, a merge into it ruins the others"
            yield Finding("shared-image", "care", below, what, why)
