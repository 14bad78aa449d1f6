"""
What some versions of QEMU are known to crash on; each entry was measured, and goes when nobody runs those versions.
"""

from collections.abc import AsyncIterator

from qmpmerge.chain.plan import CommitPlan
from qmpmerge.errors import CommandError, KnownBad
from qmpmerge.qemu.blockgraph import Disk
from qmpmerge.qemu.monitor import Monitor

DEEPEST = 800
"""
Merged images from which on QEMU 8 and later is refused: one read through 870 crashes 10.0, through 908 11.1. 7.2 survives
1000.
"""


async def found(monitor: Monitor, disk: Disk, plan: CommitPlan, *, pivots: bool) -> AsyncIterator[KnownBad]:
    """What speaks against this merge on this QEMU; `pivots` says that the guest would be moved onto base."""
    if monitor.version >= (8, 0, 0) and len(plan.merged) > DEEPEST:
        reason = f"one read through {len(plan.merged)} images can be too much for its stack"
        yield KnownBad(reason=reason, instead="merge parts of it first, with a base further up")
    # Aborted 11 of 11 times on 7.2.22, never on 5.2.0, 10.0.2 and 11.1.3; what lies between was not tried.
    if pivots and (6, 0, 0) <= monitor.version < (10, 0, 0) and await _is_nvme(monitor, disk):
        reason = "versions like 7.2 abort when an emulated NVMe disk is moved onto its base while the guest writes"
        yield KnownBad(reason=reason, instead="merge with the VM off, or leave the active image out with `--top`")


async def _is_nvme(monitor: Monitor, disk: Disk) -> bool:
    path = disk.qdev if disk.qdev.startswith("/") else f"/machine/peripheral/{disk.qdev}"
    try:
        kind = await monitor.execute("qom-get", path=path, property="type")
    except CommandError:  # no device at all
        return False
    return str(kind).startswith("nvme")
