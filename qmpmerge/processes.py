"""
The running QEMUs of this host: their names and monitors, the files they hold, and who holds their monitors.

What a QEMU is called and where it listens is read from its command line (`commandline`); its process tells the rest.
Everything here is a look at processes that may end meanwhile: one that vanishes
or may not be looked at is left out, and nothing raises for it.
"""

import fcntl
import os
import re
import struct
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpmerge import commandline
from qmpmerge.chain import Inode
from qmpmerge.commandline import CommandLine
from qmpmerge.errors import AmbiguousName, NoMonitor, NoSuchTarget

if TYPE_CHECKING:
    import psutil  # takes 20 ms, and is needed only where a QEMU is looked at closely

# What /proc/PID/comm starts with; it has 15 bytes.
_LIKELY = ("qemu-", ".qemu-", "kvm", "ld-", "ld.", "ld64")
_LIBVIRT_FOLDER = re.compile(r"(?:/var/lib|/var/cache|(?:/var)?/run(?:/user/\d+)?|/.*/\.(?:config|cache))/libvirt/")
_LIBVIRT_DAEMONS = ("libvirtd", "virtqemud")
_SS_SECONDS = 0.9


@dataclass(frozen=True)
class Vm:
    """
    A running QEMU or qemu-storage-daemon.

    `monitors` are its QMP monitors as TARGET takes them: absolute socket paths and ``tcp:HOST:PORT``. Libvirt's own is
    the last, because libvirt never lets go of it. `name` is that of ``-name``, "" without. `started` is in seconds
    since the epoch.
    """

    pid: int
    name: str
    monitors: tuple[str, ...]
    libvirt: bool
    user: str
    program: str
    started: float

    @property
    def monitor(self) -> str:
        """The monitor to try first; "" where there is none, which `find` and `find_pid` refuse."""
        return next(iter(self.monitors), "")


@dataclass(frozen=True)
class Holder:
    """The process at the other end of a monitor: its pid, and its name as the kernel has it (15 bytes)."""

    pid: int
    name: str


# --- which QEMUs run ----------------------------------------------------------------------------------------------


def vms() -> list[Vm]:
    """Every QEMU and qemu-storage-daemon that we can see, by name, then pid."""
    found = [process for process in map(_read, filter(_is_likely, pids())) if process is not None]
    return sorted((process.vm for process in _without_forks(found)), key=lambda vm: (vm.name, vm.pid))


def pids() -> list[int]:
    """All processes that /proc shows us."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def vm_of(pid: int) -> Vm | None:
    """The QEMU with this pid, None when it is none or is gone."""
    process = _read(pid)
    return process.vm if process is not None else None


def find(name: str) -> Vm:
    """
    The one QEMU of this name, with at least one monitor.

    A second QEMU started with the same socket path takes that path over, so compare `Vm.pid` with the pid of the
    session. Raises NoSuchTarget, AmbiguousName, NoMonitor.
    """
    found = [vm for vm in vms() if name and vm.name == name]
    if not found:
        raise NoSuchTarget(target=name)
    if len(found) > 1:
        raise AmbiguousName(target=name, pids=[vm.pid for vm in found])
    return _with_monitor(found[0], name)


def find_pid(pid: int) -> Vm:
    """The QEMU with this pid, with at least one monitor. Raises NoSuchTarget, NoMonitor."""
    target = f"pid:{pid}"
    vm = vm_of(pid)
    if vm is None:
        raise NoSuchTarget(target=target)
    return _with_monitor(vm, target)


def _with_monitor(vm: Vm, target: str) -> Vm:
    if not vm.monitors:
        raise NoMonitor(target=target, pid=vm.pid)
    return vm


@dataclass(frozen=True)
class _Process:
    vm: Vm
    parent: int
    argv: tuple[str, ...]


def _is_likely(pid: int) -> bool:
    """
    Whether the command line is worth reading, told by the names of process and executable.

    Reading a command line can block on a process that is stuck in a page fault; reading these two cannot. It is the
    last resort for other users' processes.
    """
    if _comm(pid).startswith(_LIKELY):
        return True
    try:
        return commandline.is_qemu(os.readlink(f"/proc/{pid}/exe"))
    except PermissionError:
        # Another user's, and `-name process=NAME` renames it.
        return commandline.is_qemu(_read_text(f"/proc/{pid}/cmdline").partition("\0")[0])
    except OSError:
        return False


def _read(pid: int) -> _Process | None:
    import psutil

    if pid < 1:
        return None
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            argv = process.cmdline()
            line = commandline.parse(argv, start_folder(pid), _exe(pid))
            if line is None:
                return None
            return _Process(_vm(process, line), process.ppid(), tuple(argv))
    except (psutil.Error, OSError):
        return None


def start_folder(pid: int) -> str | None:
    """Where relative paths start. A daemon moves to /, its environment may remember where it was started."""
    here = cwd(pid)
    if here != "/" or not {"-daemonize", "--daemonize"}.intersection(_read_text(f"/proc/{pid}/cmdline").split("\0")):
        return here
    environment = _read_text(f"/proc/{pid}/environ").split("\0")
    return next((word[4:] for word in environment if word.startswith("PWD=/")), None)


def _vm(process: "psutil.Process", line: CommandLine) -> Vm:
    addresses = [_resolved(address, process.pid) for address in line.monitors]
    by_libvirt = line.libvirt or any(map(_is_libvirts, addresses)) or _comm(process.ppid()) in _LIBVIRT_DAEMONS
    return Vm(
        pid=process.pid,
        name=line.name,
        monitors=tuple(sorted(filter(_is_there, addresses), key=_is_libvirts)),
        libvirt=by_libvirt,
        user=process.username(),
        program=line.program,
        started=process.create_time(),
    )


def _without_forks(found: Sequence[_Process]) -> list[_Process]:
    """
    One process a QEMU.

    A child that QEMU forks has QEMU's command line until it runs its own program, and the parent of ``-daemonize`` has
    it while it waits until QEMU, its grandchild, is ready.
    """
    argvs = {process.vm.pid: process.argv for process in found}
    twins = [process for process in found if list(argvs.values()).count(process.argv) > 1]
    waiting = {_launcher(process.vm.pid): process.argv for process in twins}
    return [
        process
        for process in found
        if argvs.get(process.parent) != process.argv and waiting.get(process.vm.pid) != process.argv
    ]


def _launcher(pid: int) -> int:
    """
    The parent that waits for a ``-daemonize`` to be ready, 0 where there is none.

    Between the two was a process that became QEMU's session leader and ended; the parent does not reap it.
    """
    import psutil

    try:
        return psutil.Process(os.getsid(pid)).ppid()
    except (psutil.Error, OSError):
        return 0


def _is_there(address: str) -> bool:
    """False for a socket whose name is gone; a folder we may not search is for connect(2) to complain about."""
    if address.startswith("tcp:"):
        return True
    try:
        os.stat(address)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _is_libvirts(address: str) -> bool:
    return _LIBVIRT_FOLDER.match(address) is not None


# --- what the kernel says -----------------------------------------------------------------------------------------


def cwd(pid: int) -> str | None:
    """The process's working folder, None when we may not know."""
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return None


def open_files(pid: int) -> set[Inode] | None:
    """All that the process's descriptors lead to, None when we may not look or the process is gone."""
    folder = f"/proc/{pid}/fd"
    try:
        descriptors = os.listdir(folder)
    except OSError:
        return None
    return {inode for number in descriptors if (inode := _inode(f"{folder}/{number}")) is not None}


def holder(path: str, *, excluding: Collection[int] = ()) -> Holder | None:
    """
    Who is connected to the monitor socket at `path`, apart from us and `excluding`.

    None when nobody is, or when it cannot be told: another user's process, a TCP address, no `ss` (of iproute2) here.
    Takes up to a second and blocks meanwhile.
    """
    connections = _connections()
    clients = {connection.peer for connection in connections if connection.is_of(path)}
    others = (client for connection in connections if connection.inode in clients for client in connection.owners)
    return next((client for client in others if client.pid not in {os.getpid(), *excluding}), None)


@dataclass(frozen=True)
class _Connection:
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
        inode = _inode(real)
        same_name = os.path.basename(self.bound) == os.path.basename(real)
        return same_name and inode is not None and inode[1] & 0xFFFFFFFF == self.bound_inode


# The columns of `ss`: state, queues, local name and inode, peer's name ("*") and inode, then the owners and the inode
# of the bound file. A name may have spaces.
_ROW = re.compile(r"u_\w+ +ESTAB +\d+ +\d+ +(.+) (\d+) +\S.* (\d+) *(users:.*|<->.*)?")
_OWNER = re.compile(r'\("([^"]*)",pid=(\d+),fd=\d+\)')
_BOUND_INODE = re.compile(r" ino:(\d+) ")


def _connections() -> list[_Connection]:
    try:
        output = subprocess.run(["ss", "-xepnH"], capture_output=True, timeout=_SS_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = map(_ROW.match, os.fsdecode(output).splitlines())
    return [_connection(*row.groups(default="")) for row in rows if row is not None]


def _connection(bound: str, inode: str, peer: str, rest: str) -> _Connection:
    bound_inode = _BOUND_INODE.search(rest)
    owners = tuple(Holder(int(pid), name) for name, pid in _OWNER.findall(rest))
    return _Connection(bound, int(bound_inode[1]) if bound_inode else 0, inode, peer, owners)


def _inode(path: str) -> Inode | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _comm(pid: int) -> str:
    return _read_text(f"/proc/{pid}/comm").removesuffix("\n")


def _read_text(path: str) -> str:
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _exe(pid: int) -> str:
    return _link(f"/proc/{pid}/exe")


def _resolved(address: str, pid: int) -> str:
    """``fd:N`` as the path that the socket was bound to, "" where the kernel does not tell; all else as it is."""
    if not address.startswith("fd:"):
        return address
    link = _link(f"/proc/{pid}/fd/{address.removeprefix('fd:')}")
    return next((path for socket, path in _bound_sockets(pid) if socket == link), "")


def listening(pid: int) -> list[str]:
    """The UNIX sockets, by path, and TCP ports (``tcp:HOST:PORT``) on which a process listens, as far as we may see."""
    import psutil

    folder = f"/proc/{pid}/fd"
    try:
        held = {_link(f"{folder}/{number}") for number in os.listdir(folder)}
        ports = [one.laddr for one in psutil.Process(pid).net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    except (psutil.Error, OSError):
        return []
    paths = [path for socket, path in _bound_sockets(pid) if socket in held]
    return [*dict.fromkeys(paths), *(commandline.tcp(address.ip, str(address.port)) or "" for address in ports)]


def _bound_sockets(pid: int) -> list[tuple[str, str]]:
    """The listening UNIX sockets that have a name in the filesystem: ``socket:[INODE]`` and absolute path."""
    accepts = 0x10000  # __SO_ACCEPTCON in include/linux/net.h
    rows = [line.split(maxsplit=7) for line in _read_text(f"/proc/{pid}/net/unix").splitlines()[1:]]
    named = [row for row in rows if len(row) == 8 and int(row[3], 16) & accepts and not row[7].startswith("@")]
    return [(f"socket:[{row[6]}]", os.path.join(cwd(pid) or "", row[7])) for row in named]


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


# --- who uses an image --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class User:
    """A process that has an image open: `vm` is what it is where it is a QEMU."""

    file: str
    pid: int
    name: str
    vm: Vm | None

    def __str__(self) -> str:
        if self.vm is None or not self.vm.name:
            return f"{self.name} (pid {self.pid})"
        return f"VM {self.vm.name} ({self.name}, pid {self.pid})"


def users(files: Sequence[str], *, excluding: Collection[int] = ()) -> tuple[User, ...]:
    """
    All processes but ours, and those `excluding`, that have one of the files open, as far as we may see; a VM with
    ``locking=off`` too.

    Looked at are the descriptors of all processes, so hard links and other names do not hide anybody.
    """
    wanted = {inode: file for file in files if (inode := _inode(file)) is not None}
    found: dict[tuple[int, str], User] = {}
    for pid in pids():
        if pid == os.getpid() or pid in excluding:
            continue
        for inode in (open_files(pid) or set()) & set(wanted):
            found[pid, wanted[inode]] = User(wanted[inode], pid, _comm(pid), vm_of(pid))
    return tuple(sorted(found.values(), key=lambda user: (files.index(user.file), user.pid)))


def qemu_files() -> list[str]:
    """The files that the QEMU programs of this host have open, as far as we may see, by their present names."""
    found: dict[str, None] = {}
    for pid in filter(_is_likely, pids()):
        folder = f"/proc/{pid}/fd"
        try:
            links = [_link(f"{folder}/{number}") for number in os.listdir(folder)]
        except OSError:
            continue
        found |= dict.fromkeys(
            link for link in links if link.startswith("/") and not link.startswith(("/dev/", "/proc/"))
        )
    return list(found)


# struct flock for F_OFD_GETLK on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
_F_OFD_GETLK = 36
# block/file-posix.c: RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE, a byte for each permission.
_PERMISSION_BYTES = ((100, 8), (200, 8))


def is_locked(file: str) -> bool:
    """Whether some QEMU program has locked the image, even one that we may not see; False where it cannot be told."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        for start, length in _PERMISSION_BYTES:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
            kind = _FLOCK.unpack(fcntl.fcntl(descriptor, _F_OFD_GETLK, asked))[0]
            if kind != fcntl.F_UNLCK:
                return True
        return False
    except OSError:
        return False
    finally:
        os.close(descriptor)
