"""
The witness: what we were about to do, in a small file beside the active image, for whoever comes after a crash.

After a pivot nothing inside the images says which one is right, so it is written down beforehand, step by step:

    copying     the job was asked for; the old chain is right
    switching   intermediate: base is durable and compared, the overlay's header may be rewritten any time now
                active: base and top are equal, top's name may be taken away, and then the device may move, any time now
    switched    seen in QEMU's graph: the new chain is right
    proved      graph and headers show the new chain, durably: only the merged files remain to be dealt with

The file goes when nothing remains. It is believed only as far as inodes and headers agree with it, and only where it
belongs to us or to root.
"""

import json
import os
import stat
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from qmpmerge import files, plan
from qmpmerge.chain import Chain, Image, Inode
from qmpmerge.errors import Error
from qmpmerge.plan import CommitPlan

Phase = Literal["copying", "switching", "switched", "proved"]
Policy = Literal["stash", "relink", "delete", "keep"]
"""
What becomes of merged files: renamed to NAME.merged; that, and the active image's old name leads to a new, empty overlay on
the base; removed, where it was compared; left alone.
"""

SCHEMA = 1
_START, _END = ".", ".qmpmerge-witness"
_LARGEST = 4 * 1024 * 1024


@dataclass(frozen=True)
class Process:
    """A process that cannot be taken for a later one of the same number: `started` is in the kernel's ticks since `boot`."""

    pid: int
    started: int
    boot: str

    @property
    def is_alive(self) -> bool:
        """Whether it still runs, as far as this host can tell."""
        return process(self.pid) == self


@dataclass(frozen=True)
class Seen:
    """What a file looked like at a moment when nobody wrote: any write since then shows."""

    size: int
    changed: int
    """st_mtime_ns"""


@dataclass(frozen=True)
class Witness:
    """
    One merge. `chain` is the chain before it, `base` and `top` are indexes there, `away` the names that its files get by
    the index (nothing for those that cannot be renamed). `device` is the drive's or device's own id, "" where a disk has
    no name but its nodes'.

    `seen` is what base and top looked like while nothing was dirty and nobody wrote, by index; empty where that was not
    so. `before` is what the other merged images looked like, which nobody writes to. `path` is where the witness lies.
    """

    path: str
    target: str
    disk: str
    job: str
    chain: Chain
    base: int
    top: int
    device: str = ""
    policy: Policy = "stash"
    phase: Phase = "copying"
    qemu: Process | None = None
    tool: Process | None = None
    is_live: bool = True
    verified: bool = False
    away: dict[int, str] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)
    before: dict[int, Seen] = field(default_factory=dict)

    @property
    def plan(self) -> CommitPlan:
        """What was to be done."""
        return plan.commit(self.chain, base=f"[{self.base}]", top=f"[{self.top}]")

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody is at work on it any more."""
        return self.tool is None or self.tool == process(os.getpid()) or not self.tool.is_alive

    def place(self, index: int) -> str | None:
        """Where the file of the image at `index` is now; None where neither name leads to it."""
        image = self.chain[index]
        names = [image.file, *([self.away[index]] if index in self.away else [])]
        return next((name for name in names if self.is_file(name, image)), None)

    def is_file(self, name: str, image: Image) -> bool:
        """Whether a name leads to the image that the witness means. Device numbers can change with a reboot."""
        found = files.inode(name)
        if found is None or image.inode is None:
            return False
        return found == image.inode or (found[1] == image.inode[1] and self.is_of_an_earlier_boot)

    @property
    def is_of_an_earlier_boot(self) -> bool:
        """Whether the machine has been started since."""
        return self.tool is not None and self.tool.boot != _boot()

    def concerns(self, inodes: "set[Inode]") -> bool:
        """Whether one of these files is part of the merge; what lies below its base may be shared by many."""
        return any(image.inode in inodes for image in self.chain.images[self.base - 1 :] if image.inode is not None)


def process(pid: int) -> Process | None:
    """The process of this number now."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in ("Z", "X"):  # it has ended, its parent has not looked yet
        return None
    return Process(pid, int(fields[19]), _boot())


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


# --- the file -----------------------------------------------------------------------------------------------------


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


# --- as JSON ------------------------------------------------------------------------------------------------------

_STATE_BYTES = 256
_IMAGE = ("file", "format", "virtual_size", "backing", "backing_format", "inode", "node")


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
    if not all(is_stash_of(name, told.chain[index].file) for index, name in told.away.items()):
        raise ValueError(told.away)
    return told


def _image(entry: Any) -> Image:
    image = Image(**{key: entry[key] for key in _IMAGE})
    return replace(image, inode=(int(image.inode[0]), int(image.inode[1])) if image.inode is not None else None)


def _process(entry: Any) -> Process | None:
    return Process(int(entry["pid"]), int(entry["started"]), str(entry["boot"])) if entry else None


# --- stashed names ------------------------------------------------------------------------------------------------

STASHED = ".merged"


def stash_of(file: str) -> str:
    """The name under which a merged file is stashed: ``NAME.merged``, or ``NAME.merged.2`` where that is taken."""
    name, number = f"{file}{STASHED}", 1
    while os.path.lexists(name):
        number += 1
        name = f"{file}{STASHED}.{number}"
    return name


def is_stash_of(name: str, file: str) -> bool:
    """Whether `name` is one that `stash_of` may have given to `file`."""
    return original_of(name) == file


def original_of(name: str) -> str | None:
    """What a stashed file was called; None for a name that is not one of a stashed file."""
    stem, dot, number = name.rpartition(".")
    if dot and number.isdigit():
        name = stem
    return name.removesuffix(STASHED) if name.endswith(STASHED) else None
