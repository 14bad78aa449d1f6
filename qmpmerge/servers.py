"""
Images on NBD servers, seen past QEMU: by another connection, as the next start will see them.
"""

import asyncio
from collections.abc import Iterable

from qmpmerge import durable, qemuimg
from qmpmerge.chain import Image
from qmpmerge.errors import ImageUnreadable
from qmpmerge.qemuimg import Header

SECONDS = 5.0
"""How long a server may take to greet another client."""


async def see_that_they_answer(images: Iterable[Image]) -> None:
    """The servers of those that are on one. Raises ImageUnreadable: one that serves QEMU alone lets others wait for ever."""
    for image in images:
        if not image.file.startswith("nbd"):
            continue
        try:
            async with asyncio.timeout(SECONDS):
                await durable.greet(qemuimg.nbd_address(image.file))
        except (OSError, EOFError, ValueError, TimeoutError):
            raise ImageUnreadable(file=image.file, reason="its server lets in nobody but QEMU") from None


async def header(image: Image) -> Header | None:
    """What the header of an image says there; None where nobody can look. Raises ToolMissing."""
    try:
        await see_that_they_answer([image])
        return await qemuimg.info_of(image)
    except ImageUnreadable:
        return None
