"""The lines of virsh or qemu-img that do what a command of a recording does, with the names that its VM and its images have."""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from qmpmerge.recording import phrases
from qmpmerge.recording.exchanges import Entry, Exchange
from qmpmerge.recording.reading import Line

_JOB = re.compile(r"qmpmerge-(?:commit|pull)-(.+)", re.DOTALL)


class Names:
    """What a recording calls things: its VM, and the file of each node as QEMU has told it so far."""

    def __init__(self) -> None:
        self._vm = "VM"
        self._files: dict[str, str] = {}
        self._disk = "DISK"
        self._folder = ""

    def see(self, entry: Entry) -> None:
        """The next one."""
        if isinstance(entry, Line) and entry.kind == "session":
            self._vm = _name(entry.facts.get("command_line")) or self._vm
        elif isinstance(entry, Exchange) and entry.name == "query-named-block-nodes":
            self._files.update(_files((entry.answer or {}).get("return")))
        elif isinstance(entry, Exchange) and entry.name in ("block-commit", "block-stream"):
            job = _JOB.fullmatch(str(entry.arguments.get("job-id", "")))
            self._disk = job[1] if job else str(entry.arguments.get("device", self._disk))

    def short(self, file: str) -> str:
        """A file's name, with its folder where that is another than was told last."""
        folder, name = os.path.split(file)
        was, self._folder = self._folder, folder or self._folder
        return name if name and folder in ("", was) else file

    def twin(self, exchange: Exchange) -> str | None:
        """As it is typed; what is not known stands there in capitals."""
        twin = phrases.of(exchange.name, exchange.arguments).twin
        if twin is None:
            return None
        return twin.format_map(self._words(exchange.arguments)) + _more(exchange)

    def _words(self, given: Mapping[str, Any]) -> dict[str, str]:
        disk = self._disk if self._disk != "DISK" else str(given.get("device", self._disk))
        base = self._file(given.get("base-node")) or given.get("base") or given.get("backing-file")
        top = self._file(given.get("top-node")) or given.get("top")
        file = self._file(given.get("image-node-name") or given.get("node-name"))
        speed = f"{max(1, given['speed'] // 2**20)}" if isinstance(given.get("speed"), int) else None
        words = {"vm": self._vm, "disk": disk, "base": base, "top": top, "file": file, "speed": speed}
        return {name: shlex.quote(str(word)) if word else name.upper() for name, word in words.items()}

    def _file(self, node: object) -> str | None:
        return self._files.get(str(node))


def _more(exchange: Exchange) -> str:
    """Options by which virsh says what QMP says by the nodes it names."""
    given = exchange.arguments
    if exchange.name == "block-commit" and given.get("top-node") in (None, given.get("device")):
        return " --active"
    return f" --total-bytes-sec {max(limits.values())}" if (limits := _bytes(exchange)) else ""


def _bytes(exchange: Exchange) -> dict[str, int]:
    if exchange.name != "block_set_io_throttle":
        return {}
    return {name: value for name, value in phrases.limits(exchange.arguments).items() if name.startswith("bps")}


def _files(nodes: object) -> Iterable[tuple[str, str]]:
    for node in nodes if isinstance(nodes, list) else ():
        if isinstance(node, dict) and isinstance(node.get("node-name"), str) and isinstance(node.get("file"), str):
            yield node["node-name"], plain(node["file"])


def plain(name: str) -> str:
    """The file in a json: name, with which QEMU says what an image was opened as."""
    with contextlib.suppress(ValueError, RecursionError):
        options = json.loads(name.removeprefix("json:")) if name.startswith("json:") else None
        while isinstance(options, dict):
            if isinstance(options.get("filename"), str):
                return str(options["filename"])
            options = options.get("file")
    return name


def _name(line: object) -> str | None:
    """That of `-name`, in QEMU's command line."""
    words = [str(word) for word in line] if isinstance(line, list) else []
    for option, value in zip(words, words[1:], strict=False):
        if option in ("-name", "--name"):
            parts = [part for part in value.split(",") if not re.match(r"(process|debug-threads)=", part)]
            return parts[0].removeprefix("guest=") if parts else None
    return None
