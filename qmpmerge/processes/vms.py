"""
The running QEMUs of this host: their names and monitors, the files they hold, and who holds their monitors.

What a QEMU is called and where it listens is read from its command line (`commandline`); its process tells the rest.
Everything here is a look at processes that may end meanwhile: one that vanishes
or may not be looked at is left out, and nothing raises for it.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpmerge.errors import AmbiguousName, NoMonitor, NoSuchTarget
from qmpmerge.errors.nearest import nearest
from qmpmerge.processes import commandline, proc
from qmpmerge.processes.commandline import CommandLine
from qmpmerge.value import Value

if TYPE_CHECKING:
    import psutil  # takes 20 ms, and is needed only where a QEMU is looked at closely


# What /proc/PID/comm starts with; it has 15 bytes.
_LIKELY = ("qemu-", ".qemu-", "kvm", "ld-", "ld.", "ld64")
_LIBVIRT_FOLDER = r"(?:/var/lib|/var/cache|(?:/var)?/run(?:/user/\d+)?|/.*/\.(?:config|cache))/libvirt/"
_LIBVIRT_DAEMONS = ("libvirtd", "virtqemud")


class Vm(Value):
    """
    A running QEMU or qemu-storage-daemon.

    `monitors` are its QMP monitors as TARGET takes them: absolute socket paths and ``tcp:HOST:PORT``. Libvirt's own is
    the last, because libvirt never lets go of it. `name` is that of ``-name``, None without. `started` is in seconds
    since the epoch. `namesakes` are the pids of others of its name that `find` has passed over.

    All of it is what the process says: anybody can start one with any command line. Only the kernel's word, `is_foreign`
    (started by neither us nor root), cannot be chosen.
    """

    pid: int
    name: str | None
    monitors: tuple[str, ...]
    libvirt: bool
    user: str
    program: str
    started: float
    is_foreign: bool = False
    namesakes: tuple[int, ...] = ()

    @property
    def monitor(self) -> str:
        """The monitor to try first; "" where there is none, which `find` and `find_pid` refuse."""
        return next(iter(self.monitors), "")


# --- which QEMUs run ----------------------------------------------------------------------------------------------


def vms() -> list[Vm]:
    """Every QEMU and qemu-storage-daemon that we can see, by name, then pid."""
    found = [process for process in map(_read, filter(is_likely, proc.pids())) if process is not None]
    return sorted((process.vm for process in _without_forks(found)), key=lambda vm: (vm.name or "", vm.pid))


def vm_of(pid: int) -> Vm | None:
    """The QEMU with this pid, None when it is none or is gone."""
    process = _read(pid)
    return process.vm if process is not None else None


def find(name: str) -> Vm:
    """
    The one QEMU of this name, with at least one monitor. Of several the only one that was started by us or by root, since
    anybody can call a process so.

    A second QEMU started with the same socket path takes that path over, so compare `Vm.pid` with the pid of the
    session. Raises NoSuchTarget, AmbiguousName, NoMonitor.
    """
    running = vms()
    found = [vm for vm in running if name and vm.name == name]
    if not found:
        raise NoSuchTarget(target=name, nearest=nearest(name, [vm.name for vm in running if vm.name]))
    meant = [vm for vm in found if not vm.is_foreign] if len(found) > 1 else found
    if len(meant) != 1:
        raise AmbiguousName(target=name, pids=[vm.pid for vm in found])
    namesakes = tuple(vm.pid for vm in found if vm not in meant)
    return replace(_with_monitor(meant[0], name), namesakes=namesakes)


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


class _Process(Value):
    vm: Vm
    parent: int
    argv: tuple[str, ...]


def is_likely(pid: int) -> bool:
    """
    Whether the command line is worth reading, told by the names of process and executable.

    Reading a command line can block on a process that is stuck in a page fault; reading these two cannot. It is the
    last resort for other users' processes.
    """
    if proc.command_name(pid).startswith(_LIKELY):
        return True
    try:
        return commandline.is_qemu(os.readlink(f"/proc/{pid}/exe"))
    except PermissionError:
        # Another user's, and `-name process=NAME` renames it.
        return commandline.is_qemu(proc.read_text(f"/proc/{pid}/cmdline").partition("\0")[0])
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
            line = commandline.parse(argv, proc.start_folder(pid), proc.executable(pid))
            if line is None:
                return None
            return _Process(_vm(process, line), process.ppid(), tuple(argv))
    except (psutil.Error, OSError):
        return None


def _vm(process: "psutil.Process", line: CommandLine) -> Vm:
    addresses = [_resolved(address, process.pid) for address in line.monitors]
    by_libvirt = (
        line.libvirt or any(map(_is_libvirts, addresses)) or proc.command_name(process.ppid()) in _LIBVIRT_DAEMONS
    )
    return Vm(
        pid=process.pid,
        name=line.name or None,
        monitors=tuple(sorted(filter(_is_there, addresses), key=_is_libvirts)),
        libvirt=by_libvirt,
        user=process.username(),
        program=line.program,
        started=process.create_time(),
        is_foreign=process.uids().real not in (0, os.geteuid()),
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
    except (OSError, ValueError):  # whoever runs a process writes its command line
        return False
    return True


def _is_libvirts(address: str) -> bool:
    return re.match(_LIBVIRT_FOLDER, address) is not None


def _resolved(address: str, pid: int) -> str:
    """``fd:N`` as the path that the socket was bound to, "" where the kernel does not tell; all else as it is."""
    if not address.startswith("fd:"):
        return address
    return proc.bound_path(pid, proc.read_link(f"/proc/{pid}/fd/{address.removeprefix('fd:')}"))
