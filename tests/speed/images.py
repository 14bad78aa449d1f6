"""
Chains to measure with, made once and put back into their first state before each run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rig.machines import MIB, make_chain, run

SIZE = 8192 * MIB
CLUSTER = 65536


@dataclass
class DataChain:
    """
    ``base.raw <-- layer1.qcow2 <-- ... <-- active.qcow2``: the layers hold the data, in equal parts; base is empty, and so
    is the active image.

    A merge writes to the first and the last of them only, so putting those back is enough; we rename the others.
    """

    images: Sequence[Path]

    @property
    def base(self) -> Path:
        return self.images[0]

    @property
    def top(self) -> Path:
        """The top of an intermediate merge."""
        return self.images[-2]

    @property
    def active(self) -> Path:
        return self.images[-1]

    def put_back(self) -> None:
        """As if nothing had been merged; on the disk, so that no run pays for another's writes."""
        for image in self.images:
            stashed = Path(f"{image}.merged")
            if stashed.exists():
                stashed.rename(image)
        for image in (self.base, self.active):
            image.unlink(missing_ok=True)
            _copy_sparse(_kept(image), image)
        os.sync()

    def sync(self) -> None:
        """See that all that was merged is on the disk, and the names; ours gives the active image another one."""
        active = [self.active] if self.active.exists() else []
        for place in (self.base, *active, self.base.parent):
            descriptor = os.open(place, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


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
    _kept(images[0]).parent.mkdir()
    for image in (images[0], images[-1]):
        _copy_sparse(image, _kept(image))
    return DataChain(images)


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
