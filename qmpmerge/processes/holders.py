"""Who holds a file, a socket or a lock."""

import asyncio
import fcntl
import os
import re
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import field, replace

from qmpmerge import folder
from qmpmerge.chain.chain import Inode
from qmpmerge.processes import kernel, proc, vms
from qmpmerge.processes.vms import Vm
from qmpmerge.value import Value

LOOKS, LOOK_AGAIN_SECONDS = 5, 0.05
"""How often a process must be seen again to have a file for more than a moment, and how long we wait before each look."""
_SS_SECONDS = 0.9

UNKNOWN = "it may be in another container or of another user: look there, or as root"
"""What to do about somebody whom we may not see."""


class Holder(Value):
    """The process at the other end of a monitor: its pid, and its name as the kernel has it (15 bytes)."""

    pid: int
    name: str


class _Connection(Value):
    """One end of a connection: the name and inode number it was bound to, its own and its peer's socket inodes."""

    bound: str
    bound_inode: int
    inode: str
    peer: str
    owners: tuple[Holder, ...]

    def is_of(self, path: str) -> bool:
        """Whether it was accepted on `path`; a relative name says less than the inode, of which ss has 32 bits."""
        if self.bound == path:
            return True
        real = os.path.realpath(path)
        inode = proc.inode_of(real)
        same_name = os.path.basename(self.bound) == os.path.basename(real)
        return same_name and inode is not None and inode[1] & 0xFFFFFFFF == self.bound_inode


# The columns of `ss`: state, queues, local name and inode, peer's name ("*") and inode, then the owners and the inode
# of the bound file. A name may have spaces.
_ROW = r"u_\w+ +ESTAB +\d+ +\d+ +(.+) (\d+) +\S.* (\d+) *(users:.*|<->.*)?"
_OWNER = r'\("([^"]*)",pid=(\d+),fd=\d+\)'
_BOUND_INODE = r" ino:(\d+) "


class User(Value):
    """
    Who has an image open: a process, `vm` being what it is where it is a QEMU; or, without a `pid`, the kernel.

    `release` is the command that makes the kernel let go, "" where it is not known.
    """

    file: str
    pid: int | None
    name: str
    vm: Vm | None = None
    release: str = field(default="", compare=False)

    def __str__(self) -> str:
        if self.pid is None:
            return self.name
        if self.vm is None or not self.vm.name:
            return f"{self.name} (pid {self.pid})"
        return f"VM {self.vm.name} ({self.name}, pid {self.pid})"

    @property
    def may_write(self) -> bool:
        """Whether it has the file open to write to it, at this moment; the kernel always."""
        return self.pid is None or proc.identity(self.file) in proc.written(self.pid)

    @property
    def instead(self) -> str:
        """What makes it let go, as a clause; of a VM its monitor tells more."""
        if self.release:
            return f"`{self.release}`"
        return "end it, or wait until it has let go" if self.pid is not None else "unmount it, or take it out of there"


# struct flock for F_OFD_GETLK and F_OFD_SETLK on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_LOCK = r"OFDLCK +ADVISORY +\w+ +-1 (\w+):(\w+):(\d+) (\d+) (\d+|EOF)"
# block/file-posix.c: RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE, a byte for each permission.
_PERMISSION_BYTES = ((100, 8), (200, 8))


def holder(path: str, *, excluding: Collection[int] = ()) -> Holder | None:
    """
    Who is connected to the monitor socket at `path`, apart from us and `excluding`.

    None when nobody is, or when it is not known: another user's process, a TCP address, no `ss` (of iproute2) here.
    Takes up to a second and blocks meanwhile.
    """
    connections = _connections()
    clients = {connection.peer for connection in connections if connection.is_of(path)}
    others = (client for connection in connections if connection.inode in clients for client in connection.owners)
    return next((client for client in others if client.pid not in {os.getpid(), *excluding}), None)


def _connections() -> list[_Connection]:
    try:
        output = subprocess.run(["ss", "-xepnH"], capture_output=True, timeout=_SS_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = map(re.compile(_ROW).match, os.fsdecode(output).split("\n"))
    return [_connection(*row.groups(default="")) for row in rows if row is not None]


def _connection(bound: str, inode: str, peer: str, rest: str) -> _Connection:
    bound_inode = re.search(_BOUND_INODE, rest)
    owners = tuple(Holder(int(pid), name) for name, pid in re.findall(_OWNER, rest))
    return _Connection(bound, int(bound_inode[1]) if bound_inode else 0, inode, peer, owners)


def users(files: Sequence[str], *, excluding: Collection[int] = ()) -> tuple[User, ...]:
    """
    All that have one of the files open, as far as we may see: processes but for ours and those `excluding`, and what the
    kernel itself has put on them (`kernel`); by the order of the files.
    """
    found = (*processes(files, excluding=excluding), *of_kernel(kernel.look(files), excluding=excluding))
    return tuple(sorted(found, key=lambda user: files.index(user.file)))


async def lasting(
    files: Sequence[str], *, excluding: Collection[int] = (), found: tuple[User, ...] | None = None
) -> tuple[User, ...]:
    """As `staying`; others are not kept waiting meanwhile. `found` are they, where they were looked for just now."""
    found = users(files, excluding=excluding) if found is None else found
    if all(user.vm for user in found):
        return found
    return await asyncio.to_thread(staying, files, excluding=excluding)


def staying(files: Sequence[str], *, excluding: Collection[int] = ()) -> tuple[User, ...]:
    """
    The `users` without those who have a file for a moment: another qmpmerge reads the headers of all that QEMUs have open.
    """
    found = users(files, excluding=excluding)
    for _ in range(LOOKS):
        if all(user.vm for user in found):
            break
        time.sleep(LOOK_AGAIN_SECONDS)
        now = users(files, excluding=excluding)
        found = tuple(user for user in found if user in now)
    return found


def of_kernel(look: kernel.Look, *, excluding: Collection[int] = ()) -> tuple[User, ...]:
    """
    What was found of the kernel's, as users, and the processes but for those `excluding` that have a file open through a loop
    device.

    The kernel would detach such a device once they close it, so no command for that is told.
    """
    files = {device: use.file for use in look.uses for device in use.devices}
    through = processes(list(files)) if files else ()
    held = {user.file for user in through}
    uses = [
        User(use.file, None, use.what, release=use.release if held.isdisjoint(use.devices) else "") for use in look.uses
    ]
    return (*uses, *(replace(user, file=files[user.file]) for user in through if user.pid not in excluding))


def processes(files: Sequence[str], *, excluding: Collection[int] = ()) -> tuple[User, ...]:
    """
    The processes among them; a VM with ``locking=off`` too.

    Looked at are the descriptors of all processes, so hard links and other names do not hide anybody.
    """
    wanted = {one: file for file in files if (one := proc.identity(file)) is not None}
    found: dict[tuple[int, str], User] = {}
    for pid in proc.pids():
        if pid == os.getpid() or pid in excluding:
            continue
        for one in wanted.keys() & (proc.open_files(pid) or {}):
            found[pid, wanted[one]] = User(wanted[one], pid, proc.command_name(pid), vms.vm_of(pid))
    return tuple(user for _key, user in sorted(found.items()))


def qemu_files() -> list[str]:
    """The files that the QEMU programs of this host have open, as far as we may see, by their present names."""
    found: dict[str, None] = {}
    for pid in filter(vms.is_likely, proc.pids()):
        folder = f"/proc/{pid}/fd"
        try:
            links = [proc.read_link(f"{folder}/{number}") for number in os.listdir(folder)]
        except OSError:
            continue
        found |= dict.fromkeys(
            link for link in links if link.startswith("/") and not link.startswith(("/dev/", "/proc/"))
        )
    return list(found)


def are_hidden() -> bool:
    """Whether there are processes of which we may not see what they have open."""
    return any(map(_is_hidden, proc.pids()))


def _is_hidden(pid: int) -> bool:
    try:
        os.close(os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError:
        return True
    except OSError:  # it is gone
        return False
    return False


async def locked_besides(files: Sequence[str], pid: int) -> dict[str, bool | None]:
    """
    Whether another QEMU program than `pid` has locked each of the files for more than a moment, even one that we may not see;
    None where the locks do not tell, since there are none (`locking=off`), or not under the file's number (some filesystems).

    Every user of an image locks the first of the bytes; of a process that we may not look at it is taken to have done so
    once.
    """
    locked = _locked_besides(files, pid)
    for _ in range(LOOKS):
        if not any(locked.values()):
            break
        await asyncio.sleep(LOOK_AGAIN_SECONDS)
        now = _locked_besides(files, pid)
        locked = {file: was and now[file] for file, was in locked.items()}
    return locked


def _locked_besides(files: Sequence[str], pid: int) -> dict[str, bool | None]:
    held = _first_byte_locks(proc.read_text("/proc/locks"))
    own = _own_locks(pid, held)
    inodes = [(file, proc.inode_of(file) or (0, 0)) for file in files]
    return {file: held[inode] > own[inode] if inode in held else None for file, inode in inodes}


def _own_locks(pid: int, held: Counter[Inode]) -> Counter[Inode]:
    numbers = proc.descriptors(pid)
    if numbers is None:
        return Counter(dict.fromkeys(held, 1))
    locking = [number for number in numbers if proc.inode_of(f"/proc/{pid}/fd/{number}") in held]
    return _first_byte_locks("".join(proc.read_text(f"/proc/{pid}/fdinfo/{number}") for number in locking))


def _first_byte_locks(rows: str) -> Counter[Inode]:
    """How many hold the first of the bytes of each file, of the rows of /proc/locks or of fdinfo (proc(5))."""
    first, found = _PERMISSION_BYTES[0][0], Counter[Inode]()
    for major, minor, inode, start, end in re.findall(_LOCK, rows):
        if int(start) <= first and (end == "EOF" or first <= int(end)):
            found[os.makedev(int(major, 16), int(minor, 16)), int(inode)] += 1
    return found


def is_locked(file: str) -> bool:
    """Whether some QEMU program has locked the image, even one that we may not see; False where it is not known."""
    try:
        with folder.reading(file) as opened:
            for start, length in _PERMISSION_BYTES:
                asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
                kind = _FLOCK.unpack(fcntl.fcntl(opened.descriptor, _F_OFD_GETLK, asked))[0]
                if kind != fcntl.F_UNLCK:
                    return True
    except OSError:
        pass
    return False


def lock(descriptor: int) -> None:
    """Lock an image as QEMU does that reads it, as long as this descriptor is open. Raises OSError."""
    first, _ = _PERMISSION_BYTES[0]
    fcntl.fcntl(descriptor, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, first, 1, 0))
