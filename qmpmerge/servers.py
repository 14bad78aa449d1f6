"""
Images on NBD servers, seen past QEMU: by another connection, as the next start will see them.
"""

import asyncio
import contextlib
from collections.abc import Iterable

from qmpmerge import durable, qemuimg
from qmpmerge.chain import Image
from qmpmerge.errors import ImageUnreadable
from qmpmerge.qemuimg import Header

SECONDS = 5.0
"""How long a server may take to greet another client."""


async def see_that_they_answer(images: Iterable[Image]) -> None:
    """
    The servers of those that are on one, all at the same time. Raises ImageUnreadable: where one has enough clients, any more
    wait for ever.
    """
    remote = [image.file for image in images if image.file.startswith("nbd")]
    try:
        async with asyncio.timeout(SECONDS), contextlib.AsyncExitStack() as stack:
            for uri in remote:
                connection = await stack.enter_async_context(durable.session(qemuimg.nbd_address(uri)))
                stack.push_async_callback(durable.say_goodbye, *connection)
    except (OSError, EOFError, ValueError):  # OSError: TimeoutError too
        raise ImageUnreadable(file=", ".join(remote), reason="its server lets in nobody but QEMU") from None


async def header(image: Image) -> Header | None:
    """What the header of an image says there; None where nobody can look. Raises ToolMissing."""
    try:
        await see_that_they_answer([image])
        return await qemuimg.info_of(image)
    except ImageUnreadable:
        return None
