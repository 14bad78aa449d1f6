"""
The verb `graph`: the block graph as QEMU has it, who uses each node and what that one lets others do, and what deserves a look.

Nothing is decided here that is not known elsewhere: who needs a node and which filters are left over is the doctor's, who is in
the way of a commit the graph's own.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qmpmerge.doctor import nodes as left
from qmpmerge.qemu import reply, usage
from qmpmerge.qemu.blockgraph import FILTERS, INSTRUMENTS, JOB_FILTERS, Disk, DiskName, Layout, Node, qdev_id, storage
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.usage import Export, GraphEdge
from qmpmerge.targets.target import Target
from qmpmerge.value import Value

_SWITCHED = frozenset({"commit", "mirror"})
"""Types of jobs that move the disk onto their target, where they have one."""

_INSERTED = {"stream": "copy-on-read", "backup": "copy-before-write"}
"""The driver of the filter that a job of this type has for its main node, which others can have made as well."""

_UNTOLD = (
    "permissions, the nodes of jobs, and nodes that no device uses: this QEMU refuses x-debug-query-block-graph",
    "exports: this QEMU refuses query-block-exports",
    "permissions: they are given by the QEMU that has the images open, which is not asked here",
)


class Mark(Value):
    """
    What about a node deserves a look: ``job-filter``, ``job-target``, ``pending-pivot``, ``throttled``, ``commit-into``,
    ``commit-across``, ``filter-left``, ``unneeded``, ``instrument``; and a sentence.
    """

    name: str
    message: str


class GraphNode(Value):
    """
    A node: its block driver, and the file where it is one that has any. `is_filter` says that it shows the data of the node
    below it; `used` whether a device, an export or a job reaches it, None where that is not known.
    """

    name: str
    driver: str
    file: str | None
    is_filter: bool
    read_only: bool
    used: bool | None
    marks: tuple[Mark, ...] = ()


class Graph(Value):
    """
    The graph of a target, or of one of its disks with what that one's job has besides. `disks` are those with a chain, each
    with its images; `is_live` says that a QEMU has it all open. `not_known` are sentences.
    """

    target: str
    disk: str | None
    is_live: bool
    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]
    disks: tuple[Disk, ...]
    jobs: tuple[Job, ...]
    exports: tuple[Export, ...]
    not_known: tuple[str, ...]


async def graph(target: Target, disk: DiskName | None = None) -> Graph:
    """
    The block graph of the target; with `disk` of that one alone.

    Raises NoSuchDisk, BadReply, and what `Target.layout` raises.
    """
    layout = await target.layout()
    shown = None if disk is None else layout.find(disk, target.name)
    if not target.is_live:
        return of(usage.forgotten(layout), target.name, shown, (), (), is_live=False)
    exports = await usage.exports(target.monitor)
    unneeded = await left.unneeded(target, layout)
    with reply.making_sense(target.name, "x-debug-query-block-graph"):
        return of(layout, target.name, shown, exports, unneeded)


def of(
    layout: Layout,
    target: str,
    disk: Disk | None,
    exports: Sequence[Export] | None,
    unneeded: Collection[str],
    *,
    is_live: bool = True,
) -> Graph:
    """The same of what is known already; `exports` are None where QEMU does not tell them."""
    names = list(layout.nodes) if disk is None else _reached(layout, disk)
    marks: dict[str, list[Mark]] = {}
    for name, mark in _marks(layout, exports or (), unneeded):
        marks.setdefault(name, []).append(mark)
    has_permissions = any(parent.takes is not None for users in layout.parents.values() for parent in users)
    is_told = has_permissions or not layout.parents
    edges = [edge for name in names for _, edge in usage.users(layout, name, exports or ())]
    files, knows_need = _files(layout), is_told and is_live
    nodes = [
        _node(layout.nodes[name], files.get(name), name not in unneeded if knows_need else None, marks.get(name, ()))
        for name in names
    ]
    disks = [one for one in layout.disks if one.chain is not None and (disk is None or one.name == disk.name)]
    untold = (is_live and not is_told, is_live and exports is None, not is_live)
    return Graph(
        target=target,
        disk=None if disk is None else disk.name,
        is_live=is_live,
        nodes=tuple(nodes),
        edges=tuple(edges),
        disks=tuple(disks),
        jobs=tuple(job for job in layout.jobs if disk is None or job.disk == disk.name),
        exports=tuple(one for one in exports or () if one.node in names),
        not_known=tuple(text for text, is_so in zip(_UNTOLD, untold, strict=True) if is_so),
    )


def _reached(layout: Layout, disk: Disk) -> list[str]:
    """The nodes of the disk, and those that its job has besides."""
    edges = layout.job_edges.get(disk.job.id, {}) if disk.job is not None else {}
    roots = [disk.root, *(name for held in edges.values() for name in held)]
    return [*dict.fromkeys(name for root in roots for name in layout.subtree(root))]


def _files(layout: Layout) -> dict[str, str]:
    """Where the files of images lie, by their nodes; of others it is known by what QEMU has opened them."""
    images = [image for disk in layout.disks for image in disk.chain or ()]
    images += [image.data for image in images if image.data is not None]
    return {[*storage(layout.nodes[image.node or ""], layout.nodes)][-1].key: image.file for image in images}


def _node(node: Node, file: str | None, used: bool | None, marks: Sequence[Mark]) -> GraphNode:
    called = str(node.info.get("file", "")) if not node.children else ""
    return GraphNode(
        name=node.key,
        driver=node.driver,
        file=file or called or None,
        is_filter=node.driver in FILTERS,
        read_only=bool(node.info.get("ro", False)),
        used=used,
        marks=tuple(marks),
    )


# --- what deserves a look --------------------------------------------------------------------------------------------


def _marks(layout: Layout, exports: Sequence[Export], unneeded: Collection[str]) -> Iterator[tuple[str, Mark]]:
    for job in layout.jobs:
        yield from _of_job(layout, job, layout.job_edges.get(job.id, {}))
    yield from _throttled(layout)
    for disk in layout.disks:
        yield from _in_the_way(layout, disk, exports)
    for disk, name in left.left_filters(layout):
        yield name, Mark("filter-left", f"{disk.name} goes through it, but no job is on the disk")
    for name in INSTRUMENTS.intersection(layout.nodes).difference(unneeded):
        yield name, Mark("instrument", "a merge of qmpmerge flushes through it, and takes it away in a moment")
    below = {child for name in unneeded for child in layout.nodes[name].children.values()}
    for name in unneeded:
        if name not in below:
            yield name, Mark("unneeded", "no device, export or job uses it")


def _of_job(layout: Layout, job: Job, edges: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Mark]]:
    for name in _filters(layout, job, edges):
        yield name, Mark("job-filter", f"filter of job {job.id} ({job.type}, {job.status})")
    for name in edges.get("target", ()):
        if job.type in _SWITCHED and job.status in ("ready", "standby", "pending"):
            moved = job.disk or "the disk"
            yield name, Mark("pending-pivot", f"once job {job.id} is completed, {moved} is moved here")
        else:
            yield name, Mark("job-target", f"job {job.id} ({job.type}, {job.status}) copies to it")


def _filters(layout: Layout, job: Job, edges: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """
    Those that the job has put there: a commit's is above its top, that of the others is what they have for their main node.
    Where that is a disk's root, it can be a filter that somebody else has made, of a driver that jobs have no filters of.
    """
    main = edges.get("main node", ())
    above = [parent.name for held in edges.values() for name in held for parent in layout.parents[name]]
    found = [name for name in (*main, *above) if name in layout.nodes and layout.nodes[name].driver in JOB_FILTERS]
    return dict.fromkeys([*found, *(name for name in main if layout.nodes[name].driver == _INSERTED.get(job.type))])


def _throttled(layout: Layout) -> Iterator[tuple[str, Mark]]:
    """By a filter, or by the limits of a device."""
    for name, node in layout.nodes.items():
        if node.driver == "throttle":
            yield name, Mark("throttled", f"limits what goes through it (throttle group {_group(node) or 'unknown'})")
    roots = {disk.name: disk.root for disk in layout.disks}
    for entry in layout.devices:
        group, device = entry.get("inserted", {}).get("group"), entry["device"] or qdev_id(entry.get("qdev", ""))
        if group and device in roots:
            yield roots[device], Mark("throttled", f"what device {device} does is limited (throttle group {group})")


def _group(node: Node) -> str | None:
    """That of a filter, whose file is called by all that it was made with."""
    try:
        told: Any = json.loads(str(node.info.get("file", "")).removeprefix("json:"))
    except (ValueError, RecursionError):
        return None
    group = told.get("throttle-group") if isinstance(told, dict) else None
    return group if isinstance(group, str) else None


def _in_the_way(layout: Layout, disk: Disk, exports: Sequence[Export]) -> Iterator[tuple[str, Mark]]:
    """Who past the disk keeps its images from being merged, by the permissions that a commit asks for."""
    if disk.chain is None or disk.job is not None or disk.root not in layout.held:  # a job has layers for itself
        return
    for image in disk.chain.images[:-1]:
        name = image.node or ""
        past = layout.past(disk, name)
        users = [
            (parent, f"{edge.kind} {edge.parent}")
            for parent, edge in usage.users(layout, name, exports)
            if parent in past
        ]
        keepers = [called for parent, called in users if parent.lets_write is False]
        readers = [called for parent, called in users if parent.reads]
        if keepers:
            does = "lets" if len(keepers) == 1 else "let"
            what = f"no commit of {disk.name} into it: {', '.join(keepers)} {does} nobody else write"
            yield name, Mark("commit-into", what)
        if readers and image is not disk.chain.base:
            does = "reads" if len(readers) == 1 else "read"
            yield name, Mark("commit-across", f"no commit of {disk.name} across it: {', '.join(readers)} {does} it")
