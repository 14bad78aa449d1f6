"""
What some versions of QEMU are known to crash on; each entry was measured, and goes when nobody runs those versions.
"""

import shlex
from collections.abc import AsyncIterator, Iterator

from qmpmerge.chain.chain import ELSEWHERE, Image
from qmpmerge.chain.plan import Plan
from qmpmerge.errors import KnownBad, QemuRefused
from qmpmerge.images import qcow2
from qmpmerge.images.qcow2 import Qcow2Header
from qmpmerge.processes.openfiles import FDSET
from qmpmerge.qemu.blockgraph import Disk
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.targets.target import ChainView

DEEPEST = 800
"""
Merged images from which on QEMU 8 and later is refused: one read through 870 crashes 10.0, through 908 11.1. 7.2 survives
1000.
"""

BACKUP_FILTERS = frozenset({"copy-before-write", "backup-top"})
"""What a backup has above a disk; the latter is the former's name before 6.0."""


async def found(monitor: Monitor, view: ChainView, plan: Plan, *, pivots: bool) -> AsyncIterator[KnownBad]:
    """What speaks against this merge on this QEMU; `pivots` says that the guest would be moved onto base."""
    if monitor.version >= (8, 0, 0) and len(plan.merged) > DEEPEST:
        reason = f"one read through {len(plan.merged)} images can be too much for its stack"
        yield KnownBad(reason=reason, instead="merge parts of it first, with a base further up")
    if plan.receiver.file.startswith(f"{ELSEWHERE}{FDSET}"):
        # Aborted on 7.2.22, 10.0.2 and 11.1.3, when base is opened again; fine with locking=off, which nobody can ask for.
        reason = "it aborts over its own locks where the base was handed to it as a descriptor, but for `locking=off`"
        yield KnownBad(reason=reason, instead="start the VM with the file name of the base, or merge with the VM off")
    if plan.direction == "pull" and monitor.version < (10, 0, 0) and _has_subclusters(plan.receiver):
        # Aborted on 7.2.22 where a cluster was there in part, not on 10.0.2 and 11.1.3: bdrv_co_do_copy_on_readv.
        reason = f"versions like 7.2 abort when they pull into an image with `extended_l2`, as {plan.receiver.file} is"
        yield KnownBad(
            reason=reason, instead="merge into its base (`qmpmerge commit`), or use a QEMU of version 10.0 or later"
        )
    for bad in _dirty(monitor, plan):
        yield bad
    if pivots:
        async for bad in of_pivot(monitor, view):
            yield bad


def _dirty(monitor: Monitor, plan: Plan) -> Iterator[KnownBad]:
    """Images below the active one that are marked as dirty: nobody has repaired them, since they were opened for reading."""
    for image in (plan.receiver, *plan.merged):
        if image is plan.chain.active or not _is_dirty(image):
            continue
        # Aborted on 7.2.22 and 10.0.2, not on 11.1.3: it clears the mark, and has no right to write.
        reason = f"it aborts as it closes {image.file}, which is marked as dirty and was opened for reading"
        if image is plan.receiver:
            reason = (
                f"{image.file} is marked as dirty, and is not repaired before it is written: what it holds may be lost"
            )
        if image is plan.receiver or monitor.version < (11, 1, 0):
            repair = shlex.join(["qemu-img", "check", "-r", "all", "-f", "qcow2", image.file])
            yield KnownBad(reason=reason, instead=f"with the VM off repair it: `{repair}`")


def _is_dirty(image: Image) -> bool:
    header = _header(image)
    return header is not None and header.dirty


def _has_subclusters(image: Image) -> bool:
    header = _header(image)
    return header is not None and header.entry_size > 8


def _header(image: Image) -> Qcow2Header | None:
    try:
        return qcow2.read_of(image) if image.format == "qcow2" and image.has_path else None
    except OSError:  # which is told by others
        return None


async def of_pivot(monitor: Monitor, view: ChainView) -> AsyncIterator[KnownBad]:
    """What speaks against moving the guest onto another image."""
    # Aborted 11 of 11 times on 7.2.22, never on 5.2.0, 10.0.2 and 11.1.3; what lies between was not tried.
    if (6, 0, 0) <= monitor.version < (10, 0, 0) and await _is_nvme(monitor, view.disk):
        reason = "versions like 7.2 abort when an emulated NVMe disk is moved onto its base while the guest writes"
        yield KnownBad(reason=reason, instead="merge with the VM off, or leave the active image out with `--top`")
    # The filter's bitmap stays on the old active image, and 7.2.22 aborts when that is closed, at the latest as QEMU ends.
    above = view.layout.nodes_of(view.disk)[: len(view.disk.top_nodes)]
    if monitor.version < (10, 0, 0) and any(node.driver in BACKUP_FILTERS for node in above):
        reason = "versions like 7.2 abort once the guest was moved away from an image under a copy-before-write filter"
        instead = "merge when the backup is over and the filter is gone, or leave the active image out with `--top`"
        yield KnownBad(reason=reason, instead=instead)


async def _is_nvme(monitor: Monitor, disk: Disk) -> bool:
    qdev = disk.qdev or ""
    path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
    try:
        kind = await monitor.execute("qom-get", path=path, property="type")
    except QemuRefused:  # no device at all
        return False
    return str(kind).startswith("nvme")
