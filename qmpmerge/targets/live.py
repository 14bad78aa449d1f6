"""
The door to a running QEMU or qemu-storage-daemon: what a TARGET means, and a session with it.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Collection, Sequence
from typing import TYPE_CHECKING

from qmpmerge import given
from qmpmerge.errors import LibvirtManaged, MonitorSilent, MonitorTaken, NoSuchTarget, Unreachable
from qmpmerge.errors.nearest import nearest
from qmpmerge.qemu import connect, monitor
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.sockets import Address
from qmpmerge.targets.target import Target

if TYPE_CHECKING:
    from qmpmerge.processes.vms import Vm

_PID = r"(?a)pid:(\d{1,9})"
_TCP = r"(?as)tcp:(.*):(\d{1,5})"
SHORT_SECONDS = 1.0
"""How long one of several monitors may take for its greeting before the next one is tried."""


@contextlib.asynccontextmanager
async def live(
    target: "str | os.PathLike[str]",
    *,
    timeout: float = monitor.GREETING_SECONDS,
    force: Collection[str] = (),
) -> AsyncIterator[Target]:
    """
    A session with the running QEMU or qemu-storage-daemon that `target` names: a socket path, ``unix:PATH``,
    ``tcp:HOST:PORT``, a VM's name, or ``pid:N``.

    `timeout` is for connecting and for the greeting, in seconds. Raises subclasses of Unreachable, also where the session is
    lost while only questions were asked (WentAway), and LibvirtManaged unless `force` holds ``libvirt``.
    """
    target, forced = os.fspath(target), given.forced(force)
    addresses, vm = find(target)
    pid = None if vm is None else vm.pid
    if "libvirt" not in forced:
        _refuse_libvirt(pid, target)
    session, address = await _connected(addresses, target, pid, timeout=timeout)
    live_target = Target(session, target, lambda: connect.connect(address, timeout=timeout))
    if vm is not None and vm.namesakes:
        others = ", ".join(map(str, vm.namesakes))
        live_target.notes.append(f"{target} is pid {vm.pid}: others of this name (pid {others}) run as other users")
    try:
        if "libvirt" not in forced:
            _refuse_libvirt(session.pid, target)
        with live_target.looking():
            yield live_target
    finally:
        await live_target.monitor.close()


async def _connected(
    addresses: Sequence[Address], target: str, pid: int | None, *, timeout: float
) -> tuple[Monitor, Address]:
    """
    A session with the first monitor that answers: of several each gets a short while, since one that somebody else holds
    answers nothing; where none has answered the first gets all the time. Raises its error, or MonitorTaken.
    """
    for address in addresses if len(addresses) > 1 else ():
        with contextlib.suppress(Unreachable):
            return await _session(address, target, pid, min(timeout, SHORT_SECONDS)), address
    try:
        return await _session(addresses[0], target, pid, timeout), addresses[0]
    except MonitorSilent as error:
        raise await _with_holder(error, addresses[0]) from None


async def _session(address: Address, target: str, pid: int | None, timeout: float) -> Monitor:
    """With the process that was meant: a path can be taken over by a QEMU that was started later."""
    session = await connect.connect(address, timeout=timeout)
    if pid is not None and session.pid not in (None, pid):
        await session.close()
        raise MonitorTaken(target=target, pid=pid, other=session.pid)
    return session


def find(target: str) -> "tuple[list[Address], Vm | None]":
    """
    The addresses that `target` means, the one to be tried first first, and the QEMU where it means a process. A path that
    exists is never taken for a name.

    Raises NoSuchTarget, AmbiguousName, NoMonitor.
    """
    if target.startswith("unix:"):
        return [target.removeprefix("unix:")], None
    if target.startswith("tcp:"):
        return [_tcp(target)], None
    if os.path.lexists(target) or ("/" in target and _may_be_there(target)):
        return [target], None
    if "/" in target:
        raise NoSuchTarget(target=target, nearest=_beside(target))
    from qmpmerge.processes import vms  # only names need it

    by_pid = re.fullmatch(_PID, target)
    vm = vms.find_pid(int(by_pid[1])) if by_pid else vms.find(target)
    return [*map(address, vm.monitors)], vm


def _may_be_there(path: str) -> bool:
    """Whether we may not look into its folder, which is told when we connect."""
    try:
        os.lstat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


def address(monitor: str) -> Address:
    """That of a monitor of a `Vm`. Raises NoSuchTarget."""
    return _tcp(monitor) if monitor.startswith("tcp:") else monitor


def _beside(path: str) -> str | None:
    """The file there that the path may have been meant to be."""
    folder, name = os.path.split(path)
    try:
        found = nearest(name, os.listdir(folder))
    except (OSError, ValueError):
        return None
    return os.path.join(folder, found) if found is not None else None


def _tcp(target: str) -> Address:
    match = re.fullmatch(_TCP, target)
    if match is None or int(match[2]) > 65535 or not _may_be_a_host(match[1]):
        raise NoSuchTarget(target=target)
    return match[1].strip("[]") or "localhost", int(match[2])


def _may_be_a_host(name: str) -> bool:
    """Whether a name can be looked up, which is done in this encoding."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return True


def _refuse_libvirt(pid: int | None, target: str) -> None:
    """Looked at closely only where the command line holds the word: psutil takes a third of our start-up time."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read()
    except OSError:
        return
    if pid is None or not (b"libvirt" in words or b"charmonitor" in words):
        return
    from qmpmerge.processes import vms

    vm = vms.vm_of(pid)
    if vm is not None and vm.libvirt:
        raise LibvirtManaged(vm=target)


async def _with_holder(error: MonitorSilent, address: Address) -> MonitorSilent:
    """The same error with the holder's name, where we may see it."""
    from qmpmerge.processes import holders

    if not isinstance(address, str) or error.stopped:
        return error
    holder = await asyncio.to_thread(holders.holder, address)
    if holder is None:
        return error
    description = f"it is held by {holder.name} (pid {holder.pid})"
    return MonitorSilent(address=error.address, seconds=error.seconds, holder=description)
