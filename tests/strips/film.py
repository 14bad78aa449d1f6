"""
A layout, recorded as any command is (docs/recording.md), without what differs from machine to machine, or from run to run: so
recording again changes nothing.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rig.machines import Machine

import qmpmerge
from qmpmerge.errors import QemuRefused
from qmpmerge.qemu import connect

FOLDER = "/vm"
COMMANDS = (
    "query-jobs",
    "query-block-jobs",
    "x-debug-query-block-graph",
    "query-block",
    "query-named-block-nodes",
    "query-blockstats",
)
"""The graph before all that has nodes: it gives them their numbers."""

SAME = {"actual-size": 65536, "package": ""}
"""What an image takes depends on the filesystem, and how QEMU was packaged on the system."""

RUNNING = {"current-progress": 0, "offset": 0, "busy": False}
"""How a job that runs is seen differs from look to look."""

LEFT_OUT = {"perm", "shared-perm", "stats", "driver-specific", "limits"}
"""Long or the machine's own, and nothing that decoding a layout looks at."""


def record(machine: Machine) -> str:
    """All questions, and what this QEMU says to them."""
    heard: list[dict[str, Any]] = []
    with qmpmerge.record(heard.append):
        asyncio.run(_ask(machine.target))
    return "".join(f"{json.dumps(line)}\n" for line in _same(heard, machine.folder))


def version(strip: str) -> str:
    """The QEMU's that has been recorded."""
    greeting = next(line["greeting"] for line in map(json.loads, strip.splitlines()) if line["kind"] == "session")
    return "{major}.{minor}.{micro}".format(**greeting["QMP"]["version"]["qemu"])


async def _ask(target: str) -> None:
    async with connect.connected(target) as session:
        for command in COMMANDS:
            with contextlib.suppress(QemuRefused):
                await session.execute(command, **({"flat": True} if command == "query-named-block-nodes" else {}))


def _same(heard: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Lines with a time of their own each, and nothing in them that is this machine's."""
    known: dict[str, str] = {}
    kept = {"start": ("schema",), "session": ("session", "name", "greeting")}
    for number, line in enumerate(line for line in heard if line["kind"] not in ("closed", "end")):
        names = kept.get(line["kind"], ("session", "message"))
        facts = {name: _anonymous(line[name], folder, known) for name in names}
        yield {"run": "strip", "t": number / 1000, "kind": line["kind"], **facts}


def _anonymous(value: Any, folder: Path, known: dict[str, str]) -> Any:
    """The value without what differs from run to run, its keys in order; `known` numbers the nodes that QEMU named."""
    if isinstance(value, list):
        return [_anonymous(item, folder, known) for item in value]
    if isinstance(value, dict):
        kept = {key: _anonymous(value[key], folder, known) for key in sorted(value) if key not in LEFT_OUT}
        kept.update({key: same for key, same in SAME.items() if key in kept})
        moving = RUNNING if kept.get("status") == "running" else {}
        return {**kept, **{key: still for key, still in moving.items() if key in kept}}
    if isinstance(value, str):
        value = value.replace(str(folder), FOLDER)
        value = re.sub(r"#block\d+", lambda found: known.setdefault(found[0], f"#block{len(known):03}"), value)
        return re.sub(r"/vl\.\w{6}\b", "/vl.000000", value)
    return value
