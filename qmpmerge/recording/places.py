"""
Where the files of a recording are while it is replayed: below a folder that is private to the replay, each of them.

So nothing that a client does to them reaches a file of this machine, whatever has the same name here: neither by the names that
QEMU tells, nor through the sockets of agents and servers that it tells. What a text is its key tells, as QMP has it: a name of
one of QEMU's objects, which stays, or of a file, which does not; and what is neither is a file's as soon as it has a slash.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from qmpmerge.recording.twins import plain

OBJECTS = frozenset({"qdev", "qdev_id", "qom-path"})
"""Keys of QEMU's own paths. In events about devices `path` is one as well."""

NODES = frozenset({"id", "node-name", "device", "job-id", "node", "child", "name", "label", "type", "driver", "class"})
"""Keys of what QEMU calls things that are no files."""

FILES = frozenset(
    {"file", "filename", "full-backing-filename", "backing-file", "backing_file", "data-file", "path", "base", "top"}
)
"""Keys of file names, whatever they look like."""

BACKING = frozenset({"backing-filename", "backing_file", "backing-file"})
"""Those that stand in a header, and are relative to the image's folder."""

_LOCAL = frozenset({"file", "host_device", "qcow2", "raw"})
"""Drivers of json: names that need nothing but files."""

_QOM = re.compile(r"/(?:machine|objects|chardevs|backend)(?:/[^/]+)*")
_PROTOCOL = re.compile(r"[^/]*?:")
_SOCKET = re.compile(r"((?:disconnected:)?unix:)([^,]+)(.*)", re.DOTALL)
_SENTENCE = re.compile(r"(?<=[\s\"'(=,:])/+")
"""Where a path begins in the middle of a text that people read."""


class Places:
    """Names as they are in the recording (`there`), and as clients see them (`here`), below `folder`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._there: dict[str, str] = {}

    def here(self, value: Any, key: str = "", inside: Mapping[str, Any] | None = None) -> Any:
        """A value of JSON for a client, that of `key` in an object."""
        if isinstance(value, str):
            return self._text(value, key, inside or {})
        if isinstance(value, list):
            return [self.here(one, key, inside) for one in value]
        if isinstance(value, dict):
            return {name: self.here(one, name, value) for name, one in value.items()}
        return value

    def message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """One of QEMU's: an event about a device has QEMU's path of that."""
        data = message.get("data")
        if str(message.get("event", "")).startswith("DEVICE_") and isinstance(data, dict):
            is_object = _QOM.fullmatch(str(data.get("path")))
            return {**message, "data": {**self.here(data), **({"path": data["path"]} if is_object else {})}}
        told: Mapping[str, Any] = self.here(message)
        return told

    def there(self, value: Any) -> Any:
        """A value of JSON that a client has sent."""
        if isinstance(value, str):
            return self._there.get(value) or value.replace(self.folder, "")
        if isinstance(value, list):
            return [self.there(one) for one in value]
        if isinstance(value, dict):
            return {key: self.there(one) for key, one in value.items()}
        return value

    def name(self, text: str) -> str:
        """
        What a file name is here. What is no plain path, as that of a server, is one of a file that is not there: nobody is
        spoken to.
        """
        if (found := _SOCKET.fullmatch(text)) is not None:
            return self._known(text, f"{found[1]}{self._below(found[2])}{found[3]}")
        if text.startswith("json:"):
            return self._known(text, self._options(text))
        text = text.removeprefix("file:")
        if _PROTOCOL.match(text):
            return self._known(text, self._nowhere(text))
        return self._known(text, self._below(text)) if text else text

    def backing(self, text: str, image: str) -> str:
        """The same of a name in the header of an image, which stays relative where it does not lead out of the folder."""
        if text.startswith("/") or _PROTOCOL.match(text) or not text:
            return self.name(text)
        depth = image.count("/", 1) if image.startswith("/") else 0
        ups = os.path.normpath(text).split("/").count("..")
        return text if ups <= depth and "/../" not in text.lstrip("./") else self._known(text, self._below(text))

    def is_plain(self, text: str) -> bool:
        """Whether a file is meant that can have a stand-in."""
        return bool(text) and "\0" not in text and not _PROTOCOL.match(text)

    def _text(self, text: str, key: str, inside: Mapping[str, Any]) -> str:
        key = key.rpartition(".")[2]  # of options
        if key in NODES or (key in OBJECTS and _QOM.fullmatch(text)):
            return text
        if key in BACKING:
            return self.backing(text, plain(str(inside.get("filename") or inside.get("file") or "")))
        if key in FILES or text.startswith(("/", "json:")):
            return self.name(text)
        if re.search(r"\s", text):
            return _SENTENCE.sub(lambda found: f"{self.folder}/", text)
        return self.name(text) if "/" in text or text.startswith("unix:") else text

    def _below(self, path: str) -> str:
        if not path.startswith("/"):  # to the folder that QEMU was started in, which is not told
            path = f"/relative{os.path.normpath(f'/{path}')}"
        return self.folder + os.path.normpath(f"/{path.lstrip('/')}")

    def _options(self, text: str) -> str:
        try:
            options = json.loads(text.removeprefix("json:"))
            is_local = isinstance(options, dict) and _LOCAL.issuperset(_drivers(options))
            return f"json:{json.dumps(self.here(options))}" if is_local else self._nowhere(text)
        except (ValueError, RecursionError):
            return self._nowhere(text)

    def _nowhere(self, text: str) -> str:
        readable = re.sub(r"[^\w.+-]+", "-", text)[:60]
        return f"{self.folder}/not-replayed/{readable}-{zlib.crc32(text.encode(errors='replace')):08x}"

    def _known(self, text: str, here: str) -> str:
        self._there[here] = text
        return here


def _drivers(options: Mapping[str, Any]) -> Iterator[str]:
    """All that are named in options, those of what is below as well."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _drivers(value)
        elif key.rpartition(".")[2] == "driver":
            yield str(value)
