"""A client of NBD servers, as far as it takes to see that they answer; and headers read through them."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterable

from qmpmerge.chain.chain import Image
from qmpmerge.errors import ImageUnreadable
from qmpmerge.images import qemuimg
from qmpmerge.images.qemuimg import Header
from qmpmerge.sockets import Address

# docs/interop/nbd.txt of QEMU, and the NBD project's doc/proto.md
_MAGIC = b"NBDMAGICIHAVEOPT"
_FIXED_NEWSTYLE_NO_ZEROES = 3
_OPTION_MAGIC = 0x49484156454F5054
_OPTION_ABORT = 2

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
                connection = await stack.enter_async_context(session(qemuimg.nbd_address(uri)))
                stack.push_async_callback(say_goodbye, *connection)
    except (OSError, EOFError, ValueError):  # OSError: TimeoutError too
        raise ImageUnreadable(file=", ".join(remote), reason="its server lets in nobody but QEMU") from None


async def header(image: Image) -> Header | None:
    """What the header of an image says there; None where nobody can look. Raises ToolMissing."""
    try:
        await see_that_they_answer([image])
        return await qemuimg.info_of(image)
    except ImageUnreadable:
        return None


async def say_goodbye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Leave before an export was chosen: else QEMU complains on its stderr."""
    writer.write(struct.pack(">QII", _OPTION_MAGIC, _OPTION_ABORT, 0))
    while await reader.read(4096):
        pass


@contextlib.asynccontextmanager
async def session(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """
    A connection to an NBD server, greeted, before an export is chosen. Raises OSError, EOFError.

    A server that lets in so many clients does not answer one more.
    """
    if isinstance(address, str):
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        reader, writer = await asyncio.open_connection(*address)
    try:
        if await reader.readexactly(len(_MAGIC)) != _MAGIC:
            raise OSError("not an NBD server")
        await reader.readexactly(2)
        writer.write(struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES))
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
