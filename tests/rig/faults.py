"""Faults put under a QEMU, and what must not have changed."""

import hashlib
from pathlib import Path

import qmpmerge
from rig.disks import device, nodes
from rig.machines import Machine, run


def injecting(images: list[Path], name: str, error: str) -> list[str]:
    """The nodes of a chain with blkdebug under image `name`, failing as `error` says."""
    arguments = nodes(images)
    faulty = f"blkdebug,node-name={name}-debug,image={name}-file,{error}"
    place = next(index for index, part in enumerate(arguments) if f",node-name={name},file=" in part)
    arguments[place] = arguments[place].replace(f"file={name}-file", f"file={name}-debug")
    return [*arguments[: place - 1], "-blockdev", faulty, *arguments[place - 1 :], *device(images[-1].stem)]


def digests(folder: Path) -> dict[str, str]:
    """All images of a folder by their content."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.[qr]*")}


def header(image: Path) -> str:
    return run("qemu-img", "info", "-U", "--output=json", image)


async def untouched(vm: Machine, expected: str = "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2") -> None:
    """QEMU lives, no job is left, and the chain is the old one in graph and headers."""
    assert vm.process.poll() is None
    async with qmpmerge.live(vm.target) as target:
        assert not await target.jobs()
        view = await target.chain()
        assert (str(view.chain), view.oddities) == (expected, ())
    names = [node["node-name"] for node in vm.session.execute("query-named-block-nodes", flat=True)]
    assert not [name for name in names if "qmpmerge" in name]
