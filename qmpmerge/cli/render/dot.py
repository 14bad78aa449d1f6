"""
The block graph in the language of graphviz.

Nodes are called n0, n1, ..., so that names stand in labels alone, where a backslash and an ampersand have a meaning to dot.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qmpmerge.cli.render.drawing import COLOURS, Drawing

if TYPE_CHECKING:
    from qmpmerge.operations.graph import Graph

_SHAPES = {"job": "hexagon", "user": "ellipse"}


def lines(graph: "Graph") -> Iterator[str]:
    """All of it."""
    drawing = Drawing(graph)
    yield "digraph blocks {"
    yield '  node [shape=box style=filled fontname="monospace" fontsize=11]'
    yield '  edge [fontname="monospace" fontsize=9]'
    for box in drawing.boxes:
        style = ' style="filled,dashed"' if box.look == "unneeded" else ""
        shape = f" shape={_SHAPES[box.look]}" if box.look in _SHAPES else ""
        yield f'  n{box.number} [label={label(box.lines)} fillcolor="{COLOURS[box.look]}"{shape}{style}]'
    for arrow in drawing.arrows:
        style = " style=dashed" if arrow.is_dashed else ""
        yield f"  n{arrow.above} -> n{arrow.below} [label={label(arrow.lines)}{style}]"
    yield "}"


def label(lines: Sequence[str]) -> str:
    """A label of these lines; dot takes ``&lt;`` for a letter."""
    told = (line.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;") for line in lines)
    return '"' + "\\n".join(told) + '"'
