"""
Who uses a node of the block graph: other nodes, devices, exports and jobs, and what each does with it and lets others do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from qmpmerge.errors import QemuRefused
from qmpmerge.qemu.blockgraph import Layout, Parent, qdev_id
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.value import Value

Kind = Literal["node", "device", "export", "job", "other"]
"""Who uses a node; ``other`` is what has no name and may be any of several."""

PERMISSIONS = ("consistent-read", "write", "write-unchanged", "resize", "graph-mod")
"""In QEMU's order."""


class GraphEdge(Value):
    """
    That `parent`, which is of this `kind`, uses `node`, and for what (`role`, as QEMU calls it: ``backing``, ``file``,
    ``root``, ``main node``). `takes` is what it does with the node, `lets` what it lets others do, by QEMU's names and in its
    order; None where that is not known.
    """

    kind: Kind
    parent: str
    node: str
    role: str
    takes: tuple[str, ...] | None
    lets: tuple[str, ...] | None


class Export(Value):
    """What a node is shown by to others: its id, its type (``nbd``, ``vhost-user-blk``, ``fuse``), and the node."""

    id: str
    type: str
    node: str


async def exports(monitor: Monitor) -> list[Export] | None:
    """All of them; None where this QEMU does not tell."""
    try:
        told = await monitor.execute("query-block-exports")
    except QemuRefused as error:
        if not error.is_unheard_of:
            raise
        return None
    return [Export(one["id"], one["type"], one["node-name"]) for one in told]


def forgotten(layout: Layout) -> Layout:
    """The same without permissions: a daemon of our own opens images as it likes."""
    parents = {name: [replace(one, takes=None, lets=None) for one in users] for name, users in layout.parents.items()}
    return replace(layout, parents=parents)


def users(layout: Layout, name: str, exports: Sequence[Export]) -> Iterator[tuple[Parent, GraphEdge]]:
    """All who use a node, as the layout has them and in words."""
    parents = layout.parents.get(name, ())
    nameless = _nameless(layout, name, exports, [parent for parent in parents if _is_nameless(parent)])
    for parent in parents:
        kind, called = next(nameless) if _is_nameless(parent) else _called(parent)
        yield parent, GraphEdge(kind, called, name, parent.edge, _ordered(parent.takes), _ordered(parent.lets))


def _is_nameless(parent: Parent) -> bool:
    return parent.kind == "block-backend" and not parent.name


def _called(parent: Parent) -> tuple[Kind, str]:
    if parent.kind == "block-backend":
        return "device", qdev_id(parent.name)
    return ("job" if parent.kind == "block-job" else "node"), parent.name


def _nameless(
    layout: Layout, name: str, exports: Sequence[Export], parents: Sequence[Parent]
) -> Iterator[tuple[Kind, str]]:
    """
    Exports, and jobs for what they copy from and to, have no name in the graph. An export reads at the least, what a job of
    its mirrors to it does not. Else it is known which is which where there is one, or where all do the same.
    """
    shown: list[tuple[Kind, str]] = [("export", one.id) for one in exports if one.node == name]
    jobs: list[tuple[Kind, str]] = [
        ("job", job) for job, edges in layout.job_edges.items() if any(name in held for held in edges.values())
    ]
    readers = [parent for parent in parents if parent.reads]
    are_told = len(readers) == len(shown) and len(set(readers)) <= 1
    told = iter(shown)
    for parent in parents:
        if parent.reads and are_told:
            yield next(told)
        else:
            possible = [*shown, *jobs] if parent.reads else jobs
            either: tuple[Kind, str] = ("other", " or ".join(called for _, called in possible) or "unnamed")
            yield possible[0] if len(possible) == 1 else either


def _ordered(told: frozenset[str] | None) -> tuple[str, ...] | None:
    if told is None:
        return None
    return (*(one for one in PERMISSIONS if one in told), *sorted(told.difference(PERMISSIONS)))
