"""
Hosts: where the disks are. `live` opens the door to a running QEMU or qemu-storage-daemon.

Everything above this module talks to a `Host` and does not care which door was used.
"""

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass

from qmpmerge import blockgraph, headers, jobs, monitor
from qmpmerge.blockgraph import Disk, Layout
from qmpmerge.chain import Chain, Inode
from qmpmerge.errors import LibvirtManaged, MonitorSilent, MonitorTaken, NoSuchTarget, Offline, StreamConcluded
from qmpmerge.headers import Oddity
from qmpmerge.jobs import Job
from qmpmerge.monitor import Address, Monitor, Trace


@dataclass(frozen=True)
class ChainView:
    """A disk, its chain with the backing strings as they stand in the headers, what is odd about it, and the graph."""

    disk: Disk
    chain: Chain
    oddities: tuple[Oddity, ...]
    layout: Layout


class Host:
    """A place with disks and a QMP session to it. `target` is what the user called it."""

    def __init__(self, session: Monitor, target: str) -> None:
        self.monitor = session
        self.target = target

    @property
    def pid(self) -> int | None:
        """The QEMU process, where the kernel tells it."""
        return self.monitor.pid

    async def layout(self) -> Layout:
        """Disks, jobs and nodes as they are now."""
        return await blockgraph.discover(self.monitor, self._locate)

    async def disks(self) -> list[Disk]:
        """All disks, empty drives included."""
        return list((await self.layout()).disks)

    async def disk(self, name: str | None = None) -> Disk:
        """The disk that `name` means; without one the only disk with a backing chain."""
        return (await self.layout()).find(name, self.target)

    async def chain(self, disk: str | None = None) -> ChainView:
        """
        The chain of a disk: QEMU's graph next to the headers on disk.

        Raises NoSuchDisk, DiskNeeded, NoDisk, ToolMissing.
        """
        layout = await self.layout()
        found = layout.find(disk, self.target)
        assert found.chain is not None, "find() returns disks with an image only"
        written = await headers.read(found.chain)
        odd = tuple(headers.oddities(found.chain, written))
        return ChainView(found, headers.as_written(found.chain, written), odd, layout)

    async def jobs(self) -> list[Job]:
        """All block jobs, each with the disk it works on where the graph tells it."""
        if not await jobs.query(self.monitor):
            return []
        try:
            return list((await self.layout()).jobs)
        except StreamConcluded:
            return await jobs.query(self.monitor)

    def _locate(self, name: str) -> tuple[str, Inode | None]:
        """A file name of QEMU's as an absolute path with its inode, or as it is where it is no path."""
        path = _plain(name)
        if path is None:
            return name, None
        if not path.startswith("/"):
            path = os.path.join(self._folder(), path)
        path = os.path.normpath(path)
        try:
            status = os.stat(path)
        except OSError:
            return path, None
        return path, (status.st_dev, status.st_ino)

    def _folder(self) -> str:
        """Where QEMU resolves relative names; ours where we may not look."""
        try:
            folder = os.readlink(f"/proc/{self.pid}/cwd")
        except OSError:
            return os.getcwd()
        if folder != "/" or self.pid is None:
            return folder
        from qmpmerge import processes  # a daemon moved to /: its command line tells more

        return processes.start_folder(self.pid) or folder


def _plain(name: str) -> str | None:
    """The path in a file name of QEMU's; None for a URI or a json: name that is more than a file."""
    if name.startswith("json:"):
        try:
            told = json.loads(name.removeprefix("json:"))
        except ValueError:
            return None
        return told.get("filename") if told.get("driver") in ("file", "host_device") else None
    if name.startswith("/"):
        return name
    return None if ":" in name.split("/", 1)[0] else name


@contextlib.asynccontextmanager
async def live(
    target: str,
    *,
    timeout: float = monitor.GREETING_SECONDS,
    force: frozenset[str] = frozenset(),
    trace: Trace | None = None,
) -> AsyncIterator[Host]:
    """
    A session with the running QEMU or qemu-storage-daemon that `target` names: a socket path, ``unix:PATH``,
    ``tcp:HOST:PORT``, a VM's name, or ``pid:N``.

    `timeout` is for connecting and for the greeting, in seconds. Raises subclasses of Unreachable, and LibvirtManaged
    unless `force` holds ``libvirt``.
    """
    address, pid = find(target)
    if "libvirt" not in force:
        _refuse_libvirt(pid, target)
    try:
        async with monitor.connected(address, timeout=timeout, trace=trace) as session:
            if pid is not None and session.pid not in (None, pid):
                raise MonitorTaken(target=target, pid=pid, other=session.pid)
            if "libvirt" not in force:
                _refuse_libvirt(session.pid, target)
            yield Host(session, target)
    except MonitorSilent as error:
        raise await _with_holder(error, address) from None


def find(target: str) -> tuple[Address, int | None]:
    """
    The address that `target` means, and the pid where it means a process. A path that exists is never taken for a name.

    Raises NoSuchTarget, AmbiguousName, NoMonitor, Offline.
    """
    if target.startswith("unix:"):
        return target.removeprefix("unix:"), None
    if target.startswith("tcp:"):
        return _tcp(target), None
    if os.path.lexists(target):
        _refuse_image(target)
        return target, None
    if "/" in target:
        raise NoSuchTarget(target=target)
    from qmpmerge import processes  # only names need psutil

    by_pid = target.startswith("pid:") and target[4:].isdigit()
    vm = processes.find_pid(int(target[4:])) if by_pid else processes.find(target)
    return (_tcp(vm.monitor) if vm.monitor.startswith("tcp:") else vm.monitor), vm.pid


def _tcp(target: str) -> Address:
    host, _, port = target.removeprefix("tcp:").rpartition(":")
    if not port.isdigit():
        raise NoSuchTarget(target=target)
    return host.strip("[]") or "localhost", int(port)


def _refuse_image(target: str) -> None:
    try:
        mode = os.stat(target).st_mode
    except OSError:
        return  # a dangling link, or not for us to see: connecting tells
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        raise Offline(path=target)


def _refuse_libvirt(pid: int | None, target: str) -> None:
    """Looked at closely only where the command line holds the word: psutil takes a third of our start-up time."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read()
    except OSError:
        return
    if pid is None or not (b"libvirt" in words or b"charmonitor" in words):
        return
    from qmpmerge import processes

    vm = processes.vm_of(pid)
    if vm is not None and vm.libvirt:
        raise LibvirtManaged(vm=target)


async def _with_holder(error: MonitorSilent, address: Address) -> MonitorSilent:
    """The same error with the holder's name, where we may see it."""
    from qmpmerge import processes

    if not isinstance(address, str) or error.stopped:
        return error
    holder = await asyncio.to_thread(processes.holder, address)
    if holder is None:
        return error
    told = f"it is held by {holder.name} (pid {holder.pid})"
    return MonitorSilent(address=error.address, seconds=error.seconds, holder=told)
