"""VMs with disks, and what their guests write and read. A guest is QEMU's own I/O on the device, so nothing has to boot."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qmpmerge.testing.content import MIB, Content
from qmpmerge.testing.layers import Layers, form
from qmpmerge.testing.machines import Machine, machine
from qmpmerge.testing.programs import Programs, escaped

LENGTH = 64 * 1024
GAP = 64 * MIB

Style = Literal["drive", "blockdev"]
"""By ``-drive`` nodes have names of QEMU's, by ``-blockdev`` each image has a node with a name of ours."""


@dataclass(frozen=True)
class Disk:
    """
    A virtio disk of a `Vm`.

    `name` is the ``-drive``, `device` the ``-device``, and `root` what block jobs know it by: the ``-drive``, or
    the active image's node at the start. With ``-blockdev`` an image's node is `name`, ``-`` and the stem of the file.
    """

    name: str
    layers: Layers
    style: Style = "drive"

    @property
    def device(self) -> str:
        """``NAME-device``."""
        return f"{self.name}-device"

    @property
    def root(self) -> str:
        """What block jobs know it by."""
        return self.name if self.style == "drive" else f"{self.name}-{self.layers.active.stem}"

    def image(self, role: str, image: Path) -> dict[str, object]:
        """What names an image as the `role`, base or top, of a block job."""
        return {role: str(image)} if self.style == "drive" else {f"{role}_node": f"{self.name}-{image.stem}"}

    @property
    def path(self) -> str:
        """The device's path in QEMU's object model, by which a guest's I/O is done whatever becomes of the nodes below."""
        return f"/machine/peripheral/{self.device}/virtio-backend"

    @property
    def arguments(self) -> list[str]:
        """Those of QEMU."""
        active = self.layers.active
        if self.style == "drive":
            words = ["-drive", f"file={escaped(active)},format={form(active)},if=none,id={self.name}"]
        else:
            words = nodes(self.layers, prefix=f"{self.name}-")
        return [*words, "-device", f"virtio-blk-pci,drive={self.root},id={self.device}"]


@dataclass
class Vm(Machine):
    """A QEMU that stands still, with its disks by their names, and `monitors`, the paths of its QMP sockets."""

    disks: Mapping[str, Disk]
    monitors: Sequence[str]

    @property
    def monitor(self) -> str:
        """The first."""
        return self.target

    def disk(self, name: str | None = None) -> Disk:
        """That one, or the only one."""
        if name is None:
            assert len(self.disks) == 1, f"which disk? there are {', '.join(self.disks)}"
            return next(iter(self.disks.values()))
        return self.disks[name]

    def write(self, offset: int, pattern: int, length: int = LENGTH, *, disk: str | None = None) -> None:
        """Write as the guest does, and flush, so that it may count on it; what the disk must show knows of it."""
        one = self.disk(disk)
        self.io(one.path, one.layers.content.put(pattern, offset, length))
        self.io(one.path, "flush")

    def read(self, offset: int, pattern: int, length: int = LENGTH, *, disk: str | None = None) -> None:
        """See that the guest reads these bytes there."""
        self.io(self.disk(disk).path, f"read -P {pattern} {offset} {length}")

    def check(self) -> None:
        """See that the guest reads on every disk what it should: all that was written, and zeros up to 64 MiB behind it."""
        for disk in self.disks.values():
            for pattern, offset, length in disk.layers.content.runs():
                self.io(disk.path, f"read -P {pattern} {offset} {length if pattern else min(length, GAP)}")


def nodes(images: Sequence[Path], *, prefix: str = "") -> list[str]:
    """``-blockdev`` for a whole chain, base first: nodes named by the images' stems, ``a`` and ``a-file``."""
    arguments: list[str] = []
    below = ""
    for image in images:
        name = prefix + image.stem
        arguments += ["-blockdev", f"file,node-name={name}-file,filename={escaped(image)},auto-read-only=on"]
        backing = f",backing={below}" if below else ""
        read_only = "" if image == images[-1] else ",read-only=on"
        arguments += ["-blockdev", f"{form(image)},node-name={name},file={name}-file{backing}{read_only}"]
        below = name
    return arguments


@contextlib.contextmanager
def started(
    folder: Path,
    disks: Mapping[str, Layers | Path],
    *,
    style: Style = "drive",
    monitors: int = 1,
    arguments: Sequence[str] = (),
    programs: Programs | None = None,
) -> Iterator[Vm]:
    """A VM with these disks for as long as the block runs. Raises NoQemu; AssertionError where QEMU refuses its arguments."""
    made = {name: Disk(name, _layers(one), style) for name, one in disks.items()}
    more = [f"monitor{number}" for number in range(2, monitors + 1)]
    words = [*(word for disk in made.values() for word in disk.arguments), *arguments]
    program = (programs or Programs.found()).emulator
    with machine(folder, *words, program=program, more=more) as one:
        paths = [one.target, *(str(Path(one.target).with_name(name)) for name in more)]
        yield Vm(one.process, one.target, one.session, folder, made, paths)


def _layers(one: Layers | Path) -> Layers:
    if not isinstance(one, Layers | Path):
        raise TypeError(f"{one!r} is no disk: that is what qcow2_chain returns, or a Path")
    return one if isinstance(one, Layers) else Layers([one], Content())


class StartVm:
    """Starts VMs that end with the test, in folders of their own."""

    def __init__(self, folder: Path, programs: Programs, stack: contextlib.ExitStack) -> None:
        self.started: list[Vm] = []
        self._folder = folder
        self._programs = programs
        self._stack = stack

    def __call__(
        self,
        *disks: Layers | Path,
        style: Style = "drive",
        monitors: int = 1,
        arguments: Sequence[str] = (),
        name: str | None = None,
        **named: Layers | Path,
    ) -> Vm:
        """
        A QEMU that stands still, emulated, with these disks: ``vda``, ``vdb``, and those that have a name of their own. It has
        as many QMP sockets as `monitors` says, takes more `arguments`, and may have a `name` on its command line. What its
        guest does is done by `Vm.write` and `Vm.read`. A disk that is a path has zeros, as far as is known, and one node.
        """
        folder = self._folder / (name or f"vm{len(self.started) + 1}")
        folder.mkdir(exist_ok=True)
        letters = map("vd{}".format, itertools.islice("abcdefghijklmnopqrstuvwxyz", len(disks)))
        words = ["-name", name, *arguments] if name else arguments
        with_names = dict(zip(letters, disks, strict=True)) | named
        vm = started(folder, with_names, style=style, monitors=monitors, arguments=words, programs=self._programs)
        self.started.append(self._stack.enter_context(vm))
        return self.started[-1]

    def only(self, vm: Vm | None = None) -> Vm:
        """That one, or the only one of the test."""
        if vm is None:
            assert self.started, "there is no VM yet: start one with qemu_vm(chain) first"
            assert len(self.started) == 1, f"which VM? there are {len(self.started)}"
            return self.started[0]
        return vm


class GuestWrites:
    """Writes as a guest does."""

    def __init__(self, vms: StartVm) -> None:
        self._vms = vms

    def __call__(
        self, offset: int, pattern: int, length: int = LENGTH, *, disk: str | None = None, vm: Vm | None = None
    ) -> None:
        """Write bytes of this value, and flush. Where there are several disks, or VMs, say which. See `Vm.write`."""
        self._vms.only(vm).write(offset, pattern, length, disk=disk)


class GuestReads:
    """Reads as a guest does."""

    def __init__(self, vms: StartVm) -> None:
        self._vms = vms

    def __call__(
        self, offset: int, pattern: int, length: int = LENGTH, *, disk: str | None = None, vm: Vm | None = None
    ) -> None:
        """See that the guest reads bytes of this value, or fail. Where there are several disks, or VMs, say which."""
        self._vms.only(vm).read(offset, pattern, length, disk=disk)
