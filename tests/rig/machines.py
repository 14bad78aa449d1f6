"""
The bench: real QEMUs, paused, on tiny images. They are those of `qmpmerge.testing`; here is what only our own tests need.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from qmpmerge.testing import layers
from qmpmerge.testing.content import MIB, SIZE, Content
from qmpmerge.testing.layers import Layer
from qmpmerge.testing.machines import Machine, machine
from qmpmerge.testing.programs import run
from qmpmerge.testing.session import Session

__all__ = [
    "MIB",
    "SIZE",
    "TCP",
    "Content",
    "Machine",
    "Session",
    "create_encrypted",
    "fill",
    "have",
    "machine",
    "make_chain",
]
__all__ += ["port", "run"]

TCP = ["-chardev", "socket,id=tcp,host={},port=0,server=on,wait=off", "-mon", "tcp,mode=control"]
"""One more monitor for a machine, on a port of this host address that the kernel chooses: see `port`."""


def port(vm: Machine) -> int:
    """That of the `TCP` monitor."""
    (name,) = [entry["filename"] for entry in vm.session.execute("query-chardev") if entry["label"] == "tcp"]
    return int(name.split(",")[0].rpartition(":")[2])


def create_encrypted(*arguments: str | Path, cwd: Path | None = None) -> None:
    """
    `qemu-img create` of an image with LUKS, by a slow hash.

    QEMU times its key function first, and gives up ("Unable to get accurate CPU usage") when the clock of its thread has
    not ticked meanwhile: with the default hash that was 27 of 60 times, with this one never. It is told apart all the
    same, since only that failure is no word about the image.
    """
    line = ["qemu-img", "create", "-q", *map(str, arguments)]
    complaint = "at first"
    while complaint:
        done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)
        complaint = done.stderr
        assert done.returncode == 0 or "accurate CPU usage" in complaint, complaint


def make_chain(
    folder: Path, names: Sequence[str] = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2"), size: int = SIZE
) -> list[Path]:
    """A chain with relative backing names and nothing in it."""
    return layers.create(folder, list(map(Layer, names)), size=size, fill=False).images


def fill(images: Sequence[Path], content: Content) -> None:
    """Write a pattern of its own into each layer, overlapping the layer below, and note what the top shows."""
    writes = [layers.own_writes(number) for number in range(len(images))]
    layers.write(images, writes)
    for run_ in (one for runs in writes for one in runs):
        content.put(*run_)


def have(program: str) -> bool:
    return shutil.which(program) is not None
