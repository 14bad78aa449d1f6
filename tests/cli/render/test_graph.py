"""The block graph as text and as drawings, of graphs that no QEMU would have with names that nobody would choose."""

import html
import io
import re
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rig.machines import have

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.cli.render import dot, mermaid, table
from qmpmerge.cli.render.drawing import COLOURS, Drawing
from qmpmerge.cli.render.graph import COLUMNS, noted, rows
from qmpmerge.cli.render.text import TextOutput
from qmpmerge.cli.render.width import width
from qmpmerge.operations.graph import Graph, GraphNode, Mark
from qmpmerge.qemu.blockgraph import Disk
from qmpmerge.qemu.usage import GraphEdge, Kind

READS, LETS = ("consistent-read",), ("consistent-read", "write-unchanged")

NASTY = [
    *(
        "a\nb",
        "\x1b[31mred\x07",
        "\u202eright to left",
        "é虚🙂",
        "\udcff\udcfe",
        "\t",
        "\x7f",
        "tail\\",
        '"',
        "\\N\\G\\n\\l",
    ),
    *(
        "]",
        "[",
        "(x)",
        "{y}",
        "|z|",
        "<b>bold</b>",
        "&lt;&#65;&amp;",
        "#35;",
        "`code`",
        "1. list",
        "- list",
        "style x:#y;",
        "a;b",
    ),
    *(
        "%% comment",
        "end",
        "subgraph",
        "click n0 href",
        "x" * 31,
        "{{",
        "--> n9",
        "n0:::job",
        "**b** __i__ ~~s~~",
        "$x^2$",
        "'",
    ),
    *("%%{init: {}}%%", "@{ shape: circle }", "javascript:alert(1)", "\\", '\\"', "--", "", " "),
]


def node(name: str, driver: str = "qcow2", *marks: str, file: str | None = None, used: bool = True) -> GraphNode:
    return GraphNode(name, driver, file, driver == "throttle", True, used, tuple(Mark("x", one) for one in marks))


def edge(parent: str, child: str, role: str = "backing", kind: Kind = "node") -> GraphEdge:
    return GraphEdge(kind, parent, child, role, READS, LETS)


def disk(name: str, *nodes: str) -> Disk:
    """With a chain of these, base first."""
    images = tuple(Image(f"/vm/{name}/{number}", "qcow2", 1, node=one) for number, one in enumerate(nodes))
    return Disk(name, drive=None, qdev=name, root=nodes[-1], chain=Chain(images), nodes=nodes[::-1])


def graph(nodes: Iterable[GraphNode], edges: Iterable[GraphEdge], disks: Iterable[Disk] = ()) -> Graph:
    return Graph("vm1", None, True, tuple(nodes), tuple(edges), tuple(disks), (), (), ())


def long(name: str, layers: int) -> tuple[list[GraphNode], list[GraphEdge], Disk]:
    """A disk with so many images, each in a file."""
    names = [f"{name}-{number}" for number in range(layers)]
    nodes = [one for image in names for one in (node(image), node(f"{image}-file", "file", file=f"/vm/{image}.qcow2"))]
    edges = [edge(above, below) for below, above in zip(names[:-1], names[1:], strict=True)]
    edges += [edge(image, f"{image}-file", "file") for image in names]
    return nodes, [*edges, edge(name, names[-1], "root", "device")], disk(name, *names)


def shown(found: Graph, columns: int | None = 80) -> list[str]:
    every = list(rows(found))
    _, *lines = table.lines(COLUMNS, [row.cells for row in every], columns)
    told = []
    for row, parts in zip(every, lines, strict=True):
        told.append("".join(parts).rstrip())
        told += ["".join(line) for note in row.notes for line in noted(row, note, columns)]
    return told


def test_two_disks_on_one_base_an_export_and_what_nobody_needs() -> None:
    nodes = [
        node("t", "throttle"),
        node("a"),
        node("a-file", "file", file="/vm/a"),
        node("b"),
        node("left", used=False),
    ]
    nodes += [node("base", "raw", "somebody is in the way"), node("base-file", "file", file="/vm/base")]
    edges = [edge("vda", "t", "root", "device"), edge("t", "a", "file"), edge("a", "a-file", "file"), edge("a", "base")]
    edges += [edge("b", "base"), edge("e0", "base", "root", "export"), edge("base", "base-file", "file")]
    edges += [edge("vdb", "b", "root", "device"), edge("outside", "b", "backing", "node")]
    first, second = disk("vda", "base", "a"), disk("vdb", "base", "b")
    assert shown(graph(nodes, edges, [replace(first, root="t"), second])) == [
        "vda          device",
        "◆ t          throttle         r---   r-u-",
        "● a          qcow2        2*  r---   r-u-",
        "├─○ a-file   file             r---   r-u-  /vm/a",
        "● base       raw          1   r---   r-u-",
        "│ ! somebody is in the way",
        "│ ← b        backing          r---   r-u-",
        "│ ← e0       export           r---   r-u-",
        "○ base-file  file             r---   r-u-  /vm/base",
        "vdb          device",
        "● b          qcow2        2*  r---   r-u-",
        "│ ← outside  backing          r---   r-u-",
        "● base       raw          1   r---   r-u-  (see above)",
        "-            unused",
        "○ left       qcow2",
    ]


def test_long_chains_and_long_names_are_no_wider_than_a_terminal() -> None:
    nodes, edges, one = long("n" * 27, 200)
    nodes[0] = node(nodes[0].name, "qcow2", " ".join(["a long sentence"] * 20))
    lines = shown(graph(nodes, edges, [one]))
    assert len([line for line in lines if "●" in line]) == 200
    assert max(map(width, lines)) <= 80
    assert all(line.startswith(("│", "○", "●", "├", "╰", "n", " ")) for line in lines)


def test_what_branches_off_twice_keeps_its_lines() -> None:
    nodes = [
        node("top"),
        node("meta", "qcow2"),
        node("x", "file"),
        node("y", "file"),
        node("data", "file"),
        node("low"),
    ]
    edges = [edge("top", "meta", "file"), edge("meta", "x", "file"), edge("meta", "y", "data-file")]
    edges += [edge("top", "data", "data-file"), edge("top", "low")]
    assert [line.partition("  ")[0] for line in shown(graph(nodes, edges))[1:]] == [
        "○ top", "├─○ meta", "│ ├─○ x", "│ ╰─○ y", "├─○ data", "○ low",
    ]  # fmt: skip


def test_no_name_reaches_a_terminal_as_it_is_and_deep_graphs_end() -> None:
    nodes = [node(name, name, name, file=name) for name in NASTY]
    out = io.StringIO()
    TextOutput(out, out).graph(graph(nodes, [edge(NASTY[0], name) for name in NASTY[1:]]), drawn=None)
    assert all(line.isprintable() for line in out.getvalue().splitlines())
    deep = [node(str(number)) for number in range(3000)]
    down = [edge(str(number), str(number + 1), "file") for number in range(2999)]
    down += [edge(str(number), str(number + 1), "data-file") for number in range(2999)]
    assert len(list(rows(graph(deep, down)))) > 3000
    circle = graph([node("a"), node("b")], [edge("a", "b"), edge("b", "a")])
    assert [line.split()[:2] for line in shown(circle)[1:]] == [["○", "a"], ["│", "←"], ["○", "b"], ["○", "a"]]


# --- drawings --------------------------------------------------------------------------------------------------------


def nasty() -> Graph:
    """Every name as that of a node, a driver, a file, a mark, a user and a role."""
    nodes = [node(f"{name}{number}", name, name, file=name) for number, name in enumerate(NASTY)]
    edges = [edge(name, one.name, name, "export") for one, name in zip(nodes, NASTY, strict=True)]
    return graph(nodes, edges)


@pytest.mark.skipif(not have("dot"), reason="graphviz is not installed")
def test_graphviz_draws_any_name_as_it_is() -> None:
    found = nasty()
    source = "\n".join(dot.lines(found))
    done = subprocess.run(["dot", "-Tsvg"], input=source, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    drawn = [one.text or "" for one in ElementTree.fromstring(done.stdout).iter("{http://www.w3.org/2000/svg}text")]
    assert sorted(plain(drawn)) == sorted(plain(texts(found)))


def plain(lines: Iterable[str]) -> list[str]:
    """Graphviz has no-break spaces."""
    return [line.replace("\xa0", " ").strip() for line in lines]


def texts(found: Graph) -> list[str]:
    """All lines of a drawing."""
    drawing = Drawing(found)
    parts = [*(box.lines for box in drawing.boxes), *(arrow.lines for arrow in drawing.arrows)]
    return [line for lines in parts for line in lines]


LABEL = r'"((?:[A-Za-z0-9 ./-]|#\d+;|<br>)*)"'
BOX = re.compile(rf"  n(\d+)(?:\[{LABEL}\]|\(\[{LABEL}\]\)|\{{\{{{LABEL}\}}\}}):::(\w+)")
ARROW = re.compile(rf"  n(\d+) (?:-->|-\.->)\|{LABEL}\| n(\d+)")
CLASS = re.compile(r"  classDef (\w+) [a-z-]+:[#\w]+(?:,[a-z-]+:[#\w]+)*")


def test_mermaid_gets_nothing_but_what_we_use_of_its_grammar() -> None:
    found = nasty()
    first, *lines = mermaid.lines(found)
    assert first == "flowchart TD"
    boxes: dict[str, str] = {}
    labels: list[str] = []
    for line in lines:
        if box := BOX.fullmatch(line):
            assert box[1] not in boxes and box[5] in COLOURS
            boxes[box[1]] = box[5]
            labels.append(box[2] or box[3] or box[4])
        elif arrow := ARROW.fullmatch(line):
            assert {arrow[1], arrow[3]} <= set(boxes)
            labels.append(arrow[2])
        else:
            assert CLASS.fullmatch(line), line
    told = [html.unescape(part.replace("#", "&#")) for label in labels for part in label.split("<br>")]
    assert not any("\\n" in one for one in told), "Mermaid ends the line there"
    assert [one.replace("\u200b", "") for one in told if one] == texts(found)
    assert len(boxes) == len(found.nodes) + len(set(NASTY))


def test_each_disk_is_named_and_what_a_job_has_is_dashed() -> None:
    edges = [edge("a", "base"), edge("b", "base"), edge("j", "base", "target", "job")]
    found = graph(
        [node("a"), node("b"), node("base", used=False)], edges, [disk("vda", "base", "a"), disk("vdb", "base", "b")]
    )
    lines = [*mermaid.lines(found)]
    assert '  n3["base<br>qcow2 vda#91;1#93; vdb#91;1#93;"]:::unneeded' in lines
    assert any(line.startswith("  n0 -.->") for line in lines)
    assert any("style=dashed" in line and "target" in line for line in dot.lines(found))
