"""Where records lie, and how they are read and written."""

import json
import os
import re
import stat
from dataclasses import dataclass, replace
from typing import Any, get_args

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import Policy
from qmpmerge.errors import Error
from qmpmerge.images import files
from qmpmerge.journal import stash
from qmpmerge.journal.record import Phase, Seen, Witness
from qmpmerge.processes.proc import Process

_WITNESS = re.compile(r"\.(?P<image>.+)\.qmpmerge-witness", re.DOTALL)


@dataclass(frozen=True)
class Account:
    """What a witness file says: `image` is the active image of then; None is what it does not tell."""

    file: str
    image: str
    phase: str | None
    job: str | None


SCHEMA = 1
_START, _END = ".", ".qmpmerge-witness"
_LARGEST = 4 * 1024 * 1024

_STATE_BYTES = 256
_IMAGE = ("file", "format", "virtual_size", "backing", "backing_format", "inode", "node")


def witnesses(folder: str) -> list[Account]:
    """The witness files of a folder; one that cannot be read is there all the same, and says so by its silence."""
    return [_account(path, image) for path, image in files.matching(folder, _WITNESS)]


def _account(path: str, image: str) -> Account:
    told = read(path)
    place = os.path.join(os.path.dirname(path), image)
    return Account(path, place, told.phase if told else None, told.job if told else None)


def path_of(active: str) -> str:
    """``.NAME.qmpmerge-witness`` beside the active image's name, whatever that leads to."""
    folder, name = os.path.split(active)
    return os.path.join(folder, f"{_START}{name}{_END}")


def write(told: Witness) -> Witness:
    """Put it in place of what was there, durably. Raises OSError: nobody can be promised anything then."""
    files.write(told.path, _state(told) + json.dumps(_encoded(told)).encode())
    files.sync_folder(told.path)
    return told


def mark(told: Witness) -> Witness:
    """
    Write the phase and what goes with it over those in the file, which takes microseconds: the guest may be waiting.

    Whatever dies, the old or the new state is there: it is less than a sector. Durable after `sync`. Raises OSError.
    """
    descriptor = os.open(told.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, _state(told), 0)
    finally:
        os.close(descriptor)
    return told


def sync(told: Witness) -> None:
    """Make it durable, and with it all names in its folder. Raises OSError."""
    files.sync(told.path)
    files.sync_folder(told.path)


def remove(told: Witness) -> None:
    """The work is done, or taken back. Raises OSError."""
    files.remove(told.path)
    files.sync_folder(told.path)


def read(path: str) -> Witness | None:
    """
    The witness at `path`. None where there is none that we would believe: not ours, no regular file, or not whole.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.geteuid(), 0) or status.st_size > _LARGEST:
            return None
        state, _, rest = file.read().partition(b"\n")
    try:
        return _decoded(path, {**json.loads(rest), **json.loads(state)})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, Error):
        return None


def beside(image: str) -> Witness | None:
    """The witness of the disk whose active image has, or had, this name."""
    return read(path_of(os.path.abspath(image)))


def found(folder: str) -> list[Witness]:
    """All that lie in a folder, by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    paths = [os.path.join(folder, name) for name in names if name.startswith(_START) and name.endswith(_END)]
    return [told for told in map(read, paths) if told is not None]


def about(chain: Chain) -> list[Witness]:
    """Those in the chain's folders that tell of a merge of one of its images."""
    inodes = {image.inode for image in chain if image.inode is not None}
    folders = dict.fromkeys(os.path.dirname(image.file) for image in chain if image.has_path)
    return [told for folder in folders for told in found(folder) if told.concerns(inodes)]


def _state(told: Witness) -> bytes:
    """The first line, of a fixed length."""
    line = json.dumps({"phase": told.phase, "verified": told.verified, "seen": _listed(told.seen)})
    return line.ljust(_STATE_BYTES - 1).encode() + b"\n"


def _encoded(told: Witness) -> dict[str, Any]:
    """The second line: what does not change."""
    plain = ("policy", "target", "disk", "device", "job", "base", "top", "is_live")
    return {
        "schema": SCHEMA,
        **{key: getattr(told, key) for key in plain},
        "qemu": vars(told.qemu) if told.qemu else None,
        "tool": vars(told.tool) if told.tool else None,
        "images": [{key: getattr(image, key) for key in _IMAGE} for image in told.chain],
        "away": [[index, name] for index, name in told.away.items()],
        "before": _listed(told.before),
    }


def _listed(seen: dict[int, Seen]) -> list[list[int]]:
    return [[index, one.size, one.changed] for index, one in seen.items()]


def _looks(entries: Any) -> dict[int, Seen]:
    return {int(index): Seen(int(size), int(changed)) for index, size, changed in entries}


def _decoded(path: str, entry: Any) -> Witness:
    """Raises whatever a document of another shape makes it raise, ValueError for one that says what cannot be."""
    told = Witness(
        path=path,
        target=str(entry["target"]),
        disk=str(entry["disk"]),
        job=str(entry["job"]),
        device=str(entry["device"]),
        chain=Chain(tuple(map(_image, entry["images"]))),
        base=int(entry["base"]),
        top=int(entry["top"]),
        policy=entry["policy"],
        phase=entry["phase"],
        qemu=_process(entry["qemu"]),
        tool=_process(entry["tool"]),
        is_live=bool(entry["is_live"]),
        verified=bool(entry["verified"]),
        away={int(index): str(name) for index, name in entry["away"]},
        seen=_looks(entry["seen"]),
        before=_looks(entry["before"]),
    )
    if told.phase not in get_args(Phase) or told.policy not in get_args(Policy) or told.plan.is_empty:
        raise ValueError(told.phase)
    if not all(stash.is_stash_of(name, told.chain[index].file) for index, name in told.away.items()):
        raise ValueError(told.away)
    return told


def _image(entry: Any) -> Image:
    image = Image(**{key: entry[key] for key in _IMAGE})
    return replace(image, inode=(int(image.inode[0]), int(image.inode[1])) if image.inode is not None else None)


def _process(entry: Any) -> Process | None:
    return Process(int(entry["pid"]), int(entry["started"]), str(entry["boot"])) if entry else None
