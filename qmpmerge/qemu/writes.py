"""
What guests write to an image while a job of QEMU's copies into it.

A dirty bitmap of ours tells it, in QEMU's memory alone, on the image's own node: all that anybody writes is marked there, also
by who was attached below the job's filter meanwhile, and nothing of what the job copies is, which QEMU writes past it. (QEMU
7.2.22, 10.0.2 and 11.1.3: after a whole pull it told of what was written and of nothing else, and of nothing at all where
nobody wrote; see tests/qemu/test_writes.py.)

QEMU tells by QMP how much is marked in a bitmap, and not what. So where anything is, it is put into a small qcow2, in memory,
that we hand to QEMU; that takes a monitor on a UNIX socket of this host, and `add-fd`, which a storage daemon does not have.
"""

from collections.abc import Mapping
from typing import Any

from qmpmerge import folder
from qmpmerge.errors import QemuRefused
from qmpmerge.images import masks, qemuimg
from qmpmerge.images.qemuimg import Extent
from qmpmerge.qemu import flush, mutex
from qmpmerge.qemu.bitmaps import OURS, is_ours
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.monitor import Monitor

Command = tuple[str, Mapping[str, Any]]


async def begin(monitor: Monitor, layout: Layout, node: str) -> None:
    """Mark from now on what is written to this node. Raises QemuRefused, as where a bitmap of the user's is called so."""
    await end(monitor, layout, node)
    await monitor.execute("block-dirty-bitmap-add", node=node, name=OURS)


async def end(monitor: Monitor, layout: Layout, node: str) -> None:
    """Take away what `begin` has made, or what was left on this node by somebody who was killed. Raises QemuRefused."""
    known = layout.nodes.get(node)
    if known is not None and any(map(is_ours, known.info.get("dirty-bitmaps", ()))):
        await monitor.execute("block-dirty-bitmap-remove", node=node, name=OURS)


async def read(monitor: Monitor, node: str, size: int) -> list[Extent]:
    """
    The parts that were written to, in order, of an image of `size` bytes; those of all writes that had begun by then too, which
    are marked as they end: QEMU waits for them before a transaction (7.2.22, 10.0.2, 11.1.3). Raises QemuRefused where there
    are some and QEMU does not tell which, ImageUnreadable, ToolMissing, and what a lost session raises.
    """
    if await _are_none(monitor, node):
        return []
    with folder.in_memory() as file:
        await qemuimg.create(file, size)
        try:
            async with mutex.taken(mutex.FLUSH, monitor, flush.SECONDS):
                number = await monitor.hand_over(file.descriptor)
                replies = await monitor.execute_all(_storing(node, number))
        except mutex.NoTurn as error:
            raise QemuRefused(command="add-fd", reason=str(error)) from None
        for reply in replies[1:]:
            if isinstance(reply, QemuRefused):
                raise reply
        return masks.stored(file, size)


async def _are_none(monitor: Monitor, node: str) -> bool:
    """Which any QEMU tells. Raises QemuRefused where it does not know the bitmap any more."""
    all_have_ended: Command = ("transaction", {"actions": []})
    ended, nodes = await monitor.execute_all([all_have_ended, ("query-named-block-nodes", {"flat": True})])
    for reply in (ended, nodes):
        if isinstance(reply, QemuRefused):
            raise reply
    marked = [
        bitmap["count"]
        for entry in nodes
        if entry["node-name"] == node
        for bitmap in entry.get("dirty-bitmaps", ())
        if is_ours(bitmap)
    ]
    if not marked:
        raise QemuRefused(command="query-named-block-nodes", reason=f"the bitmap {OURS} of {node} is gone")
    return not any(marked)


def _storing(node: str, number: int) -> list[Command]:
    """All in one go, so that a kill leaves hardly ever something; what one has left the next takes away."""
    remove = ("blockdev-del", {"node-name": OURS})
    storage = {"driver": "file", "filename": f"/dev/fdset/{number}", "locking": "off"}
    there = {"node": OURS, "name": OURS, "persistent": True, "disabled": True}
    merge = {"node": OURS, "target": OURS, "bitmaps": [{"node": node, "name": OURS}]}
    actions = [{"type": "block-dirty-bitmap-add", "data": there}, {"type": "block-dirty-bitmap-merge", "data": merge}]
    return [
        remove,
        ("blockdev-add", {"driver": "qcow2", "node-name": OURS, "file": storage}),
        ("transaction", {"actions": actions}),
        remove,
        ("remove-fd", {"fdset-id": number}),
    ]
