"""What a drawing of the block graph consists of, in whichever language it is written: boxes, and arrows between them."""

import textwrap
from typing import TYPE_CHECKING, Literal, NamedTuple

from qmpmerge.cli.render.graph import indexes, letters, types
from qmpmerge.cli.render.visible import visible
from qmpmerge.cli.render.width import shortened

if TYPE_CHECKING:
    from qmpmerge.operations.graph import Graph, GraphNode
    from qmpmerge.qemu.usage import GraphEdge

Look = Literal["active", "image", "filter", "node", "unneeded", "job", "user"]

COLOURS: dict[Look, str] = {
    "active": "#b6d4fe",
    "image": "#dbe7fb",
    "filter": "#fdecc8",
    "node": "#eef0f2",
    "unneeded": "#ffffff",
    "job": "#fad7dc",
    "user": "#e6f4f1",
}

PASSED = "intermediate node"
"""As what a job has the images between its top and its base: told in their boxes, for of 200 arrows dot makes a tangle."""

WIDEST = 40
"""Columns of a line."""


class Box(NamedTuple):
    """A node, or who uses nodes: its number, the lines in it, spelled out, and what it looks like."""

    number: int
    lines: list[str]
    look: Look


class Arrow(NamedTuple):
    """From the number of a box to that of one below it; what a job has is dashed."""

    above: int
    below: int
    lines: list[str]
    is_dashed: bool


class Drawing:
    """Of a graph: `boxes`, users first, and `arrows`."""

    def __init__(self, graph: "Graph") -> None:
        self._places: dict[str, str] = {}
        for disk in graph.disks:
            for name, index in indexes(disk).items():
                self._places[name] = f"{self._places.get(name, '')} {disk.name}[{index}]".strip()
        self._active = {disk.chain.active.node for disk in graph.disks if disk.chain is not None}
        self._types = types(graph)
        self._passed = {
            edge.node: _lines(f"{edge.role} of {edge.kind} {edge.parent}", _permissions(edge))
            for edge in graph.edges
            if edge.role == PASSED
        }
        named = {("node", node.name) for node in graph.nodes}
        users = dict.fromkeys((edge.kind, edge.parent) for edge in graph.edges if (edge.kind, edge.parent) not in named)
        numbers = {key: number for number, key in enumerate([*users, *(("node", node.name) for node in graph.nodes)])}
        self.boxes = [self._user(numbers[user], *user) for user in users]
        self.boxes += [self._node(numbers["node", node.name], node) for node in graph.nodes]
        self.arrows = [
            Arrow(
                numbers[edge.kind, edge.parent],
                numbers["node", edge.node],
                _lines(edge.role, _permissions(edge)),
                edge.kind == "job",
            )
            for edge in graph.edges
            if edge.role != PASSED
        ]

    def _user(self, number: int, kind: str, name: str) -> Box:
        return Box(
            number,
            _lines(f"{self._types.get((kind, name), '')} {kind}".strip(), name),
            "job" if kind == "job" else "user",
        )

    def _node(self, number: int, node: "GraphNode") -> Box:
        place = self._places.get(node.name, "")
        file = shortened(visible(node.file or ""), WIDEST)
        lines = _lines(node.name, f"{node.driver or '?'} {place}".strip(), file, *(mark.message for mark in node.marks))
        lines += self._passed.get(node.name, [])
        return Box(number, lines, self._look(node))

    def _look(self, node: "GraphNode") -> Look:
        if node.used is False:
            return "unneeded"
        if node.name in self._places:
            return "active" if node.name in self._active else "image"
        return "filter" if node.is_filter else "node"


def _permissions(edge: "GraphEdge") -> str:
    return " / ".join(filter(None, map(letters, (edge.takes, edge.lets))))


def _lines(*texts: str) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(visible(text), WIDEST, break_on_hyphens=False)]
