"""
qemu-img: the only module that runs it.

Always by absolute path and argv, never through a shell, with JSON read back: a name may hold spaces, colons, newlines or
a leading dash. `info` opens a single image and nothing below it.
"""

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from qmpmerge import folder
from qmpmerge.chain import backing
from qmpmerge.chain.chain import Image
from qmpmerge.errors import ImageUnreadable, ToolMissing
from qmpmerge.folder import File
from qmpmerge.images import links, qcow2
from qmpmerge.images.qcow2 import Qcow2Header
from qmpmerge.value import Value

SECONDS = 60.0
_CANNOT_RUN = 126  # as a shell has it
_OFFSET = rb"offset (\d+)"


class Header(Value):
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


class Info(Value):
    """An image's header, and all that qemu-img told of the image, which is what QEMU tells of one that it has open."""

    header: Header
    told: Any


async def info(path: str, format: str | None = None) -> Header:
    """
    The header of one image, shared with whoever holds it; nothing below it is opened.

    Pass the format where it is known: a raw image must never be probed, its first bytes belong to the guest.
    Raises ImageUnreadable, ToolMissing.
    """
    arguments = ["info", "--force-share", "--output=json"]
    if format is not None:
        arguments += ["-f", format]
    output = await _run(path, *arguments, os.path.abspath(path))
    with _understood(path):
        return _header(json.loads(output))


async def info_of(image: Image) -> Header:
    """The same for an image that may be on an NBD server, or a part of a file; ours is another connection than QEMU's."""
    opened = _Files()
    try:
        node = opened.image(image)
    except OSError as error:
        raise ImageUnreadable(file=image.file, reason=error.strerror or str(error)) from None
    output = await _run(image.file, "info", "--force-share", "--output=json", _source(node), opened=opened.all)
    with _understood(image.file):
        return replace(_header(json.loads(output)), file=image.file)


async def chain_info(path: str, format: str) -> list[Info]:
    """
    What `qemu-img info --backing-chain` tells of a whole chain, base first; it opens one image after the other.

    Only for chains whose every backing name is known to be harmless: qemu-img opens whatever the headers name.
    Raises ImageUnreadable, ToolMissing.
    """
    arguments = ("info", "--force-share", "--backing-chain", "--output=json", "-f", format)
    output = await _run(path, *arguments, os.path.abspath(path))
    with _understood(path):
        return [Info(_header(entry), entry) for entry in reversed(json.loads(output))]


class Extent(Value):
    """
    A range of an image's data, in bytes. `zero` says that it is known to read as zeros: by a note in the tables, or from a
    place in the file where nothing was written yet (`preallocation=metadata`). What is `compressed` is never written in its
    place.
    """

    start: int
    length: int
    zero: bool = False
    compressed: bool = False

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
    opened = _Files()
    try:
        node = opened.image(image)
        if image.format not in ("raw", "luks"):
            node["backing"] = None
        if image.format == "qcow2":
            node.update(_tables(qcow2.read_of(image)))
    except OSError as error:
        raise ImageUnreadable(file=image.file, reason=error.strerror or str(error)) from None
    output = await _run(image.file, "map", "--force-share", "--output=json", _source(node), opened=opened.all)
    # QEMU before 6.1 does not tell zeros that are noted from what is not there.
    with _understood(image.file):
        return [
            Extent(int(entry["start"]), int(entry["length"]), bool(entry["zero"]), compressed="offset" not in entry)
            for entry in json.loads(output)
            if entry.get("present", entry["data"]) and (entry["data"] or image.format != "raw")
        ]


async def is_sound(image: Image) -> bool:
    """
    Whether the tables of a qcow2 image are in order, but for clusters that nobody uses; nothing below it is opened, and nothing
    repaired. Raises OSError, ImageUnreadable, ToolMissing.
    """
    opened = _Files()
    node = {**opened.image(image), "backing": None}
    arguments = ("check", "-q", "--force-share", _source(node))
    code, _output, complaints = await _finished(*arguments, seconds=None, opened=opened.all)
    if code not in (0, 2, 3):  # 2: damaged; 3: leaks; more: it is not known
        raise ImageUnreadable(file=image.file, reason=_first_line(complaints))
    return code != 2


async def create_overlay(file: File, *, size: int, backing: str, backing_format: str, format: str = "qcow2") -> None:
    """
    Make an overlay of `size` bytes whose header names `backing` in this file, without opening the backing image (`-u`).

    qemu-img overwrites whatever is in it. Raises ImageUnreadable, ToolMissing.
    """
    named = ["-b", backing, "-F", backing_format]
    await _run(file.path, "create", "-q", "-u", "-f", format, *named, file.link, str(size), opened=[file])


async def create(file: File, size: int, options: str = "") -> None:
    """
    Make an empty qcow2 of `size` bytes in this file, with `options` as `-o` takes them, in the place of what is in it. Raises
    ImageUnreadable, ToolMissing.
    """
    given = ["-o", options] if options else []
    await _run(file.path, "create", "-q", "-f", "qcow2", *given, file.link, str(size), opened=[file])


async def repoint(file: File, backing: str, backing_format: str) -> None:
    """
    Write another backing name into the qcow2 header of this file, which is open for writing; no backing image is opened.
    Raises ImageUnreadable, ToolMissing.
    """
    named = ["-b", backing, "-F", backing_format]
    await _run(file.path, "rebase", "-u", "-f", "qcow2", *named, file.link, opened=[file])


async def held(images: Sequence[Image]) -> list[Extent]:
    """
    What these images (each standing on the one before) hold between them, written zeroes included, in order.

    What is below them is not opened. Read as `same` reads. Raises ImageUnreadable, ToolMissing.
    """
    return [extent for extent, _depth in await _mapped(images)]


async def held_by(overlay: str) -> list[Extent]:
    """
    What a qcow2 image holds of its own, as `held`; nothing where its header tells that, without asking QEMU.

    Before 6.1 qemu-img does not tell what is not there from zeros that are: then only an image without any table is empty.
    Raises OSError besides.
    """
    return [] if qcow2.is_empty(overlay) else await held([Image(overlay, "qcow2", 0)])


async def shown(images: Sequence[Image]) -> tuple[list[Extent], list[Extent]]:
    """What the last of these images holds itself, and what it shows of the others, as `held` reads."""
    mapped = await _mapped(images)
    return [extent for extent, depth in mapped if depth == 0], [extent for extent, depth in mapped if depth > 0]


async def _mapped(images: Sequence[Image]) -> list[tuple[Extent, int]]:
    """What they hold, each extent with how many images lie above the one that has it."""
    opened = _Files()
    try:
        source = _source(opened.chain(images))
    except OSError as error:
        raise ImageUnreadable(file=images[-1].file, reason=error.strerror or str(error)) from None
    code, output, complaints = await _finished("map", "--output=json", source, seconds=None, opened=opened.all)
    if code != 0:
        raise ImageUnreadable(file=images[-1].file, reason=_first_line(complaints))
    with _understood(images[-1].file):  # `present` came with QEMU 6.1
        return [
            (Extent(int(entry["start"]), int(entry["length"]), zero=bool(entry["zero"])), int(entry["depth"]))
            for entry in json.loads(output)
            if entry.get("present", True)
        ]


async def same(chain: Sequence[Image], other: Sequence[Image]) -> bool:
    """
    Whether a chain (base first) and a lower part of it show the same data all over, as read by another process without locks.

    Holes cost nothing, all else is read. Nobody may write meanwhile, and what was written must be flushed. Raises
    ImageUnreadable when either cannot be opened like that (encrypted, on other networks than NBD), ToolMissing.
    """
    return await differs_at(chain, other) is None


async def differs_at(chain: Sequence[Image], other: Sequence[Image], mask: File | None = None) -> int | None:
    """
    The same, telling at which byte the first difference is; None where there is none. Only what a `mask` (see `masks`) does not
    have is read.
    """
    opened = _Files()
    try:
        sources = [_source(opened.masked(node, mask)) for node in opened.both(chain, other)]
    except OSError as error:
        raise ImageUnreadable(file=chain[-1].file, reason=error.strerror or str(error)) from None
    code, output, complaints = await _finished("compare", *sources, seconds=None, opened=opened.all)
    if code not in (0, 1):  # 1: they differ; more: it is not known
        raise ImageUnreadable(file=chain[-1].file, reason=_first_line(complaints))
    place = re.search(_OFFSET, output)
    return None if code == 0 else int(place[1]) if place is not None else 0


def _source(node: dict[str, object]) -> str:
    """Without blanks, since Linux takes 128 KiB for an argument, which a chain of `walk.DEEPEST` images needs."""
    return f"json:{json.dumps(node, separators=(',', ':'))}"


def _tables(header: Qcow2Header | None) -> dict[str, object]:
    """How to keep the tables of an image that is read from its first byte to its last: in large parts, and few of them."""
    return {} if header is None else {"l2-cache-entry-size": header.table_part, "l2-cache-size": 16 * header.table_part}


class _Files:
    """Chains as blockdevs of files that we have opened, so that qemu-img, which inherits them, opens no name."""

    def __init__(self) -> None:
        self.all: list[File] = []

    def both(self, chain: Sequence[Image], other: Sequence[Image]) -> tuple[dict[str, object], dict[str, object]]:
        """The lower part, and the whole chain. Raises OSError, as the others do."""
        lower = self.chain(other)
        if all(image.has_path for image in other):
            return lower, self.chain(chain)
        # A server may have room for one of us only: so the lower part gets a name, is opened first, and is referred to.
        return {**lower, "node-name": "lower"}, self.chain(chain[len(other) :], "lower")

    def masked(self, node: dict[str, object], mask: File | None) -> dict[str, object]:
        """A chain below a mask, where there is one."""
        if mask is None:
            return node
        self.all.append(mask)
        return {"driver": "qcow2", "file": _opened(mask), "backing": node, **_tables(qcow2.decode(mask.read(512)))}

    def chain(self, images: Sequence[Image], lowest: str | None = None) -> dict[str, object]:
        """
        A chain as one blockdev of explicit nodes, so that nothing is taken from a header or probed but from our own `links`;
        `lowest` is the node that it stands on.

        Below an image only a file can be described anew: QEMU would mix all else with what the header names, so a link stands
        between.
        """
        *below, top = images
        left, since = links.budget(len(images)), 0
        node: dict[str, object] = {}
        for image in below:
            node, since = self._on(image, node or lowest), since + 1
            is_due = not image.has_path or (since >= links.EVERY and left > 0)
            link = links.to(_source(node), image.virtual_size) if is_due else None
            if link is not None:
                self.all.append(link)
                node, since, left = {"driver": "qcow2", "file": _opened(link)}, 0, left - 1
        return self._on(top, node or lowest)

    def _on(self, image: Image, below: dict[str, object] | str | None) -> dict[str, object]:
        node = self.image(image)
        if image.format != "qcow2":
            return node
        header = qcow2.read_of(image) if image.has_path else None
        data = image.data.file if image.data is not None else qcow2.data_in(image, header)
        node.update(_tables(header))
        node["backing"] = below
        return node if data is None else {**node, "data-file": self._file(data)}

    def image(self, image: Image) -> dict[str, object]:
        """
        An image in its file, or in the part of it; it is an error where that is not known.

        As `backing.json_name` has it: below an image QEMU joins what is not simply a file with what the header names.
        """
        file = _nbd(image.file) if image.file.startswith("nbd") else self._file(image.file)
        return backing.node(image, file)

    def _file(self, path: str) -> dict[str, object]:
        file = folder.reading(path)
        self.all.append(file)
        return _opened(file)


def _opened(file: File) -> dict[str, object]:
    return {**backing.storage(file.link), "locking": "off"}


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


@contextlib.contextmanager
def _understood(path: str) -> Iterator[None]:
    """Around what is made of its output. Raises ImageUnreadable where that is not what it says at any other time."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ImageUnreadable(file=path, reason=f"what it says makes no sense ({type(error).__name__})") from None


def _text(entry: Any, key: str) -> str | None:
    return str(entry[key]) if entry.get(key) is not None else None


def _header(entry: Any) -> Header:
    own = entry.get("format-specific", {}).get("data", {})
    return Header(
        file=str(entry["filename"]),
        format=str(entry["format"]),
        virtual_size=int(entry["virtual-size"]),
        backing=_text(entry, "backing-filename"),
        backing_format=_text(entry, "backing-filename-format"),
        open_bitmaps=tuple(str(bitmap["name"]) for bitmap in own.get("bitmaps", ()) if "in-use" in bitmap["flags"]),
        corrupt=bool(own.get("corrupt", False)),
    )


async def _run(path: str, *arguments: str, opened: Sequence[File] = ()) -> bytes:
    """Run on the image at `path` and return what it said."""
    try:
        code, output, complaints = await _finished(*arguments, seconds=SECONDS, opened=opened)
    except TimeoutError:
        raise ImageUnreadable(file=path, reason=f"no answer within {SECONDS:g} s") from None
    if code != 0:
        raise ImageUnreadable(file=path, reason=_first_line(complaints))
    return output


async def _finished(*arguments: str, seconds: float | None, opened: Sequence[File]) -> tuple[int, bytes, bytes]:
    """
    Exit code, stdout and stderr of a program that inherits what is `opened` and does not outlive a cancellation. Raises
    TimeoutError, ToolMissing.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-img",
            *arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[file.descriptor for file in opened],
        )
    except FileNotFoundError:
        raise ToolMissing(program="qemu-img", package="qemu-utils") from None
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        return _CANNOT_RUN, b"", b"the chain is too long to be described to qemu-img"
    try:
        async with asyncio.timeout(seconds):
            output, complaints = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)  # its own kill() may reap it before asyncio does, which complains
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output, complaints


def _first_line(complaints: bytes) -> str:
    text = complaints.decode(errors="backslashreplace").strip()
    return (text.splitlines() or ["no reason given"])[0].removeprefix("qemu-img: ")
