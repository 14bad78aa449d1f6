"""
qemu-img: the only module that runs it.

Always by absolute path and argv, never through a shell, with JSON read back: a name may hold spaces, colons, newlines or
a leading dash. `info` opens a single image and nothing below it.
"""

import asyncio
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Image
from qmpmerge.errors import ImageUnreadable, ToolMissing
from qmpmerge.images import qcow2

SECONDS = 60.0


@dataclass(frozen=True)
class Header:
    """
    What an image's own header says. `backing` is the string as written; sizes in bytes.

    `open_bitmaps` are the dirty bitmaps that are marked as in use: where nobody has the image open, they are of no use
    any more. `corrupt` is QEMU's own mark.
    """

    file: str
    format: str
    virtual_size: int
    backing: str | None
    backing_format: str | None
    open_bitmaps: tuple[str, ...] = ()
    corrupt: bool = False


async def info(path: str, format: str | None = None) -> Header:
    """
    The header of one image, shared with whoever holds it; nothing below it is opened.

    Pass the format where it is known: a raw image must never be probed, its first bytes belong to the guest.
    Raises ImageUnreadable, ToolMissing.
    """
    arguments = ["info", "--force-share", "--output=json"]
    if format is not None:
        arguments += ["-f", format]
    return _header(json.loads(await _run(path, *arguments, os.path.abspath(path))))


async def info_of(image: Image) -> Header:
    """The same for an image that may be on an NBD server, or a part of a file; ours is another connection than QEMU's."""
    try:
        node = _node(image)
    except OSError as error:
        raise ImageUnreadable(file=image.file, reason=error.strerror or str(error)) from None
    output = await _run(image.file, "info", "--force-share", "--output=json", f"json:{json.dumps(node)}")
    return _header(json.loads(output))


async def chain_info(path: str, format: str | None = None) -> list[Header]:
    """
    The headers of a whole chain, base first, as `qemu-img info --backing-chain` tells them.

    Only for chains whose every backing name is known to be harmless: qemu-img opens whatever the headers name.
    Raises ImageUnreadable, ToolMissing.
    """
    arguments = ["info", "--force-share", "--backing-chain", "--output=json"]
    if format is not None:
        arguments += ["-f", format]
    entries = json.loads(await _run(path, *arguments, os.path.abspath(path)))
    return [_header(entry) for entry in reversed(entries)]


@dataclass(frozen=True)
class Extent:
    """
    A range of an image's data, in bytes. `zero` says that it is known to read as zeros: by a note in the tables, or from a
    place in the file where nothing was written yet (`preallocation=metadata`).
    """

    start: int
    length: int
    zero: bool = False

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length


async def extents(image: Image) -> list[Extent]:
    """
    The ranges that `image` itself has allocated, whatever lies below it, in order; nothing below it is opened.

    Read without locks and shared with whoever writes: of an image in use it is what has been written to disk so far.
    `image` needs a path. Raises ImageUnreadable (encrypted, damaged), ToolMissing.
    """
    try:
        node = _node(image)
    except OSError as error:
        raise ImageUnreadable(file=image.file, reason=error.strerror or str(error)) from None
    if image.format not in ("raw", "luks"):
        node["backing"] = None
    output = await _run(image.file, "map", "--force-share", "--output=json", f"json:{json.dumps(node)}")
    # QEMU before 6.1 does not tell zeros that are noted from what is not there.
    return [
        Extent(entry["start"], entry["length"], zero=entry["zero"])
        for entry in json.loads(output)
        if entry.get("present", entry["data"]) and (entry["data"] or image.format != "raw")
    ]


async def create_overlay(path: str, *, size: int, backing: str, backing_format: str, format: str = "qcow2") -> None:
    """
    Make an overlay of `size` bytes whose header names `backing`, without opening the backing image (`-u`).

    qemu-img overwrites whatever is at `path`: the caller has made sure that this is its own, empty file.
    Raises ImageUnreadable, ToolMissing.
    """
    await _run(
        path,
        "create",
        "-q",
        "-u",
        "-f",
        format,
        "-b",
        backing,
        "-F",
        backing_format,
        os.path.abspath(path),
        str(size),
    )


async def repoint(path: str, backing: str, backing_format: str) -> None:
    """Write another backing name into a qcow2 header; no backing image is opened. Raises ImageUnreadable, ToolMissing."""
    await _run(path, "rebase", "-u", "-f", "qcow2", "-b", backing, "-F", backing_format, os.path.abspath(path))


async def held(images: Sequence[Image]) -> list[Extent]:
    """
    What these images (each standing on the one before) hold between them, written zeroes included, in order.

    What is below them is not opened. Read as `same` reads. Raises ImageUnreadable, ToolMissing.
    """
    try:
        code, output, complaints = await _finished("map", "--output=json", _source(_opened(images)), seconds=None)
    except OSError as error:
        raise ImageUnreadable(file=images[-1].file, reason=error.strerror or str(error)) from None
    if code != 0:
        raise ImageUnreadable(file=images[-1].file, reason=_first_line(complaints))
    # `present` came with QEMU 6.1
    return [Extent(entry["start"], entry["length"]) for entry in json.loads(output) if entry.get("present", True)]


async def same(chain: Sequence[Image], other: Sequence[Image], within: Extent | None = None) -> bool:
    """
    Whether a chain (base first) and a lower part of it show the same data, `within` a part or all over, as read by
    another process without locks.

    Holes cost nothing, all else is read. Nobody may write meanwhile, and what was written must be flushed. Raises
    ImageUnreadable when either cannot be opened like that (encrypted, on other networks than NBD), ToolMissing.
    """
    try:
        sources = [_source(node, within) for node in _both(chain, other)]
    except OSError as error:
        raise ImageUnreadable(file=chain[-1].file, reason=error.strerror or str(error)) from None
    code, _output, complaints = await _finished("compare", "-q", *sources, seconds=None)
    if code not in (0, 1):  # 1: they differ; more: it is not known
        raise ImageUnreadable(file=chain[-1].file, reason=_first_line(complaints))
    return code == 0


def _both(chain: Sequence[Image], other: Sequence[Image]) -> tuple[dict[str, object], dict[str, object]]:
    """The lower part, and the whole chain."""
    lower = _opened(other)
    if all(image.has_path for image in other):
        return lower, _opened(chain)
    # Below an image only a file can be described anew: QEMU would mix all else with what the header names.
    # So the lower part gets a name, is opened first, and is referred to.
    return {**lower, "node-name": "lower"}, _opened(chain[len(other) :], "lower")


def _source(node: dict[str, object], within: Extent | None = None) -> str:
    if within is not None:
        # The node in between looks through a whole chain for what is allocated where; `raw` by itself asks the top only.
        # "fifo": it hands on what its only child says, while a vote, even of one, takes four times as long.
        whole = {"driver": "quorum", "read-pattern": "fifo", "vote-threshold": 1, "children": [node]}
        node = {"driver": "raw", "offset": within.start, "size": within.length, "file": whole}
    return f"json:{json.dumps(node)}"


def _opened(images: Sequence[Image], lowest: str | None = None) -> dict[str, object]:
    """
    A chain as one blockdev of explicit nodes, so that nothing is taken from a header or probed; `lowest` is the node that
    it stands on.
    """
    *below, image = images
    node = _node(image)
    if image.format != "qcow2":
        return node
    data = image.data.file if image.data is not None else qcow2.data_path(image) if image.has_path else None
    node["backing"] = _opened(below, lowest) if below else lowest
    return node if data is None else {**node, "data-file": _plain_file(data)}


def _node(image: Image) -> dict[str, object]:
    """
    An image in its file, or in the part of it. Raises OSError where that is not known.

    As `backing.json_name` has it: below an image QEMU joins what is not simply a file with what the header names.
    """
    file = _nbd(image.file) if image.file.startswith("nbd") else _plain_file(image.file)
    return backing.node(image, file)


def _plain_file(path: str) -> dict[str, object]:
    return {**backing.storage(path), "locking": "off"}


def _nbd(uri: str) -> dict[str, object]:
    """``nbd://HOST:PORT/NAME`` and ``nbd+unix:///NAME?socket=PATH``, as QEMU spells them."""
    import urllib.parse  # 3 ms, and only such images need it

    address = nbd_address(uri)
    server: dict[str, object] = (
        {"type": "unix", "path": address}
        if isinstance(address, str)
        else {"type": "inet", "host": address[0], "port": str(address[1])}
    )
    export = urllib.parse.unquote(urllib.parse.urlsplit(uri).path.removeprefix("/"))
    return {"driver": "nbd", "server": server, "export": export}


def nbd_address(uri: str) -> str | tuple[str, int]:
    """The server in such a URI: the path of a UNIX socket, or host and port."""
    import urllib.parse

    parts = urllib.parse.urlsplit(uri)
    path = urllib.parse.parse_qs(parts.query).get("socket")
    return path[0] if path else (parts.hostname or "", parts.port or 10809)


def _header(entry: Any) -> Header:
    own = entry.get("format-specific", {}).get("data", {})
    return Header(
        file=entry["filename"],
        format=entry["format"],
        virtual_size=entry["virtual-size"],
        backing=entry.get("backing-filename"),
        backing_format=entry.get("backing-filename-format"),
        open_bitmaps=tuple(bitmap["name"] for bitmap in own.get("bitmaps", ()) if "in-use" in bitmap["flags"]),
        corrupt=own.get("corrupt", False),
    )


async def _run(path: str, *arguments: str) -> bytes:
    """Run on the image at `path` and return what it said."""
    try:
        code, output, complaints = await _finished(*arguments, seconds=SECONDS)
    except TimeoutError:
        raise ImageUnreadable(file=path, reason=f"no answer within {SECONDS:g} s") from None
    if code != 0:
        raise ImageUnreadable(file=path, reason=_first_line(complaints))
    return output


async def _finished(*arguments: str, seconds: float | None) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr; the program does not outlive a cancellation. Raises TimeoutError, ToolMissing."""
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-img", *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise ToolMissing(program="qemu-img", package="qemu-utils") from None
    try:
        async with asyncio.timeout(seconds):
            output, complaints = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output, complaints


def _first_line(complaints: bytes) -> str:
    text = complaints.decode(errors="backslashreplace").strip()
    return (text.splitlines() or ["no reason given"])[0].removeprefix("qemu-img: ")
