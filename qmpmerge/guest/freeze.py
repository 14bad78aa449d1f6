"""
Freeze the guest's filesystems around a block, with a thaw that cannot be forgotten.

A guest that stays frozen is as bad as one that crashed, so the thaw does not hang on our staying alive: the guardian is
on guard before the freeze.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator

from qmpmerge import shield
from qmpmerge.errors import AgentFailed, FreezeUnproven, ThawUnproven
from qmpmerge.guest import agent
from qmpmerge.guest.freeze_child import Guardian


@contextlib.asynccontextmanager
async def frozen(path: str, *, timeout: float = 10.0, limit: float = 30.0) -> AsyncIterator[int]:
    """
    Freeze the guest's filesystems for the block; yields how many were frozen, which may be 0.

    `path` is the UNIX socket of the agent's channel on the host. `timeout` is for each exchange with the agent; `limit`
    for how long the guest may stay frozen if our process hangs. Seconds both. However the block ends, the guest is
    thawed and the agent asked whether it is; a cancellation that comes during the thaw is taken back, since the block's
    work is done by then.

    Raises AgentFailed before the block when the guest was not frozen, or was frozen by somebody else already (theirs
    is left alone). Raises ThawUnproven, whatever else was raised, when the guest may still be frozen. Raises
    FreezeUnproven after a block that went well when the guest was thawed before its end.
    """
    with _refusing(path):
        connection = await agent.connect(path)
    with connection:
        channel = agent.Channel(connection)
        with _refusing(path):
            if await agent.is_frozen(channel, timeout):
                raise agent.AgentError("somebody else has frozen it already")
            guardian = await Guardian.start(connection, timeout, limit)
        with contextlib.closing(guardian):
            try:
                with _refusing(path):
                    count = await agent.freeze(channel, timeout)
                guardian.guest_is_frozen()
                yield count
            finally:
                held = await shield.finished(_release(path, channel, guardian, timeout))
    if held < count:
        raise FreezeUnproven(agent=path, frozen=count, held=held)


async def _release(path: str, channel: agent.Channel, guardian: Guardian, seconds: float) -> int:
    """Thaw, or have the guardian do it; returns how many filesystems were proved to be frozen until now."""
    if not await guardian.lets_us_thaw():
        await guardian.last_word(seconds)
    try:
        held = await agent.thaw(channel, seconds)
    except agent.AgentError as error:
        reason = str(error)
    else:
        guardian.dismiss()
        return held
    if await guardian.last_word(seconds) is None:
        raise ThawUnproven(agent=path, reason=reason)
    return 0


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    try:
        yield
    except agent.AgentError as error:
        raise AgentFailed(agent=path, reason=str(error)) from None
