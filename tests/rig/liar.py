"""
A monitor that lies once: it passes QMP lines on between a client and a real QEMU, and changes one of QEMU's.

Who is asked for its pid is either nobody that is known (as over TCP), or QEMU itself, which listens on the socket then.
"""

import contextlib
import copy
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpmerge.testing.wire import End, Wire, laid

DEPTH = 100_000
"""Of a nesting that no parser follows."""

ODD_TEXTS = ("a\0b", "\ud800", "two\nlines", "\x1b[2J\x1b[31mred", "", "x" * 100_000, "../../../etc/passwd", "json:{")
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 2**64, 10**30, 1.5, float("inf"), float("nan")),
    *("", "7", [], {}, [7], {"id": 7}),
)
JOB = {"device": "qmpmerge-commit-vda", "type": "commit", "len": 0, "offset": 0, "speed": 0}
FORGED = (
    {"event": "BLOCK_JOB_COMPLETED", "data": JOB},
    {"event": "BLOCK_JOB_READY", "data": JOB},
    {"event": "JOB_STATUS_CHANGE", "data": {"id": "qmpmerge-commit-vda", "status": "concluded"}},
    {"event": "NOBODY_KNOWS_ME", "data": {"a": [1, 2, 3]}},
    {"event": "JOB_STATUS_CHANGE"},
    {"event": "JOB_STATUS_CHANGE", "data": 7, "timestamp": "now"},
    {"event": 7},
    {"event": ["JOB_STATUS_CHANGE"]},
    {"event": None},
)
"""Of a job that has not done it, of none, and such as QEMU never sends."""


Lines = list[Any]
Lie = Callable[[Any, random.Random], Lines]
"""Makes of one message what is sent in its place: bytes, and `End`."""


# --- what can be done to a value in it ---------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in it."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change` was called with what holds the value at `path`, and its key there."""
    root = {"root": copy.deepcopy(value)}
    holder: Any = root
    *above, last = ("root", *path)
    for key in above:
        holder = holder[key]
    change(holder, last)
    return root.get("root")


def somewhere(
    value: Any, random: random.Random, wanted: Callable[[Any], bool] = lambda value: True
) -> tuple[Any, ...] | None:
    """A path: every name of a key is as likely, however often it stands there."""
    by_name: dict[Any, list[tuple[Any, ...]]] = {}
    for path in places(value):
        if wanted(at(value, path)):
            name = next((key for key in reversed(path) if isinstance(key, str)), "")
            by_name.setdefault((name, bool(path) and isinstance(path[-1], int)), []).append(path)
    return random.choice(random.choice(list(by_name.values()))) if by_name else None


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def other_type(holder: Any, key: Any, random: random.Random) -> None:
    options = [value for value in ODD_VALUES if type(value) is not type(holder[key])]
    holder[key] = copy.deepcopy(random.choice(options))


def other_text(holder: Any, key: Any, random: random.Random) -> None:
    holder[key] = random.choice(ODD_TEXTS)


def other_number(holder: Any, key: Any, random: random.Random) -> None:
    holder[key] = random.choice(
        (-1, -(2**63), 2**63, 2**64, 10**30, 10**400, float(holder[key]), str(holder[key]), 0, 1)
    )


def removed(holder: Any, key: Any, random: random.Random) -> None:
    del holder[key]


def nothing(holder: Any, key: Any, random: random.Random) -> None:
    holder[key] = None


def emptied(holder: Any, key: Any, random: random.Random) -> None:
    holder[key] = type(holder[key])()


def doubled(holder: Any, key: Any, random: random.Random) -> None:
    holder[key] = holder[key] * 2


def reversed_(holder: Any, key: Any, random: random.Random) -> None:
    holder[key] = holder[key][::-1]


def nested(holder: Any, key: Any, random: random.Random) -> None:
    for _ in range(200):
        holder[key] = [holder[key]]


def is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


VALUES: dict[str, tuple[Callable[[Any, Any, random.Random], None], Callable[[Any], bool]]] = {
    "type": (other_type, lambda value: True),
    "text": (other_text, lambda value: isinstance(value, str)),
    "number": (other_number, lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "removed": (removed, lambda value: True),
    "null": (nothing, lambda value: True),
    "emptied": (emptied, lambda value: isinstance(value, list | dict) and bool(value)),
    "doubled": (doubled, is_list),
    "reversed": (reversed_, is_list),
    "nested": (nested, lambda value: True),
}


def of_value(name: str) -> Lie:
    """A lie about a value in what the message returns, or greets with."""
    change, wanted = VALUES[name]

    def lie(message: Any, random: random.Random) -> Lines:
        told = "return" if "return" in message else "QMP" if "QMP" in message else None
        path = somewhere(message[told], random, wanted) if told is not None else None
        if told is None or path is None:
            return [line(message)]
        return [line(changed(message, (told, *path), lambda holder, key: change(holder, key, random)))]

    return lie


# --- what can be done to all of it -------------------------------------------------------------------------------------


def error(kind: str, words: str) -> Lie:
    def lie(message: Any, random: random.Random) -> Lines:
        given = {"id": message["id"]} if "id" in message else {}
        return [line({"error": {"class": kind, "desc": words}, **given})]

    return lie


def with_id(message: Any, random: random.Random) -> Lines:
    """Another id, none, or one of another type."""
    told = {key: value for key, value in message.items() if key != "id"}
    options: tuple[Any, ...] = ("__qmp#99999", 7, None, ["__qmp#00001"], {"a": 1}, "")
    return [line(told if random.random() < 0.2 else {**told, "id": random.choice(options)})]


def id_twice(message: Any, random: random.Random) -> Lines:
    return [line(message).replace(b'"id"', b'"id": "__qmp#99999", "id"', 1)]


def twice(message: Any, random: random.Random) -> Lines:
    return [line(message), line(message)]


def event_before(message: Any, random: random.Random) -> Lines:
    stamp = {"timestamp": {"seconds": 1, "microseconds": 2}}
    return [line({**stamp, **random.choice(FORGED)}), line(message)]


def half(message: Any, random: random.Random) -> Lines:
    text = line(message)
    return [text[: random.randrange(len(text))], End]


def closed(message: Any, random: random.Random) -> Lines:
    return [line(message), End]


def no_json(message: Any, random: random.Random) -> Lines:
    text = bytearray(line(message)[:-1])
    text[random.randrange(len(text))] = random.choice(b'{}[],:"\\\xff\xc3\x00\x1b')
    return [bytes(text) + b"\n"]


def no_object(message: Any, random: random.Random) -> Lines:
    return [random.choice((b"[1, 2]\n", b"7\n", b'"text"\n', b"null\n", b"\n", b"(qemu) \n"))]


def too_deep(message: Any, random: random.Random) -> Lines:
    given = b'"id": "%s", ' % str(message.get("id")).encode()
    return [b"{%s" % given + b'"return": ' + b"[" * DEPTH + b"]" * DEPTH + b"}\n"]


def incomplete(message: Any, random: random.Random) -> Lines:
    """Neither a return nor an error, or an error that is none."""
    given = {"id": message["id"]} if "id" in message else {}
    errors: tuple[dict[str, Any], ...] = (
        {},
        {"error": 7},
        {"error": {}},
        {"error": {"class": 7, "desc": 8}},
        {"error": None, "return": {}},
    )
    return [line({**random.choice(errors), **given})]


GENERIC = error("GenericError", "no such thing\x1b[31m \u202e happened\nand more")
ENVELOPES: dict[str, Lie] = {
    "generic-error": GENERIC,
    "command-not-found": error("CommandNotFound", "The command nobody-knows has not been found"),
    "device-not-found": error("DeviceNotFound", "Device 'vda' not found"),
    "id": with_id,
    "id-twice": id_twice,
    "twice": twice,
    "event": event_before,
    "half": half,
    "closed": closed,
    "no-json": no_json,
    "no-object": no_object,
    "too-deep": too_deep,
    "incomplete": incomplete,
}
LIES: dict[str, Lie] = {**{name: of_value(name) for name in VALUES}, **ENVELOPES}
"""By their names."""


def line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


# --- the wire ----------------------------------------------------------------------------------------------------------


@dataclass
class Liar(Wire):
    """
    Changes the message `at` (from 1, the greeting too, events not), as `lie` says; 0 for none. With `of` only replies to
    that command count, with `since` only what comes after the first reply to that one. `told` are the commands whose
    replies it has passed on, in order, and `lied` is what it has made of the one.
    """

    lie: Lie | None = None
    at: int = 0
    seed: int = 0
    of: str = ""
    since: str = ""
    told: list[str] = field(default_factory=list)
    lied: bytes = b""

    def received(self, text: bytes, command: str, client: socket.socket) -> Lines:
        if command == "event":
            return [text]
        self.told.append(command)
        if self.lie is None or self.lied or self.of not in ("", command) or self._count() != self.at:
            return [text]
        made = self.lie(json.loads(text), random.Random(self.seed))
        self.lied = b"".join(piece for piece in made if piece is not End)
        return made

    def _count(self) -> int:
        """How many of those that count were told."""
        begun = self.told.index(self.since) + 1 if self.since in self.told else len(self.told) if self.since else 0
        return sum(self.of in ("", command) for command in self.told[begun:])


@contextlib.contextmanager
def lying(liar: Liar, listener: socket.socket) -> Iterator[Liar]:
    """While the block runs clients of `listener` talk to the liar."""
    with laid(liar, listener):
        yield liar


@contextlib.contextmanager
def own(folder: Path) -> Iterator[tuple[str, socket.socket]]:
    """A socket of the bench's: nobody can tell which QEMU is behind it."""
    path = str(folder / "liar")
    with socket.socket(socket.AF_UNIX) as listener:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        listener.listen()
        yield path, listener
