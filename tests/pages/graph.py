"""
The picture of docs/graph.md: what `qmpmerge graph --dot` and graphviz make of docs/data/graph.json, which `--json` has told of
a QEMU (7.2.22, its folder called /vm) with a commit that is ready, below two filters, an export and a node that is left.
"""

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from typing import Any

from pages.speed import DATA
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.cli.render import dot
from qmpmerge.cli.render.drawing import Drawing
from qmpmerge.operations.graph import Graph, GraphNode, Mark
from qmpmerge.qemu.blockgraph import Disk
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.usage import Export, GraphEdge

PICTURE = DATA.parents[1] / "pictures/graph.svg"


def write() -> None:
    """Draw it, where graphviz is installed: it is no part of what `scripts/setup` installs."""
    if shutil.which("dot") is None:
        print(f"docs: {PICTURE.name} stays as it is, graphviz is not installed", file=sys.stderr)
    elif on_picture(PICTURE.read_text() if PICTURE.exists() else "") != told():
        source = "\n".join(dot.lines(recorded()))
        PICTURE.write_text(
            subprocess.run(["dot", "-Tsvg"], input=source, capture_output=True, text=True, check=True).stdout
        )


def on_picture(svg: str) -> list[str]:
    """What is written on it, which is the same whichever fonts and version of graphviz have drawn it."""
    return sorted(unescape(text).replace("\xa0", " ") for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def told() -> list[str]:
    """What is to be written on it."""
    drawing = Drawing(recorded())
    parts = [*(box.lines for box in drawing.boxes), *(arrow.lines for arrow in drawing.arrows)]
    return sorted(line for lines in parts for line in lines)


def recorded() -> Graph:
    """The graph that was told."""
    found = json.loads((DATA.parent / "graph.json").read_text())
    return Graph(
        target="vm1",
        disk=found["disk"],
        is_live=found["live"],
        nodes=tuple(map(_node, found["nodes"])),
        edges=tuple(
            GraphEdge(**{**one, "takes": tuple(one["takes"]), "lets": tuple(one["lets"])}) for one in found["edges"]
        ),
        disks=tuple(map(_disk, found["chains"])),
        jobs=tuple(Job(one["id"], one["type"], one["status"], one["done"], one["total"]) for one in found["jobs"]),
        exports=tuple(Export(**one) for one in found["exports"]),
        not_known=(),
    )


def _node(told: Any) -> GraphNode:
    named = {key: told[key] for key in ("driver", "file", "is_filter", "read_only", "used")}
    return GraphNode(told["node"], **named, marks=tuple(Mark(**mark) for mark in told["marks"]))


def _disk(told: Any) -> Disk:
    chain = Chain(tuple(Image(f"/vm/{node}", "qcow2", 0, node=node) for node in told["layers"]))
    return Disk(told["disk"], drive=None, qdev=told["qdev"], root=told["root"], chain=chain, nodes=())
