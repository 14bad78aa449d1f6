"""
docs/json.md, read as what it is: the contract. Whatever `--json` prints, in any test, is held against its tables.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs/json.md"

PLAIN: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "file": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "bytes": (int,),
    "bytes/s": (int,),
    "seconds": (int, float),
    "anything": (object,),
}

TABLES: dict[str, dict[str, str]] = {}
"""Each documented object: its keys, and the type of each."""

EVENTS = {"progress", "note", "hint", "listening", "trace", "not-written"}
"""Tables of the lines on stderr."""

PRINTED: dict[tuple[str, str], list[list[str]]] = {}
"""
Command (``any`` for every one) and verdict, and the tables whose keys the object on stdout has besides those of `head`: one
set of tables, or another.
"""


def _read() -> None:
    heading = ""
    for line in DOCUMENT.read_text().splitlines():
        cells = re.split(r"(?<!\\) *\| *", line)[1:-1]
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif len(cells) == 3 and heading == "Which object":
            for command in _words(cells[0]) or [cells[0]]:
                for verdict in _words(cells[1]):
                    PRINTED[command, verdict] = [_linked(part) for part in cells[2].split(";")]
        elif len(cells) == 3 and cells[0].startswith("`"):
            (key,) = _words(cells[0])
            TABLES.setdefault(heading, {})[key] = cells[1]


def _linked(cell: str) -> list[str]:
    return re.findall(r"\[([^]]+)\]\(#", cell)


def _words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


_read()

seen: set[tuple[str, str]] = set()
"""Tables and keys that an object had with a value: neither null nor an empty list."""


def hold(out: str, err: str) -> None:
    """What a command with `--json` has said on stdout and stderr must be what is documented."""
    lines = out.splitlines()
    assert len(lines) == 1 and out.endswith("\n"), f"not one object on stdout: {out!r}, {err!r}"
    found = problems(json.loads(lines[0]))
    for line in err.splitlines():
        assert line.startswith("{"), f"what is no object on stderr: {err!r}"
        found += problems_of_event(json.loads(line))
    assert not found, f"not as {DOCUMENT.name} has it: {'; '.join(found)}\n{out}"


def problems(document: Any) -> list[str]:
    """What is wrong with an object from stdout; nothing, if it is as documented."""
    if list(document)[:3] != list(TABLES["head"]):
        return [f"it begins with {list(document)[:3]}"]
    command, verdict = document["command"], document["verdict"]
    known = PRINTED.get((command, verdict)) or PRINTED.get(("any", verdict))
    if known is None:
        return [f"`{command}` has no verdict {verdict!r}"]
    return min((list(_of_tables(["head", *tables], document, "it")) for tables in known), key=len)


def problems_of_event(document: Any) -> list[str]:
    """The same of one from stderr."""
    name = str(document.get("event"))
    return list(_of_tables([name], document, name)) if "event" in TABLES.get(name, {}) else [f"no event {name!r}"]


def of(table: str, value: Any) -> list[str]:
    """The same of any object that has a table."""
    return list(_of_tables([table], value, table))


def _of_tables(names: list[str], value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} is no object"
        return
    keys = {key: (name, kind) for name in names for key, kind in TABLES[name].items()}
    yield from (f"{where}.{key} is not documented" for key in value.keys() - keys.keys())
    yield from (f"{where}.{key} is missing" for key in keys.keys() - value.keys())
    for key in keys.keys() & value.keys():
        name, kind = keys[key]
        if value[key] is not None and value[key] != []:
            seen.add((name, key))
        yield from _of_kind(kind, value[key], f"{where}.{key}")


def _of_kind(kind: str, value: Any, where: str) -> Iterator[str]:
    if kind.endswith(" or null"):
        if value is not None:
            yield from _of_kind(kind.removesuffix(" or null"), value, where)
    elif kind.startswith("list of "):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for number, part in enumerate(value):
            yield from _of_kind(kind.removeprefix("list of "), part, f"{where}[{number}]")
    elif kind.startswith("["):
        yield from _of_tables(_linked(kind), value, where)
    elif kind.startswith("`"):
        if value not in _words(kind):
            yield f"{where} is {value!r}, not one of {kind}"
    elif not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind not in ("boolean", "anything")):
        yield f"{where} is {value!r}, no {kind}"
