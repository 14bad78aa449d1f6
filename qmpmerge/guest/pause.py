"""
Pause the guest for the milliseconds of a pivot, so that it runs again whatever happens to us.

A dead man's switch is started while the job still copies and costs the guest nothing. A guest that did not run is left as
it is, and a guest that somebody stops later is not ours to resume.
"""

import contextlib
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from qmpmerge import shield
from qmpmerge.errors import NoReply, PauseUnproven, QemuRefused, SessionLost
from qmpmerge.guest import deadman
from qmpmerge.guest.deadman import Switch
from qmpmerge.guest.deadman_child import Undoing
from qmpmerge.qemu import mutex
from qmpmerge.qemu.monitor import Monitor

LIMIT_SECONDS = 30.0
"""How long the guest may stand still if our process hangs."""


@dataclass
class Pause:
    """
    `seconds` is how long the guest was paused by us, None where it was not; known after the block. `is_unguarded`
    says that the guest was to be paused, and was not for want of a switch.

    That the guest stands still is not said here: anybody may let it run again, only QEMU can tell.
    """

    switch: Switch | None = None
    is_unguarded: bool = False
    seconds: float | None = None

    @property
    def has_lapsed(self) -> bool:
        """Whether the switch may have resumed the guest, since we were hanging."""
        return self.switch is not None and self.switch.has_lapsed


def start_switch(monitor: Monitor) -> Switch | None:
    """The switch for a pause to come; None where it cannot be started: then nobody may be paused."""
    with contextlib.suppress(OSError):
        return Switch.start(monitor.descriptor, deadman.qmp("cont"))
    return None


@contextlib.asynccontextmanager
async def paused(monitor: Monitor, switch: Switch | None, *, limit: float = LIMIT_SECONDS) -> AsyncIterator[Pause]:
    """
    Pause a running guest for the block, if `switch` is there. Without it, and where there is no guest (a storage
    daemon), nobody is paused. One pause of a guest at a time, and the next one only when the guest runs again, even if
    we are dead: else somebody could take another's pause for a guest at rest.

    Raises `mutex.NoTurn` before the block when somebody else's pause does not end, PauseUnproven when nobody can say
    whether the guest runs again, whatever the block raised.
    """
    async with mutex.taken(mutex.PAUSE, monitor) as turn:
        if switch is None or not await _is_running(monitor):
            yield Pause()
        elif not await _is_on_duty(switch, limit, turn):
            yield Pause(is_unguarded=True)
        else:
            async with _stopped(monitor, switch) as pause:
                yield pause


@contextlib.asynccontextmanager
async def _stopped(monitor: Monitor, switch: Switch) -> AsyncIterator[Pause]:
    began = time.monotonic()
    pause = Pause(switch)
    try:
        await stop(monitor, switch)
        yield pause
    finally:
        # A signal that comes now waits: between the move and its proof nobody may leave, nor with a guest that stands still.
        await shield.finished(_resume(monitor, switch))
        pause.seconds = time.monotonic() - began


async def stop(monitor: Monitor, switch: Switch) -> None:
    """
    Stop the vCPUs. QEMU waits for the guest's requests, however long its storage takes over them: meanwhile the switch has
    nothing to undo, and hears that we live.
    """
    monitor.has_paused = True
    async with switch.patient():
        await monitor.execute("stop")


async def go_on(monitor: Monitor) -> None:
    """Let the guest run again. Raises what `Monitor.execute` raises."""
    await monitor.execute("cont")
    monitor.has_paused = False


async def _resume(monitor: Monitor, switch: Switch) -> None:
    try:
        await go_on(monitor)
    except SessionLost as error:  # QEMU is gone, and nothing is paused; or it is not: see `Target.reconnect`
        undone = await switch.act()
        if undone not in (Undoing.DONE, Undoing.CLOSED):
            raise PauseUnproven(target=monitor.name, reason=str(error)) from None
        monitor.has_paused = undone is Undoing.CLOSED
    except (NoReply, QemuRefused) as error:
        raise PauseUnproven(target=monitor.name, reason=str(error)) from None
    else:
        switch.dismiss()


async def _is_on_duty(switch: Switch, limit: float, turn: socket.socket) -> bool:
    try:
        await switch.go_on_duty(limit, turn)
    except OSError:
        return False
    return True


async def _is_running(monitor: Monitor) -> bool:
    try:
        return bool((await monitor.execute("query-status"))["running"])
    except QemuRefused as error:
        if error.is_unheard_of:  # there is no guest
            return False
        raise
