"""What the tables of VMs, disks, images and jobs have in their columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpmerge.cli.render.humanize import limit, size, status
from qmpmerge.cli.render.table import Column

if TYPE_CHECKING:
    from qmpmerge.processes.vms import Vm
    from qmpmerge.qemu.blockgraph import Disk
    from qmpmerge.qemu.jobs import Job
    from qmpmerge.targets.target import ChainView

VMS = (Column("NAME"), Column("PID", right=True), Column("USER"), Column(""), Column("MONITOR", shrinks=True))
DISKS = (
    Column("DISK", shrinks=True),
    Column("FORMAT"),
    Column("DEPTH", right=True),
    Column("SIZE", right=True),
    Column("ALLOCATED", right=True),
    Column("JOB", shrinks=True),
    Column("ACTIVE IMAGE", shrinks=True),
)
CHAIN = (
    Column("INDEX", right=True),
    Column("FORMAT"),
    Column("SIZE", right=True),
    Column("ALLOCATED", right=True),
    Column("NODE", shrinks=True),
    Column("FILE (* active)", shrinks=True),
    Column("BACKING", shrinks=True),
)
JOBS = (
    Column("JOB", shrinks=True),
    Column("TYPE"),
    Column("DISK", shrinks=True),
    Column("STATUS"),
    Column("DONE"),
    Column("SPEED", right=True),
)


def vm(found: "Vm") -> tuple[str, ...]:
    """Monitors that can be used as TARGET come last."""
    monitors = ", ".join(found.monitors) or "no monitor"
    return found.name or "-", str(found.pid), found.user, "libvirt" if found.libvirt else "", monitors


def disk(found: "Disk") -> tuple[str, ...]:
    """An empty drive has a name and nothing else."""
    if found.chain is None:
        return found.name, "", "", "", "", "", "(empty)"
    active = found.chain.active
    return (
        found.name,
        active.format,
        str(len(found.chain)),
        size(active.virtual_size),
        size(active.allocated),
        found.job.id if found.job else "",
        active.file + (" (read-only)" if active.read_only else ""),
    )


def images(view: "ChainView") -> Sequence[tuple[str, ...]]:
    """Base first; the backing names as the headers have them."""
    return [
        (
            str(index),
            image.format,
            size(image.virtual_size),
            size(image.allocated),
            image.node or "-",
            image.label + (" *" if image is view.chain.active else ""),
            image.backing or "",
        )
        for index, image in enumerate(view.chain, 1)
    ]


def job(found: "Job") -> tuple[str, ...]:
    """What can be done with it is no column: it would be wider than a terminal."""
    done = f"{size(found.done)} of {size(found.total)}"
    return found.id, found.type, found.disk or "-", status(found), done, limit(found.speed)
