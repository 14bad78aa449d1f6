"""
qemu-img: the only module that runs it.

Always by absolute path and argv, never through a shell, with JSON read back: a name may hold spaces, colons, newlines or
a leading dash. `info` opens a single image and nothing below it.
"""

import asyncio
import json
import os
import stat
import subprocess
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qmpmerge.chain import Image
from qmpmerge.errors import ImageUnreadable, ToolMissing

SECONDS = 60.0


@dataclass(frozen=True)
class Header:
    """What an image's own header says. `backing` is the string as written; sizes in bytes."""

    file: str
    format: str
    virtual_size: int
    backing: str | None
    backing_format: str | None


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


async def same(chain: Sequence[Image], other: Sequence[Image]) -> bool:
    """
    Whether a chain (base first) and a lower part of it show the same data, as read by another process without locks.

    Holes cost nothing, all else is read. Nobody may write meanwhile, and what was written must be flushed. Raises
    ImageUnreadable when either cannot be opened like that (encrypted, a data file, on other networks than NBD),
    ToolMissing.
    """
    try:
        lower = _opened(other)
        if all(image.has_path for image in other):
            upper = _opened(chain)
        else:
            # Below an image only a file can be described anew: QEMU would mix all else with what the header names.
            # So the lower part gets a name, is opened first, and is referred to.
            lower["node-name"] = "lower"
            upper = _opened(chain[len(other) :], "lower")
        sources = [f"json:{json.dumps(node)}" for node in (lower, upper)]
    except OSError as error:
        raise ImageUnreadable(file=chain[-1].file, reason=error.strerror or str(error)) from None
    code, _output, complaints = await _finished("compare", "-q", *sources, seconds=None)
    if code not in (0, 1):  # 1: they differ; more: it could not be told
        raise ImageUnreadable(file=chain[-1].file, reason=_first_line(complaints))
    return code == 0


def _opened(images: Sequence[Image], lowest: str | None = None) -> dict[str, object]:
    """
    A chain as one blockdev of explicit nodes, so that nothing is taken from a header or probed; `lowest` is the node that
    it stands on.
    """
    *below, image = images
    node: dict[str, object] = {"driver": image.format, "file": _file(image)}
    return {**node, "backing": _opened(below, lowest) if below else lowest} if image.format == "qcow2" else node


def _file(image: Image) -> dict[str, object]:
    if image.file.startswith("nbd"):
        return _nbd(image.file)
    is_device = image.has_path and stat.S_ISBLK(os.stat(image.file).st_mode)
    return {"driver": "host_device" if is_device else "file", "filename": image.file, "locking": "off"}


def _nbd(uri: str) -> dict[str, object]:
    """``nbd://HOST:PORT/NAME`` and ``nbd+unix:///NAME?socket=PATH``, as QEMU spells them."""
    parts = urllib.parse.urlsplit(uri)
    path = urllib.parse.parse_qs(parts.query).get("socket")
    inet: dict[str, object] = {"type": "inet", "host": parts.hostname or "", "port": str(parts.port or 10809)}
    server = {"type": "unix", "path": path[0]} if path else inet
    return {"driver": "nbd", "server": server, "export": urllib.parse.unquote(parts.path.removeprefix("/"))}


def _header(entry: Any) -> Header:
    return Header(
        file=entry["filename"],
        format=entry["format"],
        virtual_size=entry["virtual-size"],
        backing=entry.get("backing-filename"),
        backing_format=entry.get("backing-filename-format"),
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
