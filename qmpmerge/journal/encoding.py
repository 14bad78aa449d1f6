"""
A record as bytes: two lines of JSON. The first one has a fixed length, so that it can be written over in microseconds while
a guest waits: whatever dies, the old or the new state is there, since it is less than a sector.
"""

import json
import os
from dataclasses import replace
from typing import Any, get_args

from qmpmerge.chain.chain import Chain, Image, Slice
from qmpmerge.chain.outcome import Policy
from qmpmerge.chain.plan import Direction
from qmpmerge.chain.state import RECORDED, State
from qmpmerge.errors import Error
from qmpmerge.images import files
from qmpmerge.images.files import Seen
from qmpmerge.journal import stash
from qmpmerge.journal.record import Record
from qmpmerge.processes.proc import Process

SCHEMA = 5
_STATE_BYTES = 256
_PLAIN = (
    "direction", "policy", "target", "disk", "device", "job", "base", "top", "is_live", "since", "old_nodes", "base_driver"
)  # fmt: skip
_IMAGE = ("file", "format", "virtual_size", "backing", "backing_format", "inode", "node", "is_renamed")
_SLICE = ("offset", "size")


class NoRecord(ValueError):
    """These bytes are no record that could be believed; the words say why."""


class OtherSchema(NoRecord):
    """Another version of qmpmerge has written it."""


def encode(record: Record) -> bytes:
    """The whole record."""
    return state_line(record) + json.dumps(_fixed(record)).encode() + b"\n"


def state_line(record: Record) -> bytes:
    """The first line: the state, and what goes with it."""
    line = {
        "state": record.state.value,
        "verified": record.verified,
        "left_ready": record.was_left_ready,
        "seen": _listed(record.seen),
    }
    return json.dumps(line).ljust(_STATE_BYTES - 1).encode() + b"\n"


def decode(path: str, data: bytes) -> Record:
    """The record in the file at `path`. Raises NoRecord."""
    state, _, rest = data.partition(b"\n")
    if not rest.endswith(b"\n"):
        raise NoRecord("it was cut short")
    try:
        entry = {**json.loads(rest), **json.loads(state)}
        if entry["schema"] != SCHEMA:
            raise OtherSchema(f"it is of schema {entry['schema']!r}, this qmpmerge reads schema {SCHEMA}")
        if not _is_its_place(path, str(entry["path"])):
            raise NoRecord(f"it was written to lie at {entry['path']}")
        return _checked(_record(path, entry))
    except NoRecord:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, Error):
        raise NoRecord("it makes no sense") from None


def _is_its_place(path: str, written: str) -> bool:
    """One that was moved, or copied with the images, tells of others than those that lie beside it now."""
    (here, name), (there, its_name) = os.path.split(path), os.path.split(written)
    return name == its_name and (here == there or files.inode(here) == files.inode(there) is not None)


def _fixed(record: Record) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "path": record.path,
        **{key: getattr(record, key) for key in _PLAIN},
        "qemu": vars(record.qemu) if record.qemu else None,
        "tool": vars(record.tool) if record.tool else None,
        "images": [_described(image) for image in record.chain],
        "away": [[index, name] for index, name in record.away.items()],
        "before": _listed(record.before),
    }


def _described(image: Image) -> dict[str, Any]:
    part = image.slice and {key: getattr(image.slice, key) for key in _SLICE}
    data = image.data and _described(image.data)
    return {**{key: getattr(image, key) for key in _IMAGE}, "slice": part, "data": data}


def _listed(seen: dict[int, Seen]) -> list[list[int]]:
    return [[index, one.size, one.changed] for index, one in seen.items()]


def _looks(entries: Any) -> dict[int, Seen]:
    return {int(index): Seen(int(size), int(changed)) for index, size, changed in entries}


def _record(path: str, entry: Any) -> Record:
    return Record(
        path=path,
        target=str(entry["target"]),
        disk=str(entry["disk"]),
        job=str(entry["job"]),
        device=str(entry["device"]),
        chain=Chain(tuple(map(_image, entry["images"]))),
        direction=entry["direction"],
        base=int(entry["base"]),
        top=int(entry["top"]),
        policy=entry["policy"],
        state=State(entry["state"]),
        qemu=_process(entry["qemu"]),
        tool=_process(entry["tool"]),
        is_live=bool(entry["is_live"]),
        since=float(entry["since"]),
        old_nodes=tuple(map(str, entry["old_nodes"])),
        base_driver=str(entry["base_driver"]),
        verified=bool(entry["verified"]),
        was_left_ready=bool(entry["left_ready"]),
        away={int(index): str(name) for index, name in entry["away"]},
        seen=_looks(entry["seen"]),
        before=_looks(entry["before"]),
    )


def _checked(record: Record) -> Record:
    """Nobody can have us rename a file to anything but its own stashed name: it is from that that we take its own."""
    is_known = record.policy in get_args(Policy) and record.direction in get_args(Direction)
    if record.state not in RECORDED or not is_known or record.plan.is_empty:
        raise ValueError(record.state)
    merged = range(record.base + 1, record.top + 1)
    named = [index in merged and record.chain[index].has_path for index in record.away]
    if not (all(named) and all(map(stash.can_be_stashed, record.away.values()))):
        raise ValueError(record.away)
    return record


def _image(entry: Any) -> Image:
    image = Image(**{key: entry[key] for key in _IMAGE})
    inode = (int(image.inode[0]), int(image.inode[1])) if image.inode is not None else None
    part = entry["slice"] and Slice(**{key: _number(entry["slice"][key]) for key in _SLICE})
    return replace(image, inode=inode, slice=part, data=entry["data"] and _image(entry["data"]))


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


def _process(entry: Any) -> Process | None:
    return Process(int(entry["pid"]), int(entry["started"]), str(entry["boot"])) if entry else None
