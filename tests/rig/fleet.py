"""Many disks: VMs of several each, and chains that no VM uses, each with data of its own, as `tidy` is for."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qmpmerge.testing import Layers
from rig.command import invoke
from rig.folder import litter
from rig.machines import MIB, Content, Machine, fill, machine, make_chain, run

NAMES = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")
DISKS = ("vda", "vdb")
FREE = 5 * MIB
"""Where no layer of `fill` has data: there the layer `a` of each chain has a pattern that no other chain has."""


class Chain(Layers):
    """The guest sees the content through the highest image that still has its name."""

    @property
    def active(self) -> Path:
        return next(image for image in reversed(self.images) if image.exists())

    @property
    def left(self) -> list[str]:
        """What lies beside the images that is neither one nor a note about one: locks, records, what was half written."""
        return litter(self.images[0].parent)


@dataclass
class Vm:
    """A QEMU with a disk for each chain."""

    machine: Machine
    chains: dict[str, Chain]

    @property
    def target(self) -> str:
        return self.machine.target

    def check(self) -> None:
        """The guest sees what it should, and so does who starts it again."""
        self.machine.stop()
        for chain in self.chains.values():
            chain.check()

    @property
    def left(self) -> list[str]:
        """What is in QEMU, and beside the images, that is nobody's any more."""
        ask = self.machine.session.execute
        nodes = [node["node-name"] for node in ask("query-named-block-nodes", flat=True)]
        jobs = [job["id"] for job in ask("query-jobs")]
        ours = [name for name in (*nodes, *self._objects) if "qmpmerge" in name and name not in self.tickets]
        return [*ours, *jobs, *(name for chain in self.chains.values() for name in chain.left)]

    @property
    def tickets(self) -> list[str]:
        """Those of a dead qmpmerge's turns (`qemu.mutex`): whoever wants a turn next takes them away."""
        return [name for name in self._objects if name.startswith("qmpmerge-turn-")]

    @property
    def _objects(self) -> list[str]:
        return [one["name"] for one in self.machine.session.execute("qom-list", path="/objects")]


class Fleet:
    """Makes them below `folder`: copies of one chain, which is made first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stock, self._content = folder / "stock", Content()
        self._stock.mkdir()
        fill(make_chain(self._stock, NAMES), self._content)
        self._patterns = itertools.count(0x60)

    def chain(self, name: str) -> Chain:
        """One in a folder of this name."""
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        run("cp", "-r", "--sparse=always", self._stock, place)
        images, content = [place / image for image in NAMES], self._content.copy()
        own = content.put(next(self._patterns), FREE, 64 * 1024)
        run("qemu-io", "-f", "qcow2", "-c", own, images[1])
        return Chain(images, content)

    @contextlib.contextmanager
    def vm(self, name: str, disks: Iterable[str] = DISKS, more: Iterable[str] = ()) -> Iterator[Vm]:
        """One of this name, with `more` words on its command line."""
        chains = {disk: self.chain(f"{name}/{disk}") for disk in disks}
        arguments = [word for disk, chain in chains.items() for word in drive(disk, chain.images[-1])]
        with machine(self.folder / name, *arguments, "-name", name, *more) as started:
            yield Vm(started, chains)


def drive(disk: str, image: Path) -> list[str]:
    """The words for a disk of a VM."""
    return [
        "-drive", f"file={image},format=qcow2,if=none,id={disk}", "-device", f"virtio-blk-pci,drive={disk},id={disk}-device",
    ]  # fmt: skip


def left(vms: Iterable[Vm], chains: Iterable[Chain]) -> list[str]:
    """What a `tidy` that is done has left behind, and what the doctor has to say that somebody must do."""
    vms, chains = [*vms], [*chains]
    targets = [*(vm.target for vm in vms), *(str(chain.images[0].parent) for chain in chains)]
    examined = invoke("doctor", *targets, "--exit-code", "-q")
    found = [name for vm in vms for name in vm.left] + [name for chain in chains for name in chain.left]
    return found + ([f"{examined.code}: {examined.out}{examined.err}"] if examined.code or examined.out else [])
