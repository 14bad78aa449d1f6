"""
Which node is which image: QEMU's block graph, decoded into disks and chains.

Three questions are asked, cheapest first: `x-debug-query-block-graph` for the edges,
`query-block` for the devices, and `query-named-block-nodes` with ``flat`` for the details; without ``flat`` the last one
takes QEMU 14 s at 300 layers, with the guest standing still. Where policy forbids the first, the nesting of
`query-blockstats` gives the same edges.

`decode` is pure and takes the replies as they are, so that film strips of any QEMU can be played to it. `Any` stops here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from qmpmerge import jobs
from qmpmerge.chain import Chain, Image, Inode
from qmpmerge.errors import CommandError, DiskNeeded, NoDisk, NoSuchDisk, StreamConcluded
from qmpmerge.jobs import Job
from qmpmerge.monitor import Monitor

FILTERS = frozenset(
    {
        "blkdebug", "blklogwrites", "blkreplay", "blkverify", "compress", "copy-before-write", "copy-on-read",
        "preallocate", "replication", "throttle",
        "commit_top", "mirror_top", "backup-top",  # put there by jobs, for as long as they run
    }
)  # fmt: skip
"""Drivers that show the data of the node below them (`is_filter` in QEMU's block drivers)."""

DEEP = 300
"""Layers from which `query-block`, nested and quadratic, is left out: 0.16 s at 200 layers, 4.6 s at 1000."""

LOOKS = 10
"""How often QEMU is asked again when its graph has changed between two questions."""

Locate = Callable[[str], tuple[str, Inode | None]]
"""Turns a file name of QEMU's into an absolute path or URI, and the inode where there is one."""


@dataclass
class Node:
    """A node of the graph: `children` maps the edge's name to the child's key, `info` is what QEMU tells of it."""

    key: str
    children: dict[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def driver(self) -> str:
        """The block driver, empty where QEMU did not tell."""
        return str(self.info.get("drv", ""))

    @property
    def below(self) -> str | None:
        """The child whose data a filter shows."""
        for name in ("file", "backing", "image", "raw"):
            if name in self.children:
                return self.children[name]
        return None


@dataclass(frozen=True)
class Disk:
    """
    A disk of a VM, or an exported root node of a qemu-storage-daemon.

    `name` is what users call it: the drive id, else the qdev id, else the node name. `root` is the node under the
    device, filters included: the one that jobs take as their device. `chain` is None for an empty drive. `nodes` are all
    nodes of the chain's images and filters, top down.
    """

    name: str
    drive: str
    qdev: str
    root: str
    chain: Chain | None
    nodes: tuple[str, ...]
    job: Job | None = None

    @property
    def is_chain(self) -> bool:
        """Whether there is a backing image at all."""
        return self.chain is not None and len(self.chain) > 1

    @property
    def top_nodes(self) -> tuple[str, ...]:
        """The nodes from the root down to the active image."""
        active = self.chain.active.node if self.chain is not None else None
        return self.nodes[: self.nodes.index(active) + 1] if active in self.nodes else self.nodes

    ROLES: ClassVar = (
        lambda disk, name: bool(name) and name in (disk.name, disk.drive),
        lambda disk, name: bool(name) and name == disk.qdev,
        lambda disk, name: name in disk.top_nodes,
        lambda disk, name: disk.chain is not None and disk.chain.active.is_file(name),
    )
    """What a user can mean by a disk's name, in the order of who wins: name, qdev id, node, the active image's path."""

    def is_called(self, name: str) -> bool:
        """Whether a user can mean this disk by `name`; an empty drive has no name that a merge could take."""
        return self.chain is not None and any(role(self, name) for role in Disk.ROLES)


@dataclass(frozen=True)
class Layout:
    """
    All disks of a QEMU at one moment, its jobs, and the graph's nodes by name.

    `job_edges` maps a job's id and an edge's name (``base``, ``source``, ``target``, ``intermediate node``) to nodes.
    `exported` are the nodes that something without a name uses: an export, or a job's target while it runs.
    `held` are the nodes that a device, an export or a job has for its root.
    """

    disks: tuple[Disk, ...]
    jobs: tuple[Job, ...]
    nodes: Mapping[str, Node]
    job_edges: Mapping[str, Mapping[str, list[str]]]
    exported: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()

    def find(self, name: str | None, target: str) -> Disk:
        """
        The disk that a user means; without a name the only one with a backing chain, or the only one at all, of those
        that anybody uses.

        Raises NoSuchDisk, DiskNeeded, NoDisk.
        """
        filled = [disk for disk in self.disks if disk.chain is not None]
        if name is not None:
            for role in Disk.ROLES:
                for disk in filled:
                    if role(disk, name):
                        return disk
            raise NoSuchDisk(disk=name, target=target, known=[disk.name for disk in filled])
        used = [disk for disk in filled if disk.root in self.held] or filled  # nodes left over look like disks too
        choices = [disk for disk in used if disk.is_chain] or used
        if not choices:
            raise NoDisk(target=target)
        if len(choices) > 1:
            raise DiskNeeded(target=target, known=[disk.name for disk in choices])
        return choices[0]

    def subtree(self, root: str) -> list[str]:
        """The names of all nodes from `root` down, every parent before its children."""
        order: dict[str, None] = {}
        stack = [root]
        while stack:
            name = stack.pop()
            if name in self.nodes and name not in order:
                order[name] = None
                stack.extend(reversed(self.nodes[name].children.values()))
        return list(order)

    def between(self, top: str, base: str) -> list[str]:
        """The names of the nodes from `top` down that are not part of `base`, every parent before its children."""
        below = set(self.subtree(base))
        return [node for node in self.subtree(top) if node not in below]


async def discover(monitor: Monitor, locate: Locate) -> Layout:
    """
    Ask QEMU for everything and decode it.

    Raises StreamConcluded where the question itself could crash QEMU, and what
    `Monitor.execute` raises.
    """
    looks = 0
    while True:
        running = await jobs.query(monitor)
        for job in running:
            if job.type == "stream" and job.status == "concluded":
                raise StreamConcluded(job=job.id, target=monitor.name)
        graph, devices, details = await _ask(monitor)
        looks += 1
        if looks == LOOKS or not _is_torn(graph, details):
            return decode(graph, devices, details, running, locate)


async def _ask(monitor: Monitor) -> tuple[Any, Any, Any]:
    try:
        graph = await monitor.execute("x-debug-query-block-graph")
    except CommandError:
        graph = graph_of_stats(await monitor.execute("query-blockstats"))
    devices = await monitor.execute("query-block") if _depth(graph) <= DEEP else []
    return graph, devices, await monitor.execute("query-named-block-nodes", flat=True)


def _is_torn(graph: Any, details: Any) -> bool:
    """Whether the graph has changed between the questions, as it does when a job ends: a node has no details."""
    told = {entry["node-name"] for entry in details}
    return any(node["type"] == "block-driver" and node["name"] not in told for node in graph["nodes"])


def decode(graph: Any, devices: Any, details: Any, running: list[Job], locate: Locate) -> Layout:
    """Make a `Layout` of the replies to the three questions."""
    return _Decoder(graph, devices, details, running, locate).layout()


def graph_of_stats(stats: Any) -> Any:
    """
    The graph as `x-debug-query-block-graph` would tell it, from the nesting of `query-blockstats`.

    There ``parent`` is the child that stores an image, and ``backing`` the one below it.
    """
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []

    def add(kind: str, name: str) -> int:
        nodes.append({"id": len(nodes) + 1, "name": name, "type": kind})
        return len(nodes)

    for device in stats:
        name = device.get("device") or device.get("qdev", "")
        parent, edge, entry = add("block-backend", name), "root", device if "node-name" in device else None
        while entry is not None:
            node = add("block-driver", entry["node-name"])
            edges.append({"parent": parent, "child": node, "name": edge})
            above, storage = node, entry.get("parent")
            while storage is not None:
                below = add("block-driver", storage["node-name"])
                edges.append({"parent": above, "child": below, "name": "file"})
                above, storage = below, storage.get("parent")
            parent, edge, entry = node, "backing", entry.get("backing")
    return {"nodes": nodes, "edges": edges}


def _depth(graph: Any) -> int:
    return sum(edge["name"] == "backing" for edge in graph["edges"])


class _Decoder:
    def __init__(self, graph: Any, devices: Any, details: Any, running: list[Job], locate: Locate) -> None:
        self._jobs = running
        self._locate = locate
        self._drives = {entry["device"]: entry.get("qdev", "") for entry in devices if entry["device"]}
        self._devices_known = bool(devices)
        self._empty = [entry for entry in devices if "inserted" not in entry]
        self._kinds = {node["id"]: node["type"] for node in graph["nodes"]}
        self._names = {node["id"]: node["name"] for node in graph["nodes"]}
        self._edges = graph["edges"]
        info = {entry["node-name"]: entry for entry in details}
        self._nodes = {
            node["name"]: Node(key=node["name"], info=info.get(node["name"], {}))
            for node in graph["nodes"]
            if node["type"] == "block-driver"
        }
        self._parents: set[str] = set()
        self._held: set[str] = set()
        self._job_edges: dict[str, dict[str, list[str]]] = {}
        self._read_edges()

    def _read_edges(self) -> None:
        for edge in self._edges:
            child, kind = self._names[edge["child"]], self._kinds[edge["parent"]]
            parent = self._names[edge["parent"]]
            if kind == "block-driver":
                self._nodes[parent].children[edge["name"]] = child
                self._parents.add(child)
            elif kind == "block-backend":
                self._held.add(child)
            elif kind == "block-job":
                self._job_edges.setdefault(parent, {}).setdefault(edge["name"], []).append(child)

    def layout(self) -> Layout:
        disks = [*self._attached(), *self._empty_drives(), *self._unattached()]
        # A concluded job still holds nodes that it merged away: the disk of a device comes first.
        placed = {disk.job.id: disk.job for disk in reversed(disks) if disk.job is not None}
        running = tuple(placed.get(job.id, job) for job in self._jobs)
        return Layout(
            disks=tuple(disks),
            jobs=running,
            nodes=self._nodes,
            job_edges=self._job_edges,
            exported=tuple(self._exported()),
            held=frozenset(self._held),
        )

    def _attached(self) -> Iterator[Disk]:
        """Disks under a named block backend, in the order in which their devices were made."""
        backends = sorted(
            (edge["parent"], self._names[edge["child"]])
            for edge in self._edges
            if self._kinds[edge["parent"]] == "block-backend" and edge["name"] == "root"
        )
        for backend, root in backends:
            name = self._names[backend]
            if not name:
                continue  # an export's or a job's backend, not a device's
            # Where the devices were not asked for, only a QOM path is surely no drive id.
            drive = name if name in self._drives or not (self._devices_known or name.startswith("/")) else ""
            yield self._disk(root, drive=drive, qdev=qdev_id(self._drives.get(drive, name)))

    def _empty_drives(self) -> Iterator[Disk]:
        for entry in self._empty:
            drive, qdev = entry["device"], qdev_id(entry.get("qdev", ""))
            yield Disk(name=drive or qdev, drive=drive, qdev=qdev, root="", chain=None, nodes=())

    def _unattached(self) -> Iterator[Disk]:
        """Roots that no device uses: what a qemu-storage-daemon exports, or what was hot-added and not yet used."""
        roots = [edge for edge in self._edges if self._kinds[edge["parent"]] == "block-backend"]
        attached = {self._names[edge["child"]] for edge in roots if self._names[edge["parent"]]}
        exported = {self._names[edge["child"]] for edge in roots} - attached
        for name, node in self._nodes.items():
            if name not in self._parents and name not in attached and (node.children or name in exported):
                yield self._disk(name, drive="", qdev="")

    def _exported(self) -> Iterator[str]:
        for edge in self._edges:
            if self._kinds[edge["parent"]] == "block-backend" and not self._names[edge["parent"]]:
                yield self._names[edge["child"]]

    def _disk(self, root: str, *, drive: str, qdev: str) -> Disk:
        images: list[Image] = []
        nodes: list[str] = []
        current: str | None = root
        while current is not None:
            node = self._nodes[current]
            nodes.append(current)
            if node.driver in FILTERS:
                current = node.below
                continue
            images.append(self._image(node))
            current = node.children.get("backing")
        disk = Disk(
            name=drive or qdev or root,
            drive=drive,
            qdev=qdev,
            root=root,
            chain=Chain(tuple(reversed(_told_apart(images)))),
            nodes=tuple(nodes),
        )
        return replace(disk, job=self._job_on(disk))

    def _image(self, node: Node) -> Image:
        leaf = self._leaf(node)
        own = str(node.info.get("file", ""))
        # A plain name of the image's own is its file's; else its storage knows.
        name = own if own and ":" not in own.split("/", 1)[0] else str(leaf.info.get("file", leaf.key))
        file, inode = self._locate(name)
        told = node.info.get("image", {})
        return Image(
            file=file,
            # A bare protocol node under an overlay is what users call raw.
            format="raw" if node is leaf else node.driver,
            virtual_size=int(told.get("virtual-size", 0)),
            node=node.key,
            backing=told.get("backing-filename"),
            backing_format=told.get("backing-filename-format"),
            allocated=told.get("actual-size"),
            inode=inode,
            read_only=bool(node.info.get("ro", False)),
        )

    def _leaf(self, node: Node) -> Node:
        while (below := node.children.get("file") or node.children.get("image")) is not None:
            node = self._nodes[below]
        return node

    def _job_on(self, disk: Disk) -> Job | None:
        for job in self._jobs:
            held = {node for nodes in self._job_edges.get(job.id, {}).values() for node in nodes}
            if held & set(disk.nodes):
                return replace(job, disk=disk.name)
        return None


def _told_apart(images: list[Image]) -> list[Image]:
    """Slices of one file (a container such as an OVA) are known by their nodes: their file names them no more."""
    files = [image.inode or image.file for image in images]
    return [
        replace(image, file=f"{image.file}#{image.node}", inode=None)
        if files.count(image.inode or image.file) > 1
        else image
        for image in images
    ]


def qdev_id(path: str) -> str:
    """``/machine/peripheral/vd0/virtio-backend`` is what the user called ``vd0``; other paths stay as they are."""
    match = re.match(r"/machine/peripheral/([^/]+)", path)
    return match[1] if match else path
