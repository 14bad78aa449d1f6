"""
Which node is which image: QEMU's block graph, decoded into disks and chains.

Three questions are asked, cheapest first: `x-debug-query-block-graph` for the edges,
`query-block` for the devices, and `query-named-block-nodes` with ``flat`` for the details; without ``flat`` the last one
takes QEMU 14 s at 300 layers, with the guest standing still. Where policy forbids the first, the nesting of
`query-blockstats` gives the same edges.

`decode` is pure and takes the replies as they are, so that film strips of any QEMU can be played to it. `Any` stops here.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image, Inode
from qmpmerge.errors import DiskNeeded, NoDisk, NoSuchDisk, NoSuchJob
from qmpmerge.qemu.jobs import Job, job_id
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.qemu.details import DiskDetails

DiskName = str | os.PathLike[str]
"""What users call a disk by: a word, or the path of its active image."""

JOB_FILTERS = frozenset({"commit_top", "mirror_top", "backup-top"})
"""Filters that jobs put above a disk, for as long as they run."""

FILTERS = JOB_FILTERS | {
    "blkdebug", "blklogwrites", "blkreplay", "blkverify", "compress", "copy-before-write", "copy-on-read",
    "preallocate", "replication", "throttle",
}  # fmt: skip
"""Drivers that show the data of the node below them (`is_filter` in QEMU's block drivers)."""

FLUSH = "qmpmerge-flush"
"""The node through which a merge of ours flushes an image, see `flush`."""

INSTRUMENTS = frozenset({FLUSH})
"""Nodes of ours that are put above an image for a moment: roots that are no disks."""


@dataclass
class Node:
    """
    A node of the graph: `children` maps the edge's name to the child's key, `info` is what QEMU tells of it.

    `lets_write` says whether others may write to its file, None where that was not told.
    """

    key: str
    children: dict[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    lets_write: bool | None = None

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


class Parent(Value):
    """
    Who has a node for a child, by its name, which an export has not: `kind` and `edge` as QEMU tells them. `takes` is what it
    does with the node and `lets` what others may do meanwhile, by QEMU's names (``consistent-read``, ``write``,
    ``write-unchanged``, ``resize``), None where that was not told.
    """

    kind: str
    name: str
    edge: str
    takes: frozenset[str] | None
    lets: frozenset[str] | None

    @property
    def reads(self) -> bool | None:
        """Whether it reads the node."""
        return None if self.takes is None else "consistent-read" in self.takes

    @property
    def lets_write(self) -> bool | None:
        """Whether others may write to the node."""
        return None if self.lets is None else "write" in self.lets


def storage(node: Node, nodes: Mapping[str, Node]) -> Iterator[Node]:
    """The nodes that an image is read through, from its own down to that of its file. Raises ValueError for a circle."""
    seen = {node.key}
    yield node
    while (below := node.children.get("file") or node.children.get("image")) is not None:
        node = nodes[below]
        if node.key in seen:
            raise ValueError(f"{node.key} lies below itself")
        seen.add(node.key)
        yield node


class Disk(Value):
    """
    A disk of a VM, or an exported root node of a qemu-storage-daemon.

    `name` is what users call it: the drive id, else the qdev id, else the node name; `drive` and `qdev` are None where there
    is none. `root` is the node under the device, filters included: the one that jobs take as their device. `chain` is None for
    an empty drive. `nodes` are all nodes of the chain's images and filters, top down. `details` are there where they were asked
    for.
    """

    name: str
    drive: str | None
    qdev: str | None
    root: str
    chain: Chain | None
    nodes: tuple[str, ...]
    job: Job | None = None
    details: "DiskDetails | None" = None

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
        lambda disk, name: name in disk.nodes,
    )
    """
    What a user can mean by a disk's name, in the order of who wins: name, qdev id, node of the active image or above it, the
    active image's path, any node of the chain, which was the active one's before the last snapshot.
    """


class Layout(Value):
    """
    All disks of a QEMU at one moment, its jobs, and the graph's nodes by name.

    `job_edges` maps a job's id and an edge's name (``base``, ``source``, ``target``, ``intermediate node``) to nodes.
    `exported` are the nodes that something without a name uses: an export, or a job's target while it runs.
    `held` are the nodes that a device, an export or a job has for its root, `parents` all who have a node, by its name,
    `devices` what QEMU tells of those (`query-block`). `files` are those that QEMU had open before it was asked, none where
    that cannot be seen.
    """

    disks: tuple[Disk, ...]
    jobs: tuple[Job, ...]
    nodes: Mapping[str, Node]
    job_edges: Mapping[str, Mapping[str, list[str]]]
    exported: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()
    parents: Mapping[str, list[Parent]] = field(default_factory=dict)
    devices: Sequence[Any] = ()
    files: frozenset[Inode] = frozenset()

    def find(self, name: DiskName | None, target: str) -> Disk:
        """
        The disk that a user means; without a name the only one with a backing chain, or the only one at all, of those
        that anybody uses.

        Raises NoSuchDisk, DiskNeeded, NoDisk.
        """
        filled = [disk for disk in self.disks if disk.chain is not None]
        if name is not None:
            name = os.fspath(name)
            for role in Disk.ROLES:
                matches = [disk for disk in filled if role(disk, name)]
                if len({disk.chain.active.identity for disk in matches if disk.chain is not None}) > 1:
                    raise DiskNeeded(target=target, known=[disk.name for disk in filled])  # parts of one file
                if matches:
                    return matches[0]
            raise NoSuchDisk(disk=name, target=target, known=[disk.name for disk in filled])
        used = [disk for disk in filled if disk.root in self.held] or filled  # nodes left over look like disks too
        choices = [disk for disk in used if disk.is_chain] or used
        if not choices:
            raise NoDisk(target=target)
        if len(choices) > 1:
            raise DiskNeeded(target=target, known=[disk.name for disk in choices])
        return choices[0]

    def find_job(self, name: str, target: str) -> Job:
        """The job of this id, or the only one on the disk of this name. Raises NoSuchJob."""
        found = [job for job in self.jobs if job.id == name]
        disk = None
        if not found:
            with contextlib.suppress(NoSuchDisk, DiskNeeded):
                disk = self.find(name, target).name
                found = [job for job in self.jobs if job.disk == disk or job.id == job_id(disk)]
        if len(found) != 1:
            known = [job.id for job in self.jobs]
            raise NoSuchJob(job=name, target=target, known=known, is_disk=disk is not None and not found)
        return found[0]

    def reopened(self, image: Image) -> str | None:
        """The file name by which QEMU opens an image of this layout again; None where it is no file."""
        return self.opened_as(image.node or "")

    def opened_as(self, name: str) -> str | None:
        """The file name by which QEMU has opened what this node shows; None where it is no file."""
        node = self.nodes.get(name)
        *_, leaf = storage(node, self.nodes) if node is not None else (None,)
        return None if leaf is None else backing.named_path(str(leaf.info.get("file", "")))

    def has_moved(self, device: str, top: Image, kept: Image) -> bool | None:
        """
        Whether the new chain, without `top` and with `kept`, is under the disk; None where neither it nor the old one is,
        or where one of its images, whose file is not known, may be `top`.

        Nodes that a merge has left over look like the old chain, so only what a device, or an export, uses is looked at.
        """
        if device:
            with contextlib.suppress(NoSuchDisk, NoDisk):
                chain = self.find(device, "").chain or ()
                if any(image.same_as(top) for image in chain):
                    return False
                is_there = any(image.same_as(kept) for image in chain)
                return True if is_there and not any(image.may_be(top) for image in chain) else None
            return None
        used = {node for root in self.exported for node in self.subtree(root)}
        return False if top.node in used else True if kept.node in used else None

    def nodes_of(self, disk: Disk) -> list[Node]:
        """The nodes of the disk's images and filters, top down."""
        return [self.nodes[name] for name in disk.nodes]

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

    def filters_below(self, disk: Disk, overlay: Image) -> list[str]:
        """
        The filters between an image of the disk and the image below it, top down, but for those of jobs. One that is named as
        the top of a commit goes with it, and the overlay's header is rewritten; named is what lies below it, QEMU leaves the
        header as it is, and says nothing (7.2 to 11.1: bdrv_drop_intermediate asks the parents of top, which are no overlays).
        """
        found = []
        for name in disk.nodes[disk.nodes.index(overlay.node or "") + 1 :]:
            if self.nodes[name].driver not in FILTERS:
                break
            if self.nodes[name].driver not in JOB_FILTERS:
                found.append(name)
        return found

    @property
    def roots(self) -> frozenset[str]:
        """The names of the nodes that a device, an export or a job has."""
        return self.held.union(*(nodes for edges in self.job_edges.values() for nodes in edges.values()))

    @property
    def unneeded(self) -> list[str]:
        """The names of the nodes that none of them reaches."""
        needed = {name for root in self.roots for name in self.subtree(root)}
        return [name for name in self.nodes if name not in needed]

    def past(self, disk: Disk, node: str) -> list[Parent]:
        """Who uses a node of the disk past the disk: neither one of its own nodes nor a job."""
        return [
            parent
            for parent in self.parents.get(node, ())
            if parent.kind == "block-backend" or (parent.kind == "block-driver" and parent.name not in disk.nodes)
        ]

    def between(self, top: str, base: str | None) -> list[str]:
        """The names of the nodes from `top` down that are not part of `base`, if any, every parent before its children."""
        below = set(self.subtree(base)) if base is not None else set()
        return [node for node in self.subtree(top) if node not in below]


def qdev_id(path: str) -> str:
    """``/machine/peripheral/vd0/virtio-backend`` is what the user called ``vd0``; other paths stay as they are."""
    match = re.match(r"/machine/peripheral/([^/]+)", path)
    return match[1] if match else path
