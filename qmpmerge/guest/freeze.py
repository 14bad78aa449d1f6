"""
Freeze the guest's filesystems around a block, with a thaw that cannot be forgotten.

A guest that stays frozen is as bad as one that crashed, so the thaw does not hang on our staying alive: a dead man's switch
is on duty before the freeze. The agent runs commands in their order, so where the switch has asked for a thaw in our
place, because we were hanging, ours comes after it and finds nothing frozen.
"""

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator

from qmpmerge import shield
from qmpmerge.errors import AgentFailed, FreezeUnproven, ThawUnproven
from qmpmerge.guest import agent
from qmpmerge.guest.deadman import Switch, Undo
from qmpmerge.guest.deadman_child import Undoing


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
            switch = await _on_duty(connection, timeout + limit)
        try:
            with _refusing(path):
                count = await agent.freeze(channel, timeout)
            switch.arm(limit)
            yield count
        finally:
            held = await shield.finished(_release(path, channel, switch, seconds=timeout))
    if held < count:
        raise FreezeUnproven(agent=path, frozen=count, held=held)


async def _on_duty(connection: socket.socket, limit: float) -> Switch:
    try:
        switch = Switch.start(connection.fileno(), _thaw())
        await switch.go_on_duty(limit)
    except OSError as error:
        raise agent.AgentError(f"the dead man's switch did not start: {error.strerror or error}") from None
    return switch


def _thaw() -> Undo:
    """The thaw and its proof; the mark comes back when both were answered, for the agent's replies bear no names."""
    mark = int.from_bytes(os.urandom(6), "big")
    commands: list[dict[str, object]] = [{"execute": "guest-fsfreeze-thaw"}, {"execute": "guest-fsfreeze-status"}]
    commands += [{"execute": "guest-sync-delimited", "arguments": {"id": mark}}]
    return Undo("".join(json.dumps(command) + "\n" for command in commands), str(mark), '"thawed"')


async def _release(path: str, channel: agent.Channel, switch: Switch, *, seconds: float) -> int:
    """Thaw, or have the switch do it; returns how many filesystems were proved to be frozen until now."""
    switch.arm(2 * seconds)
    await switch.state()  # what it has sent by now it has sent wholly, so ours does not get into its middle
    try:
        held = await agent.thaw(channel, seconds)
    except agent.AgentError as error:
        reason = str(error)
    else:
        switch.dismiss()
        return held
    if await switch.act() is not Undoing.DONE:
        raise ThawUnproven(agent=path, reason=reason)
    return 0


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    try:
        yield
    except agent.AgentError as error:
        raise AgentFailed(agent=path, reason=str(error)) from None
