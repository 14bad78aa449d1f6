"""
The nodes of a chain in a storage daemon of our own, base first, named ``layer1`` and up, and which files it has open for them.

The daemon opens by name, so what it has open is compared with what the walk has approved, before anything is made of it,
and once more when the images that are to be written are open for that. A node of a file that another node was made with
is opened again by name whenever that is (7.2 to 11.1), one that was there before is not; with `auto-read-only` it is opened
again when somebody first writes. So files have nodes of their own, and no job opens a name: test_offline pins it.
"""

import asyncio
import contextlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from qmpmerge.chain import backing
from qmpmerge.errors import ImageUnreadable, InUse, NeedsSecret, NotSeen, QemuRefused, Replaced
from qmpmerge.images.walk import Layer
from qmpmerge.processes import proc
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.targets import identity
from qmpmerge.value import Value

AGAIN_SECONDS = (0.01, 0.1)
"""After which what the daemon has open is looked at again where it is not what it should be."""

SECRET = "qmpmerge-secret"  # noqa: S105 - the id of the object, not the passphrase


class Named(Value):
    """An image, its `node`, and the `name` by which the daemon opens its file."""

    layer: Layer
    node: str
    name: str


def folder_of(layers: Sequence[Layer]) -> str:
    """Where the daemon is to be started: the folder in which most of the relative names in these headers begin."""
    begins = Counter(os.path.dirname(layer.file) for layer in layers if backing.is_relative(layer.backing))
    return begins.most_common(1)[0][0] if begins else os.path.dirname(layers[-1].file)


def named(layers: Sequence[Layer], folder: str) -> list[Named]:
    """
    The images, each by the very name that the header above has for it where that leads there from `folder`, the daemon's.

    QEMU compares the two as strings (bdrv_backing_overridden in block.c). Where they differ, it calls the image above, and
    every one from there up, by a ``json:`` name with all in it that lies below, and makes these names anew at each question: at
    200 images 3.5 s instead of 0.1.
    """
    names = [_name(below, above, folder) for below, above in itertools.pairwise(layers)]
    return [
        Named(layer, f"layer{number}", name)
        for number, (layer, name) in enumerate(zip(layers, [*names, layers[-1].file], strict=True), 1)
    ]


def _name(layer: Layer, above: Layer, folder: str) -> str:
    told = above.backing or ""
    begins_here = os.path.dirname(above.file) == folder and backing.is_relative(told)
    return told if begins_here or told.startswith("/") else layer.file


async def add(session: Monitor, images: Sequence[Named], *, write: bool, dry_run: bool, secret: str | None) -> None:
    """
    Have all images opened; the active one alone for writing. Raises InUse, ImageUnreadable, NeedsSecret, Replaced, NotSeen.
    """
    encrypted = next((image.layer for image in images if image.layer.encrypted), None)
    if encrypted is not None:
        if secret is None:
            raise NeedsSecret(image=encrypted.file)
        await session.execute("object-add", qom_type="secret", id=SECRET, data=secret)
    active = None if dry_run or not write else images[-1]
    nodes = [
        (image.layer, node)
        for below, image in zip([None, *images[:-1]], images, strict=True)
        for node in [
            *files(image, write=write, now=write and image is images[-1]),
            _image(image, below, write=write, writable=image is active),
        ]
    ]
    replies = await session.execute_all([("blockdev-add", node) for _layer, node in nodes])
    for (layer, _node), reply in zip(nodes, replies, strict=True):
        if isinstance(reply, QemuRefused):
            if re.search(r"Failed to get .*lock", reply.reason):
                raise InUse(file=layer.file, holders=["another process"], command="end it, or wait")
            raise ImageUnreadable(file=layer.file, reason=reply.reason)
    layers = [image.layer for image in images]
    await see_approved(session, layers, layers)


async def see_approved(session: Monitor, approved: Sequence[Layer], needed: Sequence[Layer]) -> None:
    """
    The daemon has open what is needed, and nothing but what was approved; it keeps what it has opened by a name, while
    libraries open files of their own for a moment. Raises Replaced, NotSeen, SessionLost.
    """
    for seconds in AGAIN_SECONDS:
        with contextlib.suppress(Replaced, NotSeen):
            _see(session.pid, approved, needed)
            return
        await asyncio.sleep(seconds)
    await session.execute("query-version")  # a daemon that has ended has nothing open
    _see(session.pid, approved, needed)


def _see(pid: int | None, approved: Sequence[Layer], needed: Sequence[Layer]) -> None:
    opened = proc.open_inodes(pid) if pid is not None else set()
    files = [layer.file for layer in needed]
    if not opened:
        cure = "make the program readable for those who run it: the kernel hides what others have open"
        raise NotSeen(unseen=files, reason="what the storage daemon has open is not shown", cure=cure)
    unknown = opened - {inode for layer in approved for inode in layer.inodes}
    missing = [layer.file for layer in needed if not layer.inodes <= opened]
    if pid is not None and (unknown or missing):
        instead = [link for found, link in proc.open_links(pid).items() if found[1:] in unknown]
        raise identity.swapped((missing or files)[-1], next(iter(instead), None))


def reopened(images: Sequence[Named]) -> Iterator[dict[str, Any]]:
    """The nodes of these images' files, open for writing."""
    for image in images:
        yield from (node for node in files(image, write=True, now=True) if "filename" in node)


def files(image: Named, *, write: bool, now: bool) -> list[dict[str, Any]]:
    """The nodes of an image's file, or of the part of it, and of its data; `now` opens them for writing at once."""
    layer = image.layer
    file = _file(image.name, f"{image.node}-file", is_device=layer.is_device, write=write, now=now)
    nodes = [file]
    if layer.slice is not None:
        more = {"node-name": f"{image.node}-part", "read-only": not write, "auto-read-only": True, "discard": "unmap"}
        nodes.append(
            {**backing.part(layer.slice, file["node-name"]), **more, **({} if write else {"force-share": True})}
        )
    if layer.data_file is not None:
        nodes.append(_file(layer.data_file, f"{image.node}-data", write=write, now=now))
    return nodes


def _image(image: Named, below: Named | None, *, write: bool, writable: bool) -> dict[str, Any]:
    """An image's node on those of its files."""
    layer, node = image.layer, image.node
    options: dict[str, Any] = {
        "driver": layer.format,
        "node-name": node,
        "read-only": not writable,
        "discard": "unmap",
        "file": f"{node}-file" if layer.slice is None else f"{node}-part",
        **_key(layer),
    }
    if layer.format == "qcow2":
        options["backing"] = below.node if below is not None else None
        options["l2-cache-entry-size"] = layer.table_part  # jobs read whole tables: see `qcow2.TABLE_PART`
    if layer.data_file is not None:
        options["data-file"] = f"{node}-data"
    if not write:
        options["force-share"] = True
    return options


def _file(file: str, node: str, *, is_device: bool = False, write: bool, now: bool) -> dict[str, Any]:
    """
    The node of the file, by threads through the host's cache, which is QEMU's default.

    io_uring is no faster for certain on two processors, and the one of QEMU 7.2 and 10.0 hangs on compressed clusters;
    past the cache (`cache.direct`) a merge takes twice as long.
    """
    return {
        "driver": "host_device" if is_device else "file",
        "node-name": node,
        "filename": file,
        "read-only": not write,
        "auto-read-only": not now,
        "discard": "unmap",
        # A reader takes no locks: while an image is merged not even `force-share` would let it in.
        **({} if write else {"force-share": True, "locking": "off"}),
    }


def _key(layer: Layer) -> dict[str, Any]:
    if not layer.encrypted:
        return {}
    return {"key-secret": SECRET} if layer.format == "luks" else {"encrypt": {"format": "luks", "key-secret": SECRET}}
