"""
A chain that is only looked at: what `qemu-img info` says of it, told as QEMU tells what it has open.

The walk has read every header and approved every name, so that qemu-img opens nothing else (`qemuimg.chain_info`), one image at
a time: 200 of them take it 50 ms, and a daemon, which has all of them open, a second. What it says is held against the walk,
and the names are looked at again after it. Where anything is not as it was, or takes more than reading headers, nothing is
told: a daemon opens the chain, and says what is wrong.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from qmpmerge import folder
from qmpmerge.errors import BadReply, ImageUnreadable, ToolMissing
from qmpmerge.images import qemuimg
from qmpmerge.images.qemuimg import Header
from qmpmerge.images.walk import Layer
from qmpmerge.qemu import discovery, reply
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.value import Value

SECTOR = 512


class Shown(Value):
    """What QEMU would tell of the chain, and what the headers say, base first."""

    layout: Layout
    headers: tuple[Header, ...]


async def read(layers: Sequence[Layer]) -> Shown | None:
    """The chain of these layers; None where it takes a daemon to tell."""
    if not all(map(_is_plain, layers)):
        return None
    try:
        infos = await qemuimg.chain_info(layers[-1].file, layers[-1].format)
        reply.see_shape(layers[-1].file, "qemu-img info", [info.told for info in infos], [reply.IMAGE])
    except (ImageUnreadable, ToolMissing, BadReply):
        return None
    headers = tuple(info.header for info in infos)
    sizes = [_size(layer) for layer in layers]
    if None in sizes or not _is_as_walked(layers, headers):
        return None
    return Shown(_layout(layers, [info.told for info in infos], sizes), headers)


def _is_plain(layer: Layer) -> bool:
    """Whether it is all of a regular file and nothing besides, whose names JSON can carry."""
    is_more = layer.data_file is not None or layer.slice is not None or layer.encrypted or layer.is_device
    return layer.format in ("raw", "qcow2") and not is_more and _is_text(f"{layer.file}{layer.backing}")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size(layer: Layer) -> int | None:
    """That of its file in whole sectors, as QEMU has it, as long as that is the one which was walked."""
    try:
        status = os.stat(layer.file)
    except OSError:
        return None
    return -(-status.st_size // SECTOR) * SECTOR if folder.inode_in(status) in layer.inodes else None


def _is_as_walked(layers: Sequence[Layer], headers: Sequence[Header]) -> bool:
    walked = [(layer.format, layer.backing, layer.backing_format) for layer in layers]
    return walked == [(header.format, header.backing, header.backing_format) for header in headers]


def _layout(layers: Sequence[Layer], told: Sequence[Any], sizes: Sequence[int | None]) -> Layout:
    """As `discovery` makes it of QEMU's replies: a node for each image, named as a daemon's is, and one for its file."""
    names = [f"layer{number}" for number in range(1, len(layers) + 1)]
    nodes = [name for layer in names for name in (layer, f"{layer}-file")]
    numbers = {name: number for number, name in enumerate(nodes)}
    edges = [(name, f"{name}-file", "file") for name in names]
    edges += [(above, below, "backing") for below, above in zip(names[:-1], names[1:], strict=True)]
    graph = {
        "nodes": [{"id": number, "name": name, "type": "block-driver"} for name, number in numbers.items()],
        "edges": [{"parent": numbers[above], "child": numbers[below], "name": edge} for above, below, edge in edges],
    }
    details = [
        entry
        for layer, name, image, size in zip(layers, names, told, sizes, strict=True)
        for entry in _details(layer, name, image, size)
    ]
    inodes = {layer.file: next(iter(layer.inodes)) for layer in layers}
    return discovery.decode(graph, [], details, [], lambda name: (name, inodes[name]))


def _details(layer: Layer, node: str, image: Any, size: int | None) -> Iterator[dict[str, Any]]:
    """Of the image's node, and of that of its file."""
    own = {"file": layer.file, "ro": True}
    stored = image.get("format-specific", {}).get("data", {}).get("bitmaps", ())
    bitmaps = list(map(_bitmap, reversed(stored)))  # QEMU puts each before those that it has
    yield {"node-name": node, "drv": layer.format, "image": image, "dirty-bitmaps": bitmaps, **own}
    yield {"node-name": f"{node}-file", "drv": "file", "image": {"virtual-size": size}, **own}


def _bitmap(stored: Any) -> dict[str, Any]:
    """A bitmap in the image, as QEMU has it once that is open: of one that was not closed it knows that it is incomplete."""
    is_open = "in-use" in stored["flags"]
    return {
        "name": stored["name"],
        "granularity": stored["granularity"],
        "recording": "auto" in stored["flags"] and not is_open,
        "persistent": True,
        "inconsistent": is_open,
        "busy": False,
    }
