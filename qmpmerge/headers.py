"""
What the images' own headers say, next to what QEMU says.

The running QEMU keeps its chain in memory; the next start reads the headers. Where the two differ, the next start shows
another disk.
"""

import asyncio
import os
import stat
from dataclasses import dataclass, replace

from qmpmerge import qemuimg
from qmpmerge.chain import Chain, Image
from qmpmerge.errors import ImageUnreadable
from qmpmerge.qemuimg import Header

AT_ONCE = 4


@dataclass(frozen=True)
class Oddity:
    """Something about an image that deserves a look: `name` is a refusal's name where a merge would be refused."""

    name: str
    file: str
    message: str


async def read(chain: Chain) -> tuple[Header | None, ...]:
    """
    The header of every image of the chain, base first; None for an image without a path, or one we cannot read.

    One qemu-img reads them all where QEMU's own idea of the backing names shows that they lead nowhere else; else each
    image is read alone, since qemu-img opens whatever a header names. Raises ToolMissing.
    """
    if all(image.has_path for image in chain) and _names_are_harmless(chain):
        try:
            found = await qemuimg.chain_info(chain.active.file, chain.active.format)
        except ImageUnreadable:
            found = []
        if len(found) == len(chain):
            return tuple(found)
    at_once = asyncio.Semaphore(AT_ONCE)

    async def one(image: Image) -> Header | None:
        async with at_once:
            try:
                return await qemuimg.info(image.file, image.format) if image.has_path else None
            except ImageUnreadable:
                return None

    return tuple(await asyncio.gather(*map(one, chain)))


def _names_are_harmless(chain: Chain) -> bool:
    """Whether every backing name, as QEMU read it, leads to the regular file below."""
    for below, image in zip(chain.images, chain.images[1:], strict=False):
        if image.backing is None or leads_to(image, image.backing, below) is not True:
            return False
    return all(_is_regular(image.file) for image in chain)


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def leads_to(image: Image, backing: str, target: Image) -> bool | None:
    """
    Whether the string `backing` in the header of `image` leads to `target`; None where it cannot be told.

    A relative name may lead there from the folder of the name that QEMU opened, or from the folder of the real file.
    """
    if not target.has_path:
        return True if backing == target.file else None
    if backing.startswith("json:") or "://" in backing:
        return None
    return any(leads_from(folder, backing, target) for folder in folders(image))


def folders(image: Image) -> tuple[str, ...]:
    """The folders from which a relative name in the image's header may be resolved; two where it is a symlink."""
    return tuple(dict.fromkeys((os.path.dirname(image.file), os.path.dirname(os.path.realpath(image.file)))))


def leads_from(folder: str, backing: str, target: Image) -> bool:
    """Whether the path `backing`, resolved from `folder`, is `target`."""
    return target.is_file(os.path.join(folder, backing.removeprefix("file:")))


def oddities(chain: Chain, found: tuple[Header | None, ...]) -> list[Oddity]:
    """Where headers and graph disagree, base first."""
    odd: list[Oddity] = []
    below: Image | None = None
    for image, header in zip(chain, found, strict=True):
        if header is None and image.has_path:
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
        odd.append(Oddity("disagrees", image.file, f"its header names no backing file, QEMU uses {below.file}"))
    elif leads_to(image, header.backing, below) is False:
        message = f"its header names the backing file {header.backing}, QEMU uses {below.file}"
        odd.append(Oddity("disagrees", image.file, message))
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
