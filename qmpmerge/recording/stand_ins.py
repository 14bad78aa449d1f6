"""
Empty images in the place of those of a recording: with their formats, sizes and headers, and none of their data.

What is read of images beside what QEMU tells is their headers, so that a look at a chain, the checks of a merge and all that is
said of both are as they were. They are made of what QEMU has told of its nodes, and lie below the folder of the replay.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from qmpmerge.errors import ImageUnreadable
from qmpmerge.folder import File, Folder
from qmpmerge.images import qemuimg
from qmpmerge.processes import holders
from qmpmerge.recording.places import Places
from qmpmerge.recording.script import Script
from qmpmerge.recording.twins import plain
from qmpmerge.value import Value

MOST = 512
"""Images that have one: each takes a qemu-img."""

HEADER_WRITTEN = "job-finalize"
"""The command at which QEMU writes a header: what it tells of the image next is what stands in that."""


COPIED_UP = "block-stream"
"""The command by which an image gets all that lies below it: from then on nothing is missing in its stand-in."""


FULL = "preallocation=metadata,cluster_size=2M"
"""All of an image is there, and zeros: with a table of 4 MiB for a disk of 1 TiB."""

LARGEST_FULL = 16 * 2**40
"""Bytes of an image that is made so."""


class StandIn(Value):
    """An image as QEMU has told it: `backing` as it is written in the header, `node` as it is called for now."""

    node: str
    file: str
    form: str
    size: int
    backing: str | None
    backing_form: str | None


class StandIns:
    """Those of a script. `missing` are the files, as the recording has them, of which none could be made."""

    def __init__(self, script: Script, places: Places) -> None:
        self.missing: list[str] = []
        self._script = script
        self._places = places
        self._made: dict[str, tuple[StandIn, File]] = {}

    async def make(self) -> None:
        """Make those of the beginning, and keep them locked, as QEMU does. Raises ToolMissing."""
        images = self._images()
        self.missing.extend(image.file for image in images[MOST:])
        for image in images[:MOST]:
            try:
                self._made[image.file] = image, await self._create(image)
            except (OSError, ValueError, OverflowError, RecursionError, ImageUnreadable):
                self.missing.append(image.file)

    async def follow(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Do to images what QEMU has done at this command."""
        if command == COPIED_UP:
            await self._fill(str(arguments.get("device")))
        for image in self._images() if command == HEADER_WRITTEN else ():
            was, file = self._made.get(image.file, (image, None))
            if file is not None and (was.backing, was.backing_form) != (image.backing, image.backing_form):
                with contextlib.suppress(ImageUnreadable):
                    await self._repoint(image, file)
                    self._made[image.file] = image, file

    def _images(self) -> list[StandIn]:
        """As QEMU tells them next."""
        nodes = next(self._script.told("query-named-block-nodes"), None)
        told = nodes if isinstance(nodes, list) else []
        images = [image for node in told if (image := _image(node, self._places)) is not None]
        return list({image.file: image for image in images}.values())

    def close(self) -> None:
        """Let go of them."""
        for _, file in self._made.values():
            file.close()

    async def _create(self, image: StandIn) -> File:
        folder, name = os.path.split(self._places.name(image.file))
        os.makedirs(folder, exist_ok=True)
        with Folder(folder) as opened:
            file = opened.create(name)
        if image.form == "raw":
            os.ftruncate(file.descriptor, image.size)
        elif image.backing is None:
            await qemuimg.create(file, image.size)
        else:
            backing = self._places.backing(image.backing, image.file)
            await qemuimg.create_overlay(
                file, size=image.size, backing=backing, backing_format=image.backing_form or "raw"
            )
        holders.lock(file.descriptor)
        return file

    async def _fill(self, node: str) -> None:
        for image, file in self._made.values():
            if image.node == node and image.backing is not None and image.size <= LARGEST_FULL:
                with contextlib.suppress(ImageUnreadable):
                    await qemuimg.create(file, image.size, FULL)
                    await self._repoint(image, file)

    async def _repoint(self, image: StandIn, file: File) -> None:
        backing = self._places.backing(image.backing or "", image.file)
        await qemuimg.repoint(file, backing, image.backing_form or "raw")


def _image(node: Any, places: Places) -> StandIn | None:
    """None for a node that is none, or whose file has no path."""
    try:
        file, told = plain(node["file"]), node["image"]
        backing, form = told.get("backing-filename"), told.get("backing-filename-format")
        size = told["virtual-size"]
    except (KeyError, TypeError, AttributeError):
        return None
    is_text = all(isinstance(text, str) and "\0" not in text for text in (file, backing or "", form or ""))
    if not (is_text and places.is_plain(file) and node.get("drv") in ("raw", "qcow2") and isinstance(size, int)):
        return None
    return StandIn(str(node.get("node-name")), file, node["drv"], size, backing, form)
