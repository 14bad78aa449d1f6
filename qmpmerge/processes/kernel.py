"""
What the kernel itself has put on an image: loop devices, mounted filesystems, swap, device-mapper and RAID.

No process has the image open then, and nothing has locked it. Everybody may read what /sys and /proc tell of it; what a loop
device lies on for certain, and what another mount namespace has mounted, only those who may open the device.
"""

import errno
import fcntl
import os
import shlex
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace

from qmpmerge import folder
from qmpmerge.mounts import Mount, mounts, plain
from qmpmerge.processes import proc
from qmpmerge.processes.proc import Identity
from qmpmerge.value import Value

SYS = "/sys"
_LOOP_GET_STATUS64 = 0x4C05
# struct loop_info64 of linux/loop.h begins with lo_device, lo_inode, lo_rdevice.
_LOOP_INFO = struct.Struct("QQQ208x")


class Use(Value):
    """
    `what` has the image `file`; `release` are the commands that make it let go, as a shell takes them, "" if not known.

    Through the loop `devices`, and their partitions, a process may have it open.
    """

    file: str
    what: str
    release: str
    devices: tuple[str, ...] = ()


class Look(Value):
    """What was found, and why that may not be all."""

    uses: tuple[Use, ...]
    unseen: tuple[str, ...]


class _Thing(Value):
    """Something that lies on a device, and the command that takes it away."""

    what: str
    command: str


def look(files: Sequence[str]) -> Look:
    """Who of the kernel has one of the files or block devices."""
    wanted = {found: file for file in files if (found := proc.identity(file)) is not None}
    uses: list[Use] = []
    unseen: list[str] = []
    try:
        lying = _Lying()
        for name, lies_on in _loops(unseen):
            if lies_on in wanted:
                loop = _Thing(f"loop device /dev/{name}", f"losetup -d /dev/{name}")
                above = lying.on_device(proc.read_text(f"{SYS}/block/{name}/dev").strip())
                uses.append(replace(_use(wanted[lies_on], [*above, loop]), devices=_devices(name)))
        for identity, file in wanted.items():
            is_device = identity[0] == "device"
            things = lying.on_device(_number(identity)) if is_device else lying.on_itself(identity)
            uses += [_use(file, things)] if things else _claimed(file, unseen) if is_device else []
    except OSError as error:
        unseen.append(f"what the kernel uses cannot be seen: {error}")
    return Look(tuple(uses), tuple(unseen))


def _use(file: str, things: Sequence[_Thing]) -> Use:
    """The lowest thing is what has the file, and goes last."""
    *above, lowest = [thing.what for thing in things]
    what = f"{lowest} ({', '.join(above)})" if above else lowest
    commands = [thing.command for thing in things]
    return Use(file, what, " && ".join(commands) if all(commands) else "")


def _claimed(file: str, unseen: list[str]) -> Iterator[Use]:
    """
    Whether the kernel has claimed a block device for itself, or for whoever holds it exclusively (open(2), O_EXCL).

    It is the only way to see a filesystem that is mounted in another mount namespace. Our own claim lasts for microseconds,
    and another one of us may look just then, so it is asked for twice.
    """
    for _attempt in range(2):
        try:
            folder.reading(file, flags=os.O_EXCL).close()
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                unseen.append(f"whether the kernel uses {file} cannot be seen: {error.strerror}")
                return
    yield Use(file, "the kernel, exclusively: mounted in another mount namespace, or a part of another device", "")


# --- loop devices ---------------------------------------------------------------------------------------------------


def _loops(unseen: list[str]) -> Iterator[tuple[str, Identity]]:
    """The names of all loop devices that lie on something, and on what."""
    for name in sorted(os.listdir(f"{SYS}/block")):
        backing = _backing(name)
        lies_on = _loop_status(f"/dev/{name}") or proc.identity(backing) if backing else None
        if lies_on is not None:
            yield name, lies_on
        elif backing and backing == _backing(name):  # else it was let go meanwhile
            unseen.append(f"/dev/{name} lies on {backing}, which cannot be seen from here")


def _devices(name: str) -> tuple[str, ...]:
    folder = f"{SYS}/block/{name}"
    partitions = [one for one in _listed(folder) if os.path.exists(f"{folder}/{one}/partition")]
    return tuple(f"/dev/{one}" for one in (name, *partitions))


def _backing(name: str) -> str:
    """As the kernel calls it, which is the name of another mount namespace or chroot at times; "" for nothing."""
    return proc.read_text(f"{SYS}/block/{name}/loop/backing_file").removesuffix("\n")


def _loop_status(device: str) -> Identity | None:
    """What it lies on by the kernel's own word, whatever is called so now; None where we may not ask."""
    try:
        with folder.reading(device) as opened:
            told = fcntl.ioctl(opened.descriptor, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
    except OSError:  # it was let go meanwhile
        return None
    place, inode, number = _LOOP_INFO.unpack(told)
    return ("device", number, 0) if number else ("file", place, inode)


# --- what lies on a device or file ----------------------------------------------------------------------------------


class _Lying:
    """Mounts and swap, read once; the uppermost thing is told first, as it must go first."""

    def __init__(self) -> None:
        self._mounts = [(mount, _source(mount)) for mount in reversed(mounts())]
        names = [line.split(" ")[0].split("\t")[0] for line in proc.read_text("/proc/swaps").split("\n")[1:]]
        self._swaps = [(name, proc.identity(name)) for name in map(plain, names)]

    def on_device(self, number: str) -> list[_Thing]:
        """What lies on the block device ``MAJOR:MINOR``, on its partitions, and on what is built of it."""
        return list(dict.fromkeys(self._above(number)))

    def on_itself(self, identity: Identity, number: str = "") -> list[_Thing]:
        """Without what is between: the filesystem that is mounted from there, or swap."""
        places = [mount.place for mount, source in self._mounts if number == mount.device or source == identity]
        swaps = [name for name, found in self._swaps if found == identity]
        return [
            *(_Thing(f"mounted on {place}", shlex.join(["umount", place])) for place in places),
            *(_Thing("swap", shlex.join(["swapoff", name])) for name in swaps),
        ]

    def _above(self, number: str) -> Iterator[_Thing]:
        folder = os.path.realpath(f"{SYS}/dev/block/{number}")
        for name in _listed(f"{folder}/holders"):
            yield from self._above(proc.read_text(f"{SYS}/class/block/{name}/dev").strip())
            yield _holder(name)
        for name in _listed(folder):
            if os.path.exists(f"{folder}/{name}/partition"):
                yield from self._above(proc.read_text(f"{folder}/{name}/dev").strip())
        yield from self.on_itself(_device(number), number)


def _source(mount: Mount) -> Identity | None:
    """
    What is mounted, where the mount's own number does not tell: btrfs has none, nor has a file that is mounted itself.

    Names that do not begin so are of servers, or no names at all.
    """
    unnumbered = mount.device.startswith("0:") and mount.source.startswith("/")
    return proc.identity(mount.source) if unnumbered else None


def _number(identity: Identity) -> str:
    return f"{os.major(identity[1])}:{os.minor(identity[1])}"


def _device(number: str) -> Identity:
    major, _, minor = number.partition(":")
    return "device", os.makedev(int(major), int(minor)), 0


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:  # it is gone
        return []


def _holder(name: str) -> _Thing:
    mapped = proc.read_text(f"{SYS}/class/block/{name}/dm/name").removesuffix("\n")
    if mapped:
        return _Thing(f"device-mapper {mapped}", shlex.join(["dmsetup", "remove", mapped]))
    if name.startswith("md"):
        return _Thing(f"RAID /dev/{name}", f"mdadm --stop /dev/{name}")
    return _Thing(f"block device {name}", "")
