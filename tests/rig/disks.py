"""The ways in which people give QEMU a disk: every story is told on each of them."""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import qmpmerge
from qmpmerge.testing.layers import form
from qmpmerge.testing.vms import nodes
from rig.machines import Content, Machine, machine, run

__all__ = [
    "BACKEND", "KINDS", "WAYS", "Images", "Setup", "blockdev", "device", "drive", "end", "filters", "form", "nbd_server",
    "nodes", "offline", "remove", "storage_daemon",
]  # fmt: skip

DEVICE = ["-device", "virtio-blk-pci,drive={},id=disk0"]


@dataclass
class Setup:
    """A machine with one disk. `disk` is what users call it; `write` and `check` do what the guest would do."""

    machine: Machine
    disk: str
    content: Content
    guest: Callable[[str], None]

    def target(self) -> AbstractAsyncContextManager[qmpmerge.Target]:
        """A session with whatever has the disk now."""
        return qmpmerge.open(self.machine.target)

    def moved(self, active: str) -> None:
        """Told when the disk has got another active image."""

    def off(self) -> None:
        """Switch the machine off."""
        self.machine.stop()

    def write(self, pattern: int, offset: int, length: int) -> None:
        """Write as the guest does, and note it."""
        self.guest(self.content.put(pattern, offset, length))

    def check(self) -> None:
        """The guest sees every byte that it should."""
        for pattern, offset, length in self.content.runs():
            self.guest(f"read -P {pattern} {offset} {length}")


@dataclass
class Images(Setup):
    """A disk that no machine has: `guest` is whoever boots it between the merges."""

    def __init__(self, active: Path, content: Content) -> None:
        self.active = str(active)
        self.content = content
        self.disk = active.name
        self.guest = self._io

    def target(self) -> AbstractAsyncContextManager[qmpmerge.Target]:
        return qmpmerge.open(self.active)

    def moved(self, active: str) -> None:
        self.active, self.disk = active, Path(active).name

    def off(self) -> None:
        pass

    def _io(self, command: str) -> None:
        answer = run("qemu-io", "-f", form(Path(self.active)), "-c", command, self.active)
        assert "failed" not in answer, answer


@contextlib.contextmanager
def offline(folder: Path, images: Sequence[Path], content: Content) -> Iterator[Setup]:
    """Images not in use."""
    yield Images(images[-1], content)


@contextlib.contextmanager
def drive(folder: Path, images: Sequence[Path], content: Content) -> Iterator[Setup]:
    """``-drive file=...``: automatic #block names."""
    arguments = ["-drive", f"file={images[-1]},format={form(images[-1])},if=none,id=vda"]
    with machine(folder, *arguments, *device("vda")) as vm:
        yield Setup(vm, "vda", content, lambda command: vm.io("vda", command))


@contextlib.contextmanager
def blockdev(folder: Path, images: Sequence[Path], content: Content) -> Iterator[Setup]:
    """``-blockdev`` with names of our own for every node."""
    with machine(folder, *nodes(images), *device(images[-1].stem)) as vm:
        yield Setup(vm, "disk0", content, lambda command: vm.io(BACKEND, command))


@contextlib.contextmanager
def filters(folder: Path, images: Sequence[Path], content: Content) -> Iterator[Setup]:
    """A throttle and a copy-on-read filter between device and image."""
    above = [
        "-object",
        "throttle-group,id=limits,x-iops-total=100000",
        "-blockdev",
        f"throttle,node-name=throttled,throttle-group=limits,file={images[-1].stem}",
        "-blockdev",
        "copy-on-read,node-name=cor,file=throttled",
    ]
    with machine(folder, *nodes(images), *above, *device("cor")) as vm:
        yield Setup(vm, "disk0", content, lambda command: vm.io(BACKEND, command))


@contextlib.contextmanager
def storage_daemon(
    folder: Path, images: Sequence[Path], content: Content, *, iothread: bool = False
) -> Iterator[Setup]:
    """A qemu-storage-daemon that exports the disk over NBD."""
    socket, active = folder / "export", images[-1].stem
    exports = [
        "--nbd-server",
        f"addr.type=unix,addr.path={socket}",
        "--export",
        f"nbd,id=export0,node-name={active},name=disk,writable=on{',iothread=io' if iothread else ''}",
    ]
    exports = ["--object", "iothread,id=io", *exports] if iothread else exports
    arguments = [part.replace("-blockdev", "--blockdev") for part in nodes(images)]
    with machine(folder, *arguments, *exports, program="qemu-storage-daemon") as daemon:
        url = f"nbd+unix:///disk?socket={socket}"
        yield Setup(daemon, active, content, lambda command: _io(url, command))


def _io(url: str, command: str) -> None:
    answer = run("qemu-io", "-f", "raw", "-c", command, url)
    assert "failed" not in answer, answer


BACKEND = "/machine/peripheral/disk0/virtio-backend"
KINDS = {"drive": drive, "blockdev": blockdev, "filters": filters, "storage-daemon": storage_daemon}
"""Somebody has the disk open."""

WAYS = {**KINDS, "offline": offline}
"""All ways to a disk."""


def device(name: str) -> list[str]:
    """A virtio disk called disk0."""
    return [part.format(name) for part in DEVICE]


def remove(outcome: qmpmerge.Outcome) -> None:
    """Delete what a merge left over: it would be built on what the next one writes to."""
    for merged in outcome.merged:
        if merged.now is not None:
            os.unlink(merged.now)


@contextlib.contextmanager
def nbd_server(
    folder: Path, image: Path, *, shared: int = 10, served_as: str = "", read_only: bool = False
) -> Iterator[str]:
    """Serve an image over NBD, as another host would, to so many clients at once; yields its URI."""
    socket = folder / "nbd"
    command = ["qemu-nbd", "--persistent", f"--shared={shared}", "--fork", f"--pid-file={folder}/nbd.pid"]
    command += ["--read-only"] if read_only else []
    run(*command, f"--format={served_as or form(image)}", f"--socket={socket}", image)
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        end((folder / "nbd.pid").read_text())


def end(pid: str, number: signal.Signals = signal.SIGTERM) -> None:
    """End a daemon and wait until it is gone, with its locks."""
    descriptor = os.pidfd_open(int(pid))
    try:
        signal.pidfd_send_signal(descriptor, number)
        assert select.select([descriptor], [], [], 20)[0], "the daemon does not end"
    finally:
        os.close(descriptor)
