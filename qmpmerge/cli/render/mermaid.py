"""
The block graph as a flowchart of Mermaid.

Nodes are called n0, n1, ..., so that names stand in labels alone. There every character that could mean something to Mermaid,
to Markdown or to HTML is written by its number. Mermaid 10.9 and 12.3 show all names of our tests as they are.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qmpmerge.cli.render.drawing import COLOURS, Drawing

if TYPE_CHECKING:
    from qmpmerge.operations.graph import Graph

_SHAPES = {"job": ("{{", "}}"), "user": ("([", "])")}

_SPECIAL = re.compile(r"[^\w ./-]|_|^\d+(?=\.)", re.ASCII)
"""What stands for itself is a letter, a digit, or one of these; a number with a dot begins a list."""


def lines(graph: "Graph") -> Iterator[str]:
    """All of it."""
    drawing = Drawing(graph)
    yield "flowchart TD"
    for look, colour in COLOURS.items():
        dashed = ",stroke-dasharray:4" if look == "unneeded" else ""
        yield f"  classDef {look} fill:{colour},color:#1f2328,stroke:#59636e{dashed}"
    for box in drawing.boxes:
        begin, end = _SHAPES.get(box.look, ("[", "]"))
        yield f"  n{box.number}{begin}{label(box.lines)}{end}:::{box.look}"
    for arrow in drawing.arrows:
        line = "-.->" if arrow.is_dashed else "-->"
        yield f"  n{arrow.above} {line}|{label(arrow.lines)}| n{arrow.below}"


def label(lines: Sequence[str]) -> str:
    """A label of these lines; Mermaid takes a backslash with an n for the end of one, unless something is between them."""
    told = (line.replace("\\n", "\\\u200bn") for line in lines)
    return '"' + "<br>".join(_SPECIAL.sub(_numbered, line) for line in told) + '"'


def _numbered(special: re.Match[str]) -> str:
    return "".join(f"#{ord(character)};" for character in special[0])
