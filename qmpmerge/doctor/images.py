"""
The doctor's look at an image that no session leads to, with the chain below it.

Headers and names are all that is read, by the rule for names (`images.walk`): nothing foreign is followed, nothing probed.
"""

import contextlib
import os
import shlex
from collections.abc import Collection, Iterator

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.doctor import leftovers, target
from qmpmerge.doctor.findings import Finding, Looked, Severity, sort
from qmpmerge.errors import ImageUnreadable, Refused
from qmpmerge.images import files, qcow2, qemuimg, walk
from qmpmerge.images.walk import Layer
from qmpmerge.processes import holders
from qmpmerge.processes.holders import User

WHY: dict[str, tuple[Severity, str]] = {
    "disguised": ("care", "whoever opens it without a format follows its header to any file of this host"),
    "foreign-name": ("care", "what lies behind that name is not looked at: it could be any file, device or server"),
    "no-format": ("care", "a raw image could make whoever opens the chain read any file of this host"),
    "backing-loop": ("harm", "no program can open the chain"),
    "too-deep": ("harm", "QEMU 10 and 11 crash at the first read through some 870 images"),
    "unsupported-format": ("note", "qmpmerge cannot merge this chain offline"),
    "image-unreadable": ("harm", "a VM that is started on this chain does not start"),
}


async def look(
    path: str,
    *,
    allow: Collection[str] = (),
    search: Collection[str] = (),
    form: str | None = None,
    asked: Collection[object] = (),
) -> Looked:
    """
    All that is found about the chain whose active image is at `path`; VMs of the pids `asked` were asked themselves.

    Raises ImageUnreadable where nothing is there.
    """
    if not os.path.exists(path):
        raise ImageUnreadable(file=path, reason="No such file or directory")
    layers = walked(path, allow, form)
    if isinstance(layers, Finding):
        return Looked(sort([layers, *leftovers.in_folder(os.path.dirname(path))]), frozenset([files.inode(path)]))
    chain = as_chain(layers)
    users = holders.users(chain.files)
    findings = of_chain(chain, users, asked)
    for layer in () if users else layers:
        findings += await marks(layer)
    seen = frozenset(inode for layer in layers for inode in layer.inodes)
    return Looked(sort([*findings, *await leftovers.beside(chain, search)]), seen)


def walked(image: str, allow: Collection[str], form: str | None = None) -> tuple[Layer, ...] | Finding:
    """The chain below an image, base first; a finding where it cannot be walked to its end."""
    try:
        return walk.walk(image, allow=allow, form=form)
    except Refused as error:
        severity, why = WHY[error.name]
        return Finding(error.name, severity, image, str(error), f"{why}: {error.hint}")


def as_chain(layers: tuple[Layer, ...]) -> Chain:
    """The same, as a chain: by files, not by sizes."""
    return Chain(tuple(map(_image, layers)))


def _image(layer: Layer) -> Image:
    status = os.stat(layer.file)
    return Image(layer.file, layer.format, 0, inode=(status.st_dev, status.st_ino), slice=layer.slice)


def of_chain(chain: Chain, users: tuple[User, ...], asked: Collection[object] = ()) -> list[Finding]:
    """What is found about a chain that these have open; VMs of these pids were asked themselves."""
    return [*_used(chain, users, asked), *target.disguised(chain.images), *_deep(chain)]


def _used(chain: Chain, users: tuple[User, ...], asked: Collection[object]) -> Iterator[Finding]:
    """One finding a user, about the topmost image that it has open: a VM knows more than the headers do."""
    for user in {(user.pid, user.name): user for user in users}.values():
        if user.pid in asked:
            pass
        elif user.vm is not None and user.vm.monitors:
            command = f"qmpmerge doctor {shlex.quote(user.vm.name or f'pid:{user.pid}')}"
            yield Finding("in-use", "note", user.file, f"{user} has it open", "what QEMU knows is told there", command)
        else:
            why = "what is said here may be out of date"
            yield Finding("in-use", "note", user.file, f"{user} has it open", why, user.release or None)
        if (
            user.file != chain.active.file and user.vm is not None and user.may_write
        ):  # who only reads runs on another overlay
            what = f"{user} has {user.file}, below it, open, and this image not"
            why = "if a merge left it, it shows older data; else every write of that VM to what lies below ruins it"
            yield Finding("used-below", "care", chain.active.file, what, why)


def _deep(chain: Chain) -> Iterator[Finding]:
    if len(chain) >= target.DEEP:
        yield target.deep(chain.active.file, chain, shlex.quote(chain.active.file))


def _is_plain(file: str) -> bool:
    with contextlib.suppress(OSError):
        return qcow2.is_plain(file)
    return False  # qemu-img says what is wrong


async def marks(layer: Layer) -> list[Finding]:
    """What QEMU has marked in the header of an image that nobody has open."""
    if layer.format != "qcow2" or layer.encrypted:
        return []
    try:
        if layer.slice is None and _is_plain(layer.file):
            return []
        header = await (qemuimg.info(layer.file, "qcow2") if layer.slice is None else qemuimg.info_of(_image(layer)))
    except ImageUnreadable as error:
        severity, why = WHY[error.name]
        return [Finding(error.name, severity, layer.file, str(error), f"{why}: {error.hint}")]
    findings = []
    if header.corrupt:
        why = "QEMU opens it only for reading: save what it holds before you repair it"
        command = shlex.join(["qemu-img", "check", "-r", "all", "-f", "qcow2", layer.file])
        findings.append(Finding("corrupt", "harm", layer.file, "it is marked as corrupt", why, command))
    for name in header.open_bitmaps:
        command = shlex.join(["qemu-img", "bitmap", "--remove", "-f", "qcow2", layer.file, name])
        findings.append(target.inconsistent(layer.file, name, command))
    return findings
