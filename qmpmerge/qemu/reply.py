"""
What a reply must look like: the shapes of all that we read of QEMU's replies, by command, each held against its shape once,
where it comes in. So whoever reads a reply later finds every key that is read there, with a value of its type.

What stands in no shape is not read. `Any` stops here.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from qmpmerge.errors import BadReply

MOST = 2**64
"""QMP's numbers have 64 bits at the most, and none that we read is negative."""

SHOWN = 200
"""So many characters of what came are shown."""

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_BURSTS = {f"{name}_max{more}": (int,) for name in _LIMITS for more in ("", "_length")}

Shape = Any
"""
``str``, ``int``, ``bool``; ``[shape]`` for a list; a dict for an object, with ``(shape,)`` for what may be missing; None for
anything.
"""

GREETING: Shape = {"qemu": {"major": int, "minor": int, "micro": int}}
GRAPH: Shape = {
    "nodes": [{"id": int, "name": str, "type": str}],
    "edges": [{"parent": int, "child": int, "name": str, "perm": ([str],), "shared-perm": ([str],)}],
}
JOB: Shape = {
    "id": str,
    "type": str,
    "status": str,
    "current-progress": int,
    "total-progress": int,
    "error": (str,),
}
BLOCK_JOB: Shape = {"device": str, "offset": int, "len": int, "busy": bool, "speed": int, "io-status": str}
LIMITS: Shape = {**dict.fromkeys(_LIMITS, int), **_BURSTS, "iops_size": (int,), "group": (str,)}
BITMAP: Shape = {
    "name": (str,),
    "granularity": int,
    "recording": bool,
    "persistent": bool,
    "inconsistent": (bool,),
    "busy": bool,
    "count": int,
}
OWN: Shape = {
    "compat": (str,),
    "compression-type": (str,),
    "lazy-refcounts": (bool,),
    "extended-l2": (bool,),
    "corrupt": (bool,),
    "encrypt": ({"format": str},),
    "bitmaps": ([{"name": str, "granularity": int, "flags": [str]}],),
}
"""What a format says of an image; those of qcow2."""
IMAGE: Shape = {
    "virtual-size": int,
    "actual-size": (int,),
    "cluster-size": (int,),
    "dirty-flag": (bool,),
    "backing-filename": (str,),
    "backing-filename-format": (str,),
    "snapshots": ([{"id": str, "name": str}],),
    "format-specific": ({"data": OWN},),
}
NODE: Shape = {
    "node-name": str,
    "drv": str,
    "file": str,
    "ro": bool,
    "active": (bool,),
    "detect_zeroes": str,
    "cache": {"direct": bool, "no-flush": bool},
    "image": IMAGE,
    "dirty-bitmaps": ([BITMAP],),
}

SHAPES: dict[str, Shape] = {
    "query-status": {"running": bool, "status": str},
    "query-migrate": {"status": (str,)},
    "query-jobs": [JOB],
    "query-block-jobs": [BLOCK_JOB],
    "query-block": [{"device": str, "qdev": (str,), "removable": bool, "tray_open": (bool,), "inserted": (LIMITS,)}],
    "query-chardev": [{"label": str, "filename": str}],
    "query-block-exports": [{"id": str, "type": str, "node-name": str}],
    "add-fd": {"fdset-id": int},
    "query-qmp-schema": [{"name": str, "arg-type": (str,), "members": ([{"name": (str,)}],)}],
    "x-debug-query-block-graph": GRAPH,
    "query-named-block-nodes": [NODE],
    "qom-list": [{"name": str, "type": str}],
}


def see(target: str, command: str, value: object) -> None:
    """See that what QEMU returned has the command's shape. Raises BadReply."""
    see_shape(target, command, value, SHAPES.get(command))


def see_shape(target: str, command: str, value: object, shape: Shape) -> None:
    """The same with a shape that is not the command's own. Raises BadReply."""
    try:
        _see(value, shape)
    except _Wrong as wrong:
        came = f"{wrong.place.removeprefix('.') or 'it'} {wrong.what}"
        raise BadReply(target=target, command=command, came=came) from None


@contextlib.contextmanager
def making_sense(target: str, command: str) -> Iterator[None]:
    """
    Around what is made of a reply whose parts refer to each other: where one refers to what is not there, or to itself.
    Raises BadReply.
    """
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        came = f"parts that do not go together ({type(error).__name__}: {shown(str(error))})"
        raise BadReply(target=target, command=command, came=came) from None


def shown(value: object) -> str:
    """A value as it may be shown: shortened, in ASCII, without control characters."""
    try:
        text = json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        text = f"({type(value).__name__})"
    return text.replace("\x7f", "\\u007f") if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class _Wrong(Exception):
    """Something is not as its shape says: what is wrong with it, and its place."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__()
        self.what = what
        self.place = place


def _see(value: object, shape: Shape) -> None:
    kind = type(value)
    if shape is str:
        if kind is not str or not _is_text(value):
            raise _Wrong(f"is {shown(value)}, no text")
    elif shape is int:
        if kind is not int or not 0 <= value < MOST:  # type: ignore[operator]
            raise _Wrong(f"is {shown(value)}, no number of 64 bits")
    elif shape is bool:
        if kind is not bool:
            raise _Wrong(f"is {shown(value)}, neither true nor false")
    elif type(shape) is list:
        _see_list(value, shape[0])
    elif shape is not None:
        _see_object(value, shape)


def _is_text(value: Any) -> bool:
    """QEMU's names have no zero byte, and what is no UTF-8 it replaces: so do file systems and terminals expect it."""
    if value.isascii():
        return "\0" not in value
    return not any(letter == "\0" or "\ud800" <= letter < "\ue000" for letter in value)


def _see_list(value: object, shape: Shape) -> None:
    if type(value) is not list:
        raise _Wrong(f"is {shown(value)}, no list")
    for number, one in enumerate(value):
        try:
            _see(one, shape)
        except _Wrong as wrong:
            wrong.place = f"[{number}]{wrong.place}"
            raise


def _see_object(value: object, shape: dict[str, Shape]) -> None:
    if type(value) is not dict:
        raise _Wrong(f"is {shown(value)}, no object")
    for name, inner in shape.items():
        try:
            if type(inner) is not tuple:
                _see(value[name], inner)
            elif name in value:
                _see(value[name], inner[0])
        except KeyError:
            raise _Wrong("is missing", f".{name}") from None
        except _Wrong as wrong:
            wrong.place = f".{name}{wrong.place}"
            raise
