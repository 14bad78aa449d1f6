"""
The block graph as rows of text, as `git log --graph` has it: a chain goes straight down, what an image is stored in branches
off, and a node that is used twice is shown once and referred to from then on. So a chain of 200 images is no wider than one of
two.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from qmpmerge.cli.render.page import Painted
from qmpmerge.cli.render.table import Column
from qmpmerge.cli.render.visible import visible
from qmpmerge.cli.render.width import width
from qmpmerge.cli.render.wrap import breaks

if TYPE_CHECKING:
    from qmpmerge.operations.graph import Graph, GraphNode
    from qmpmerge.qemu.blockgraph import Disk
    from qmpmerge.qemu.usage import GraphEdge

COLUMNS = (
    Column("NODE", shrinks=True),
    Column("DRIVER", shrinks=True),
    Column("INDEX", right=True),
    Column("TAKES"),
    Column("LETS"),
    Column("FILE", shrinks=True),
)

LETTERS = {"consistent-read": "r", "write": "w", "write-unchanged": "u", "resize": "s"}
LEGEND = (
    "TAKES: what the one above does with a node, LETS: what it lets others do; r read, w write, u write the same again, "
    "s resize"
)

FIRST = ("device", "export", "job", "other")
"""Which user of a disk it stands below."""

IMAGE, FILTER, OTHER = "●", "◆", "○"


class Row(NamedTuple):
    """The cells of a line, and what is told below it, which stands behind `margin`."""

    cells: Sequence[str]
    notes: Sequence[str] = ()
    margin: str = ""


def rows(graph: "Graph") -> Iterator[Row]:
    """The disks in their order, then what else there is."""
    tree = _Tree(graph)
    for disk in graph.disks:
        yield from tree.under(disk.root, disk)
    for node in sorted(graph.nodes, key=lambda node: tree.is_below(node.name)):
        if node.name not in tree.shown:
            yield from tree.under(node.name, None)


def noted(row: Row, note: str, columns: int | None) -> Iterator[Sequence[str]]:
    """The parts of each line of a note, in so many columns."""
    text, sign = visible(note), Painted("! ", "yellow")
    places = [0, *(breaks(text, columns - width(row.margin + sign)) if columns is not None else ()), len(text)]
    for begin, end in pairwise(places):
        yield row.margin, sign if begin == 0 else "  ", text[begin:end].strip()


def letters(told: Sequence[str] | None) -> str:
    """Permissions in a word: ``rw--``; nothing where they are not known."""
    if told is None:
        return ""
    return "".join(letter if name in told else "-" for name, letter in LETTERS.items())


def children(graph: "Graph") -> "dict[str, list[GraphEdge]]":
    """The edges to the nodes that a node has, by its name."""
    found: dict[str, list[GraphEdge]] = {}
    for edge in graph.edges:
        if edge.kind == "node":
            found.setdefault(edge.parent, []).append(edge)
    return found


def types(graph: "Graph") -> dict[tuple[str, str], str]:
    """That of each export and job, by its kind and its id."""
    exports = {("export", one.id): one.type for one in graph.exports}
    return exports | {("job", job.id): job.type for job in graph.jobs}


def indexes(disk: "Disk | None") -> dict[str, int]:
    """That of each image of its chain, by its node."""
    chain = disk.chain if disk is not None else None
    return {image.node or "": index for index, image in enumerate(chain or (), 1)}


class _Tree:
    def __init__(self, graph: "Graph") -> None:
        self._graph = graph
        self._nodes = {node.name: node for node in graph.nodes}
        self._children = children(graph)
        self._users: dict[str, list[GraphEdge]] = {}
        for edge in graph.edges:
            self._users.setdefault(edge.node, []).append(edge)
        self._types = types(graph)
        self.shown: set[str] = set()

    def is_below(self, name: str) -> bool:
        """Whether it stands below another node."""
        return any(edge.kind == "node" and edge.parent in self._nodes for edge in self._users.get(name, ()))

    def under(self, root: str, disk: "Disk | None") -> Iterator[Row]:
        """What the node's users see, from it down."""
        users = [edge for edge in self._users.get(root, ()) if edge.kind != "node"]
        over = min(users, key=lambda edge: FIRST.index(edge.kind), default=None)
        yield Row(self._head(over, disk))
        yield from self._down(root, over, indexes(disk))

    def _head(self, over: "GraphEdge | None", disk: "Disk | None") -> Sequence[str]:
        name = disk.name if disk is not None else "" if over is None else over.parent
        if not self._graph.is_live:
            return name, "not in use", "", "", "", ""
        if over is None:
            return "-", "unused", "", "", "", ""
        other = [over.parent] if over.parent != name else []
        return name, self._what(over), "", "", "", " ".join([over.kind, *other]) if other else ""

    def _what(self, edge: "GraphEdge") -> str:
        """What kind of user it is."""
        what = edge.role if edge.kind == "node" else edge.kind
        return f"{self._types.get((edge.kind, edge.parent), '')} {what}".strip()

    def _down(self, root: str, over: "GraphEdge | None", index: Mapping[str, int]) -> Iterator[Row]:
        """Every node with what is above its first line, and what beside the others."""
        stack: list[tuple[str, GraphEdge | None, str, str]] = [(root, over, "", "")]
        while stack:
            name, edge, lead, margin = stack.pop()
            node = self._nodes[name]
            is_again = name in self.shown
            self.shown.add(name)
            below, sides = (None, []) if is_again else self._parted(node)
            inner = margin + ("│ " if sides or below else "  ")
            yield self._row(node, edge, lead, index, inner, is_again=is_again)
            for user in self._users.get(name, ()) if not is_again else ():
                if user is not edge:
                    yield self._user(user, inner)
            if below is not None:
                stack.append((below.node, below, margin, margin))
            for side in reversed(sides):
                is_last = below is None and side is sides[-1]
                stack.append(
                    (side.node, side, margin + ("╰─" if is_last else "├─"), margin + ("  " if is_last else "│ "))
                )

    def _parted(self, node: "GraphNode") -> "tuple[GraphEdge | None, list[GraphEdge]]":
        """What goes straight down from it, and what branches off."""
        edges = self._children.get(node.name, [])
        roles = ("backing", "file", "image", "raw") if node.is_filter else ("backing",)
        straight = [edge for role in roles for edge in edges if edge.role == role] or (edges if len(edges) == 1 else [])
        below = straight[0] if straight else None
        return below, [edge for edge in edges if edge is not below]

    def _row(
        self,
        node: "GraphNode",
        edge: "GraphEdge | None",
        lead: str,
        index: Mapping[str, int],
        margin: str,
        *,
        is_again: bool,
    ) -> Row:
        place = index.get(node.name)
        sign = IMAGE if place is not None else FILTER if node.is_filter else OTHER
        cells = [
            f"{lead}{sign} {node.name}",
            node.driver or "?",
            "" if place is None else f"{place}{'*' if place == len(index) else ' '}",
            letters(edge.takes) if edge is not None else "",
            letters(edge.lets) if edge is not None else "",
            "(see above)" if is_again else node.file or "",
        ]
        return Row(cells, [] if is_again else [mark.message for mark in node.marks], margin)

    def _user(self, edge: "GraphEdge", margin: str) -> Row:
        what = edge.role if edge.kind == "job" else ""
        return Row([f"{margin}← {edge.parent}", self._what(edge), "", letters(edge.takes), letters(edge.lets), what])
