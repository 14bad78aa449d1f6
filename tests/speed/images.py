"""
Chains to measure with, made once and put back into their first state before each run.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rig.machines import MIB, make_chain, run

from speed.peers import Merge

SIZE = 8192 * MIB
CLUSTER = 65536


@dataclass
class DataChain:
    """
    ``base.raw <-- layer1.qcow2 <-- ... <-- active.qcow2``: the layers hold the data; base is empty, and so is the active image.

    `low` and `high` are where in it an intermediate merge begins and ends. It writes to the base and to the overlay on its top,
    an active one to the first and the last image: putting those back is enough, for we rename the others.
    """

    images: Sequence[Path]
    low: int = 0
    high: int = -2

    def __post_init__(self) -> None:
        self._written = list(dict.fromkeys((self.images[0], self.base, self.overlay, self.active)))
        _kept(self.base).parent.mkdir()
        for image in self._written:
            _copy_sparse(image, _kept(image))

    @property
    def base(self) -> Path:
        """The base of an intermediate merge."""
        return self.images[self.low]

    @property
    def top(self) -> Path:
        """The top of an intermediate merge."""
        return self.images[self.high]

    @property
    def overlay(self) -> Path:
        """The image on that top."""
        return self.images[self.high + 1]

    @property
    def active(self) -> Path:
        return self.images[-1]

    def merge(self, *, active: bool, disk: str = "vda") -> Merge:
        """As the bare conversation needs it told."""
        return Merge(self.images[0] if active else self.base, self.active if active else self.top, active, disk)

    @property
    def middle(self) -> list[str]:
        """The options for an intermediate merge."""
        return ["--base", str(self.base), "--top", str(self.top)]

    def put_back(self) -> None:
        """As if nothing had been merged; on the disk, so that no run pays for another's writes."""
        for image in self.images:
            stashed = Path(f"{image}.merged")
            if stashed.exists():
                stashed.rename(image)
        for image in self._written:
            image.unlink(missing_ok=True)
            _copy_sparse(_kept(image), image)
        self.sync()

    def sync(self) -> None:
        """See that all that was merged is on the disk, and the names; ours gives the active image another one."""
        for place in (*filter(Path.exists, self._written), self.base.parent):
            descriptor = os.open(place, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def remove(self) -> None:
        """Delete the images, whatever they are called now; they are large."""
        for image in self.images:
            remove(image)


def data_chain(folder: Path, layers: int, megabytes: int, *, size: int = SIZE) -> DataChain:
    """Make one; `layers` are those that hold data."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["base.raw", *(f"layer{number}.qcow2" for number in range(1, layers + 1)), "active.qcow2"]
    images = make_chain(folder, names, size=size)
    length = megabytes * MIB // layers // CLUSTER * CLUSTER
    for number, image in enumerate(images[1:-1] if length else ()):
        written = 0
        while written < length:  # qemu-io takes no more than 2 GiB at once
            part = min(length - written, 1024 * MIB)
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {number * length + written} {part}", image)
            written += part
    return DataChain(images)


def sparse_chain(folder: Path, clusters: int, *, size: int = 1024 * 1024 * MIB) -> DataChain:
    """A large disk with little on it: so many clusters of a layer, all over it."""
    folder.mkdir(parents=True)
    images = make_chain(folder, ["base.raw", "layer1.qcow2", "active.qcow2"], size=size)
    places = random.Random(31).sample(range(size // CLUSTER), clusters)
    for first in range(0, clusters, 500):
        writes = [
            word
            for place in places[first : first + 500]
            for word in ("-c", f"write -q -P 7 {place * CLUSTER} {CLUSTER}")
        ]
        run("qemu-io", "-f", "qcow2", *writes, images[1])
    return DataChain(images)


def deep_chain(folder: Path, layers: int) -> DataChain:
    """So many empty images, of which one in the middle is merged; with relative names."""
    return DataChain(empty_chain(folder, layers), low=layers // 2, high=layers // 2 + 1)


def _kept(image: Path) -> Path:
    """Its first state, in a folder of its own: a copy of the active image beside it would be another image on top."""
    return image.parent / "first" / image.name


def _copy_sparse(image: Path, copy: Path) -> None:
    run("cp", "--sparse=always", image, copy)


def empty_chain(folder: Path, layers: int) -> list[Path]:
    """
    A chain of so many empty qcow2 images; base first.

    The third image is copied and the name in its header changed, since `qemu-img create` takes 10 ms an image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [folder / f"layer{number:04}.qcow2" for number in range(layers)]
    run("qemu-img", "create", "-q", "-f", "qcow2", names[0], str(64 * MIB))
    for number, name in enumerate(names[1:], 1):
        below = names[number - 1].name
        if number == 1:
            run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", name, str(64 * MIB))
            continue
        name.write_bytes(names[1].read_bytes().replace(names[0].name.encode(), below.encode(), 1))
    return names


def remove(image: Path) -> None:
    """Delete an image that a merge left over, whatever it is called now."""
    image.unlink(missing_ok=True)
    Path(f"{image}.merged").unlink(missing_ok=True)
