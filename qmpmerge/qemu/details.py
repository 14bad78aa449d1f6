"""
What `--details` tells of a disk and of an image besides their place in the chain: the device that the guest sees, and the
image's own features.

Of an image all is in QEMU's usual replies already. A device is asked about by its QOM path, for properties that are
plain values: nothing that reads from the disk.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qmpmerge.chain.chain import Image
from qmpmerge.errors import QemuRefused
from qmpmerge.qemu import bitmaps, blockgraph, reply
from qmpmerge.qemu.bitmaps import Bitmap
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.qemu.discovery import DEEP
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.value import Value

_PROPERTIES: dict[str, reply.Shape] = {
    **dict.fromkeys(("type", "parent_bus", "iothread"), str),
    **dict.fromkeys(("addr", "channel", "scsi-id", "lun", "unit"), int),
}


class Device(Value):
    """
    The device that a guest sees a disk as: its `kind` as ``-device`` names it, the `bus` that it is on, and where there
    (``04.0`` for PCI, ``0:1:0`` for SCSI, a unit's number elsewhere). What is not known is None; `tray_open` also where there
    is no tray.
    """

    kind: str | None
    bus: str | None = None
    address: str | None = None
    iothread: str | None = None
    removable: bool | None = None
    tray_open: bool | None = None


class DiskDetails(Value):
    """`device` is None where no device uses the disk, or it is not known which. `physical` is as in `ImageDetails`."""

    device: Device | None
    physical: int | None


class ImageDetails(Value):
    """
    What an image is like. `physical` is the size of the file or device that it lies in, in bytes; `dirty` says that its
    reference counts are not to be trusted until QEMU has opened it for writing. What its format does not have, or QEMU does
    not tell, is None, or an empty tuple.
    """

    physical: int | None
    cluster_size: int | None
    compat: str | None
    compression: str | None
    encryption: str | None
    extended_l2: bool | None
    lazy_refcounts: bool | None
    dirty: bool | None
    corrupt: bool | None
    snapshots: tuple[tuple[str, str], ...]
    """The internal ones, each by its id and its name."""
    bitmaps: tuple[Bitmap, ...]


def of_image(layout: Layout, image: Image) -> ImageDetails:
    """What QEMU has told of an image of this layout."""
    node = layout.nodes[image.node or ""]
    info = node.info.get("image", {})
    own = info.get("format-specific", {}).get("data", {})
    return ImageDetails(
        physical=_physical(layout, image),
        cluster_size=info.get("cluster-size"),
        compat=own.get("compat"),
        compression=own.get("compression-type"),
        encryption=encryption(layout, image),
        extended_l2=own.get("extended-l2"),
        lazy_refcounts=own.get("lazy-refcounts"),
        dirty=info.get("dirty-flag") if node.driver == "qcow2" else None,
        corrupt=own.get("corrupt"),
        snapshots=tuple((entry["id"], entry["name"]) for entry in info.get("snapshots", ())),
        bitmaps=tuple(bitmaps.of(layout, [image])),
    )


def encryption(layout: Layout, image: Image) -> str | None:
    """By which method an image is encrypted, as QEMU calls it; None where it is not, or QEMU does not tell."""
    node = layout.nodes.get(image.node or "")
    if node is None:
        return None
    own = node.info.get("image", {}).get("format-specific", {}).get("data", {})
    method = "luks" if node.driver == "luks" else own.get("encrypt", {}).get("format")
    return None if method is None else str(method)


def _physical(layout: Layout, image: Image) -> int | None:
    *_, leaf = blockgraph.storage(layout.nodes[image.node or ""], layout.nodes)
    size = leaf.info.get("image", {}).get("virtual-size")
    return None if size is None else int(size)


async def of_disks(monitor: Monitor, layout: Layout) -> list[Disk]:
    """
    The disks of a layout with their details. QEMU is not asked about devices where a chain is so long that the question
    alone takes it seconds.
    """
    is_deep = any(len(disk.chain or ()) > DEEP for disk in layout.disks)
    told = [] if is_deep else await monitor.execute("query-block")
    return [of_disk(layout, disk, await _device_of(monitor, disk, told)) for disk in layout.disks]


def of_disk(layout: Layout, disk: Disk, device: Device | None = None) -> Disk:
    """The disk with its details, where it is known which device uses it."""
    physical = _physical(layout, disk.chain.active) if disk.chain is not None else None
    return replace(disk, details=DiskDetails(device, physical))


async def _device_of(monitor: Monitor, disk: Disk, told: Sequence[Any]) -> Device | None:
    entry: Any = next((entry for entry in told if _is_about(entry, disk)), {})
    return await _device(monitor, entry["qdev"], entry) if entry.get("qdev") else None


def _is_about(entry: Any, disk: Disk) -> bool:
    if disk.drive or entry["device"]:
        return bool(entry["device"] == disk.drive)
    return bool(disk.qdev) and blockgraph.qdev_id(entry.get("qdev", "")) == disk.qdev


async def _device(monitor: Monitor, qdev: str, entry: Any) -> Device:
    """The device that the user has made: of virtio its disk is a part, and usb-storage has one on a SCSI bus of its own."""
    path = (qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}").removesuffix("/virtio-backend")
    outer = re.sub(r"/[^/]+/legacy\[0\]$", "", path)
    told = await _properties(monitor, outer)
    if outer != path and told["type"] != "usb-storage":
        told = await _properties(monitor, path)
    return Device(
        kind=told["type"],
        bus=_last(told["parent_bus"]),
        address=_address(told),
        iothread=_last(told["iothread"]),
        removable=entry["removable"],
        tray_open=entry.get("tray_open"),
    )


async def _properties(monitor: Monitor, path: str) -> dict[str, Any]:
    """None for what it does not have. Raises BadReply."""
    replies = await monitor.execute_all([("qom-get", {"path": path, "property": name}) for name in _PROPERTIES])
    told = dict(zip(_PROPERTIES, replies, strict=True))
    has = {name: value for name, value in told.items() if not isinstance(value, QemuRefused)}
    reply.see_shape(monitor.name, "qom-get", has, {name: (shape,) for name, shape in _PROPERTIES.items()})
    return {name: has.get(name) for name in _PROPERTIES}


def _last(path: str | None) -> str | None:
    """The name at the end of a QOM path."""
    return path.rpartition("/")[2] or None if path else None


def _address(told: Mapping[str, Any]) -> str | None:
    if told["addr"] is not None:
        return f"{told['addr'] >> 3:02x}.{told['addr'] & 7}"
    if told["scsi-id"] is not None:
        return f"{told['channel']}:{told['scsi-id']}:{told['lun']}"
    return None if told["unit"] is None else str(told["unit"])
