"""What `--details` adds to the tables of `disks` and `chain`: a line for each disk or image, and one for each thing in it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qmpmerge.cli.render.humanize import size

if TYPE_CHECKING:
    from qmpmerge.qemu.bitmaps import Bitmap
    from qmpmerge.qemu.blockgraph import Disk
    from qmpmerge.qemu.details import ImageDetails
    from qmpmerge.targets.target import ChainView


def of_disks(found: "Sequence[Disk]") -> Iterator[str]:
    """``vda: virtio-blk-pci on pcie.0 at 04.0, iothread io0; 1.2 GiB on its storage``"""
    for disk in found:
        if disk.details is None:
            continue
        device = disk.details.device
        words = ["no device"]
        if device is not None:
            place = f" on {device.bus}" if device.bus else ""
            words = [f"{device.kind or 'a device'}{place}{f' at {device.address}' if device.address else ''}"]
            words += [f"iothread {device.iothread}"] if device.iothread else []
            words += ["removable"] if device.removable else []
            words += [] if device.tray_open is None else [f"tray {'open' if device.tray_open else 'closed'}"]
        words += ["read-only"] if disk.chain is not None and disk.chain.active.read_only else []
        yield f"{disk.name}: {', '.join(words)}{_stored(disk.details.physical)}"


def of_chain(view: "ChainView") -> Iterator[str]:
    """``2: qcow2 1.1, clusters of 64 KiB, zlib; 1.2 GiB on its storage``, its snapshots and bitmaps below."""
    for index, (image, found) in enumerate(zip(view.chain, view.details, strict=False), 1):
        yield f"{index}: {', '.join(_features(image.format, found))}{_stored(found.physical)}"
        yield from (f"    data file {image.data.file}" for _ in [image.data] if image.data is not None)
        yield from (f"    internal snapshot {name or number}" for number, name in found.snapshots)
        yield from (f"    bitmap {bitmap.name}: {', '.join(_states(bitmap))}" for bitmap in found.bitmaps)


def _features(form: str, found: "ImageDetails") -> Iterator[str]:
    yield f"{form} {found.compat}" if found.compat else form
    if found.cluster_size:
        yield f"clusters of {size(found.cluster_size)}"
    if found.compression:
        yield found.compression
    if found.encryption:
        yield f"encrypted ({found.encryption})"
    flags = {
        "extended L2": found.extended_l2,
        "lazy refcounts": found.lazy_refcounts,
        "DIRTY": found.dirty,
        "CORRUPT": found.corrupt,
    }
    yield from (word for word, is_set in flags.items() if is_set)


def _states(bitmap: "Bitmap") -> Iterator[str]:
    yield size(bitmap.granularity)
    yield "recording" if bitmap.recording else "disabled"
    yield "persistent" if bitmap.persistent else "in memory only"
    if bitmap.inconsistent:
        yield "INCONSISTENT"
    if bitmap.busy:
        yield "busy"


def _stored(physical: int | None) -> str:
    return "" if physical is None else f"; {size(physical)} on its storage"
