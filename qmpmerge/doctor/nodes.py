"""
Nodes of the block graph that are left over: filters of jobs that are gone, and what nobody uses any more.
"""

from collections.abc import Iterator, Sequence

from qmpmerge.doctor.findings import Finding
from qmpmerge.qemu import mutex
from qmpmerge.qemu.blockgraph import INSTRUMENTS, JOB_FILTERS, Disk, Layout
from qmpmerge.sockets import typed
from qmpmerge.targets.target import Target

LEFT_FILTERS = JOB_FILTERS | {"copy-before-write"}
"""Nodes that a job puts above a disk and takes away at its end; who makes backups by hand may insert the last one."""


async def examine(target: Target, layout: Layout) -> list[Finding]:
    """All findings about nodes. Raises what `Target.layout` raises."""
    return [*_filters(layout), *_unneeded(target, layout, await unneeded(target, layout))]


async def unneeded(target: Target, layout: Layout) -> Sequence[str]:
    """
    The names of the nodes that nobody needs; that through which a merge flushes only where none is at it any more.
    """
    found = layout.unneeded
    if INSTRUMENTS.isdisjoint(found):
        return found
    if not await mutex.is_taken(mutex.FLUSH, target.monitor):
        layout = await target.layout()  # the merge may have ended meanwhile, and taken it away
        return [name for name in layout.unneeded if name in found]
    return [name for name in found if name not in INSTRUMENTS]


def left_filters(layout: Layout) -> Iterator[tuple[Disk, str]]:
    """The filters of a job in the path of a disk on which no job works, by their disks."""
    for disk in layout.disks:
        for name in disk.nodes if disk.job is None else ():
            if layout.nodes[name].driver in LEFT_FILTERS and not _is_read(layout, disk, name):
                yield disk, name


def _is_read(layout: Layout, disk: Disk, name: str) -> bool:
    """
    Whether an export, a job or a device reads what a filter keeps: through it (``snapshot-access``), or in what it copies to.
    """
    kept = {name, layout.nodes[name].children.get("target", name)}
    return any(not kept.isdisjoint(layout.subtree(root)) for root in layout.roots - {disk.root})


def _filters(layout: Layout) -> Iterator[Finding]:
    for disk, name in left_filters(layout):
        what = f"{disk.name} goes through node {name} ({layout.nodes[name].driver}), but no job is on the disk"
        why = "every write is copied for a backup that nobody makes: whoever inserted it must take it out again"
        yield Finding("filter-left", "care", name, what, why)


def _unneeded(target: Target, layout: Layout, idle: Sequence[str]) -> Iterator[Finding]:
    """By trees; each is closed from its top down."""
    below = {child for name in idle for child in layout.nodes[name].children.values()}
    for top in (name for name in idle if name not in below):
        tree = [name for name in layout.subtree(top) if name in idle]
        named = [name for name in tree if not name.startswith("#")]  # the others go with them
        writable = [name for name in tree if not layout.nodes[name].info.get("ro", False)]
        what = f"no device, export or job uses it ({', '.join(named)})"
        why = "its files stay open" + (" for writing, and locked: nobody else can use them" if writable else "")
        why += "; keep it if it waits for a device"
        removed = [("blockdev-del", {"node-name": name}) for name in named]
        command = typed(target.monitor.name, *removed) if named else None
        yield Finding("unused-node", "care" if writable else "note", top, what, why, command)
