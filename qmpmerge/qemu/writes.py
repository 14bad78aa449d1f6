"""
What guests write to an image while a job of QEMU's copies into it.

A dirty bitmap of ours tells it, in QEMU's memory alone. It begins on the image, before the job is asked for, and moves to the
job's own filter in the moment that is there: all that guests write passes through the filter, what the job copies does not, and
the bitmap is gone with it, however the job ends and whoever ends it. (QEMU 7.2.22, 10.0.2 and 11.1.3: after a whole pull it
told of what was written and of nothing else, and of nothing at all where nobody wrote; see tests/qemu/test_writes.py.)

QEMU tells by QMP how much is marked in a bitmap, and not what. So it is put into a small qcow2, in memory, that we hand to
QEMU; that takes a monitor on a UNIX socket of this host, and `add-fd`, which a storage daemon does not have.
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


def moved(node: str, to: str) -> Command:
    """The command that has `to` go on with it, and leaves no write out: QEMU waits for all that is under way first."""
    there = {"node": to, "name": OURS}
    data = {
        "block-dirty-bitmap-add": there,
        "block-dirty-bitmap-merge": {"node": to, "target": OURS, "bitmaps": [{"node": node, "name": OURS}]},
        "block-dirty-bitmap-remove": {"node": node, "name": OURS},
    }
    return "transaction", {"actions": [{"type": kind, "data": one} for kind, one in data.items()]}


async def end(monitor: Monitor, layout: Layout, node: str) -> None:
    """Take away one that was left on this node by somebody who was killed before it could be moved. Raises QemuRefused."""
    known = layout.nodes.get(node)
    if known is not None and any(map(is_ours, known.info.get("dirty-bitmaps", ()))):
        await monitor.execute("block-dirty-bitmap-remove", node=node, name=OURS)


async def read(monitor: Monitor, node: str, size: int) -> list[Extent]:
    """
    The parts that were written to, in order, of an image of `size` bytes; those of all writes that had begun by then too, which
    are marked as they end: QEMU waits for them before a transaction (7.2.22, 10.0.2, 11.1.3). Raises QemuRefused where QEMU
    does not tell, ImageUnreadable, ToolMissing, and what a lost session raises.
    """
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
