"""What real QEMUs said, played to the decoder: every version must tell the same of the same layout (fixtures/README.md)."""

import copy
import functools
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rig.command import invoke
from rig.replays import replaying
from strips.film import COMMANDS

from qmpmerge.chain.chain import Chain, Inode
from qmpmerge.errors import QemuRefused, StreamConcluded
from qmpmerge.qemu import discovery
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.qemu.discovery import DEEP
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.recording import exchanges, reading

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"

EXPECTED = {file.stem: json.loads(file.read_text()) for file in sorted((FIXTURES / "expected").glob("*.json"))}
STRIPS = sorted(FIXTURES.glob("qemu-*/*.jsonl"))
FOLDER = "/vm"
FILES = ["base.raw", "a.qcow2", "b.qcow2"]

STORAGE_DAEMON = "storage-daemon"  # has no devices, so that query-blockstats tells nothing


class Film(Monitor):
    """
    A session in which the replies of a film strip are given, in any order and to nothing else.

    `replies` stand in for some of them, `rewritten` changes some; QEMU's policy refuses those that are `forbidden`.
    """

    def __init__(
        self,
        strip: Path,
        *,
        replies: Mapping[str, Any] | None = None,
        rewritten: Mapping[str, Callable[[Any], Any]] | None = None,
        forbidden: frozenset[str] = frozenset(),
    ) -> None:
        self.name = strip.name
        self.pid = None
        self.asked: list[str] = []
        self._strip = strip
        self._replies = replies or {}
        self._rewritten = rewritten or {}
        self._forbidden = forbidden

    async def execute(self, command: str, *, timeout: float = 0, **arguments: object) -> Any:
        self.asked.append(command)
        if command in self._forbidden:
            raise QemuRefused(command=command, reason=f"Unstable command {command} disabled by policy")
        reply = self._replies[command] if command in self._replies else frame(self._strip, command)
        return self._rewritten.get(command, lambda told: told)(reply)


def frame(strip: Path, command: str) -> Any:
    """What was said to this command, for the caller to keep."""
    return copy.deepcopy(frames(strip)[command])


@functools.cache
def frames(strip: Path) -> dict[str, Any]:
    """Every answer, by its command."""
    (run,) = reading.read(str(strip)).runs
    told = [
        one for one in exchanges.paired(run.lines) if isinstance(one, exchanges.Exchange) and one.answer is not None
    ]
    return {one.name: one.answer["return"] for one in told if one.answer is not None}


def locate(name: str) -> tuple[str, Inode | None]:
    """The files of the strips lie in /vm; the temporary one was unlinked."""
    if "://" in name:
        return name, None
    path = name if name.startswith("/") else f"{FOLDER}/{name}"
    known = path.startswith(FOLDER)
    return path, (1, 1 + FILES.index(Path(path).name)) if known else None


def simple(layout: Layout) -> dict[str, object]:
    """A layout as the expected ones are written down."""
    return {
        "disks": [disk_of(disk) for disk in layout.disks],
        "jobs": {
            job.id: {"disk": job.disk, "type": job.type, "status": job.status, "ready": job.ready, "speed": job.speed}
            for job in layout.jobs
        },
    }


def disk_of(disk: Disk) -> dict[str, object]:
    return {
        "name": disk.name,
        "drive": disk.drive,
        "qdev": disk.qdev,
        "root": disk.root,
        "nodes": list(disk.nodes),
        "job": disk.job and disk.job.id,
        "chain": images_of(disk.chain),
    }


def images_of(chain: Chain | None) -> list[dict[str, object]] | None:
    if chain is None:
        return None
    return [
        {
            "file": image.file,
            "format": image.format,
            "node": image.node,
            "backing": image.backing,
            "backing_format": image.backing_format,
            "read_only": image.read_only,
        }
        for image in chain
    ]


def strips(*, without: str = "") -> list[Any]:
    return [pytest.param(strip, id=f"{strip.parent.name}-{strip.stem}") for strip in STRIPS if strip.stem != without]


def test_every_version_played_every_layout() -> None:
    versions = {strip.parent for strip in STRIPS}
    assert len(versions) >= 2
    for version in versions:
        assert {strip.stem for strip in STRIPS if strip.parent == version} == set(EXPECTED)


def test_the_strips_hold_nothing_of_the_machine_they_were_made_on() -> None:
    for file in STRIPS:
        text = file.read_text().replace("/var/tmp/vl.000000", "")
        assert not re.search(r"/tmp|/home|/work|/dev/shm", text), file
        assert text.isascii() and len(text) < 20_000, file


def test_recording_again_changes_nothing(tmp_path: Path) -> None:
    """By the script itself, with the QEMU that is there: one layout that QEMU names, and one with a job at work."""
    layouts = ("drive", "commit-running")
    subprocess.run([ROOT / "scripts/record", *layouts, "--into", tmp_path], check=True, capture_output=True)
    recorded = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*.jsonl")}
    assert [file.stem for file in sorted(recorded)] == sorted(layouts)
    for file, strip in recorded.items():
        assert not (FIXTURES / file).exists() or (FIXTURES / file).read_text() == strip
        assert set(COMMANDS) <= frames(tmp_path / file).keys()


@pytest.mark.parametrize("name", ["commit-ready", "empty-cd", STORAGE_DAEMON])
def test_a_strip_is_replayed(name: str) -> None:
    """As any recording is: what the command says of it is what was decoded of the strip."""
    strip = strip_of(name)
    with replaying(strip) as replay:
        told = invoke("disks", replay.target, "--json").document["disks"]
        shown = [(disk["disk"], disk["depth"]) for disk in told]
    assert shown == [(disk["name"], len(disk["chain"] or ())) for disk in EXPECTED[name]["disks"]]


@pytest.mark.parametrize("strip", strips())
async def test_the_layout(strip: Path) -> None:
    film = Film(strip)
    layout = await discovery.discover(film, locate)
    assert simple(layout) == EXPECTED[strip.stem]
    assert len(film.asked) == len(set(film.asked)) <= 5


@pytest.mark.parametrize("strip", strips(without=STORAGE_DAEMON))
async def test_the_disks_by_stable_commands(strip: Path) -> None:
    """
    Where policy forbids the debug command. Filters that a job put there are not told then, nor which disk a job is on;
    nor is a node that no device uses.
    """
    film = Film(strip, forbidden=frozenset({"x-debug-query-block-graph"}))
    layout = await discovery.discover(film, locate)
    expected = EXPECTED[strip.stem]
    attached = [disk for disk in expected["disks"] if disk["drive"] or disk["qdev"]]
    of_chain = ("name", "drive", "qdev", "chain")
    told = simple(layout)["disks"]
    assert isinstance(told, list)
    assert [[disk[key] for key in of_chain] for disk in told] == [[disk[key] for key in of_chain] for disk in attached]
    assert {job.id: job.status for job in layout.jobs} == {
        name: job["status"] for name, job in expected["jobs"].items()
    }
    if not expected["jobs"]:
        assert told == attached, "nodes, filters and root too"
    assert "query-blockstats" in film.asked


@pytest.mark.parametrize("strip", strips())
def test_every_job_edge_leads_to_a_node(strip: Path) -> None:
    """What `follow` reads the plan of a running job from."""
    layout = discovery.decode(
        frame(strip, "x-debug-query-block-graph"), [], frame(strip, "query-named-block-nodes"), [], locate
    )
    edges = {job: dict(kinds) for job, kinds in layout.job_edges.items()}
    filters = {"base": ["base"], "intermediate node": ["a"]}
    for kinds in edges.values():
        assert {node for names in kinds.values() for node in names} <= set(layout.nodes)
    if strip.stem in ("commit-running", "commit-pending"):
        for kind, names in filters.items():
            assert set(names) <= set(edges["qmpmerge-commit-disk0"][kind])
    elif strip.stem == "commit-ready":
        kinds = edges["qmpmerge-commit-disk0"]
        assert (kinds["source"], kinds["target"]) == (["b"], ["base"])
    elif strip.stem != "commit-concluded":
        assert not edges


async def test_a_concluded_stream_is_seen_before_the_nodes_are_asked_for() -> None:
    film = Film(strip_of("commit-concluded"), rewritten={"query-jobs": stream_instead})
    with pytest.raises(StreamConcluded):
        await discovery.discover(film, locate)
    assert set(film.asked) == {"query-jobs", "query-block-jobs", "x-debug-query-block-graph"}


def stream_instead(reply: Any) -> Any:
    return [{**job, "type": "stream"} for job in reply]


# --- longer than any film ------------------------------------------------------------------------------------------


def strip_of(name: str) -> Path:
    return next(strip for strip in STRIPS if strip.stem == name)


def longer(layers: int) -> dict[str, Any]:
    """The replies of the `blockdev` strip, stretched: overlays like the topmost one, on one another."""
    strip = strip_of("blockdev")
    graph, stats = frame(strip, "x-debug-query-block-graph"), frame(strip, "query-blockstats")
    details = {entry["node-name"]: entry for entry in frame(strip, "query-named-block-nodes")}
    ids = {node["name"]: node["id"] for node in graph["nodes"]}
    device = next(edge for edge in graph["edges"] if edge["name"] == "root")
    below, entry = "b", stats[0]
    nested = {"node-name": "b", "parent": entry["parent"], "backing": entry["backing"]}
    for number in range(layers - 3):
        name, file = f"l{number}", f"l{number}-file"
        for node, kind in ((name, "b"), (file, "b-file")):
            ids[node] = len(ids) + 100
            graph["nodes"].append({"id": ids[node], "name": node, "type": "block-driver"})
            details[node] = {**details[kind], "node-name": node, "file": f"/layers/{number}"}
        graph["edges"] += [
            {"parent": ids[name], "child": ids[file], "name": "file"},
            {"parent": ids[name], "child": ids[below], "name": "backing"},
        ]
        nested = {"node-name": name, "parent": {"node-name": file}, "backing": nested}
        below = name
    device["child"] = ids[below]
    return {
        "x-debug-query-block-graph": graph,
        "query-named-block-nodes": list(details.values()),
        "query-blockstats": [{**entry, **nested}],
    }


@pytest.mark.parametrize(("layers", "asked"), [(DEEP + 1, True), (DEEP + 2, False)])
async def test_query_block_is_not_asked_of_deep_chains(layers: int, asked: bool) -> None:
    """`DEEP` counts what lies below an image."""
    film = Film(strip_of("blockdev"), replies=longer(layers))
    (disk,) = (await discovery.discover(film, locate)).disks
    assert ("query-block" in film.asked) is asked
    assert disk.chain is not None and len(disk.chain) == layers
    assert (disk.name, disk.qdev, disk.root) == ("disk0", "disk0", f"l{layers - 4}")


@pytest.mark.parametrize("forbidden", [frozenset(), frozenset({"x-debug-query-block-graph"})], ids=["graph", "stats"])
async def test_3000_layers(forbidden: frozenset[str]) -> None:
    film = Film(strip_of("blockdev"), replies=longer(3000), forbidden=forbidden)
    layout = await discovery.discover(film, locate)
    (disk,) = layout.disks
    assert disk.chain is not None
    assert disk.chain.files[:3] == [f"{FOLDER}/{name}" for name in FILES]
    assert disk.chain.files[3:] == [f"/layers/{number}" for number in range(2997)]
    assert len(layout.subtree(disk.root)) == 6000
