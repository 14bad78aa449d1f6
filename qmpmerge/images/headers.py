"""
What the images' own headers say, next to what QEMU says.

The running QEMU keeps its chain in memory; the next start reads the headers. Where the two differ, the next start shows
another disk.
"""

import os
import stat
from dataclasses import replace

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.errors import ImageUnreadable
from qmpmerge.images import qcow2, qemuimg
from qmpmerge.images.qemuimg import Header
from qmpmerge.value import Value


class Oddity(Value):
    """Something about an image that deserves a look: `name` is a refusal's name where a merge would be refused."""

    name: str
    file: str
    message: str


async def read(chain: Chain) -> tuple[Header | None, ...]:
    """
    The header of every image of the chain, base first; None for an image without a path, or one we cannot read.

    Each is read alone, those of qcow2 by ourselves: what a header names is not opened, and no format guessed. Raises
    ToolMissing.
    """
    return tuple([await _read_alone(image) for image in chain])


async def _read_alone(image: Image) -> Header | None:
    """The header of one image, without opening the data file or anything else that it may name."""
    if not image.has_path or image.is_renamed:
        return None
    try:
        if image.format == "raw":
            return Header(image.file, "raw", image.virtual_size, None, None) if os.access(image.file, os.R_OK) else None
        if image.format != "qcow2":
            return await _info(image) if _is_regular(image.file) else None
        own = qcow2.read_of(image)
    except (ImageUnreadable, OSError):
        return None
    return Header(image.file, "qcow2", own.virtual_size, own.backing, own.backing_format) if own else None


def as_read(image: Image) -> dict[str, object]:
    """All that the header of one image says by itself; of what is no qcow2 file, what is known of the image."""
    if image.format != "qcow2" or not image.has_path:
        known = {"format": image.format, "virtual_size": image.virtual_size}
        return {**known, "backing": image.backing, "backing_format": image.backing_format}
    try:
        own = qcow2.read_of(image)
    except OSError as error:
        return {"format": image.format, "problem": error.strerror or str(error)}
    return {"format": image.format, **(vars(own) if own is not None else {"problem": "it is no qcow2 image"})}


async def _info(image: Image) -> Header:
    return await (qemuimg.info(image.file, image.format) if image.slice is None else qemuimg.info_of(image))


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def oddities(chain: Chain, found: tuple[Header | None, ...]) -> list[Oddity]:
    """Where headers and graph disagree, base first."""
    odd: list[Oddity] = []
    below: Image | None = None
    for image, header in zip(chain, found, strict=True):
        if image.is_elsewhere:
            odd.append(
                Oddity("not-seen", image.file, "where QEMU has this file from cannot be told: nothing is known of it")
            )
        elif image.is_renamed:
            message = "its name leads to another image of the chain than the one that QEMU opened by it"
            odd.append(Oddity("replaced", image.file, message))
        elif header is None and image.has_path:
            message = "its header cannot be read: does the file still exist, and may you read it?"
            odd.append(Oddity("unreadable", image.file, message))
        elif header is not None:
            odd.extend(_compare(image, header, below))
        below = image
    return odd


def _compare(image: Image, header: Header, below: Image | None) -> list[Oddity]:
    odd = []
    if below is None:
        if header.backing is not None:
            message = f"its header names the backing file {header.backing}, which QEMU does not use"
            odd.append(Oddity("disagrees", image.file, message))
        return odd
    if header.backing is None:
        odd.append(Oddity("disagrees", image.file, f"its header names no backing file, QEMU uses {below.label}"))
    elif (leads := backing.leads_to(image, header.backing, below)) is False:
        message = f"its header names the backing file {header.backing}, QEMU uses {below.label}"
        odd.append(Oddity("disagrees", image.file, message))
    elif leads is None and below.slice is not None and backing.is_path(header.backing):
        message = f"its header names the whole of {header.backing}, QEMU uses {below.slice}"
        odd.append(Oddity("part-of-file", image.file, message))
    elif header.backing_format is None:
        message = "its header records no backing format: QEMU will guess it, and a guest can mislead the guess"
        odd.append(Oddity("no-format", image.file, message))
    return odd


def as_written(chain: Chain, found: tuple[Header | None, ...]) -> Chain:
    """The chain with the backing strings that stand in the headers now, where they could be read."""
    images = [
        image if header is None else replace(image, backing=header.backing, backing_format=header.backing_format)
        for image, header in zip(chain, found, strict=True)
    ]
    return Chain(tuple(images))
