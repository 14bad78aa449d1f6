"""
Pause the guest for the milliseconds of a pivot, so that it runs again whatever happens to us: our side of `guard`.

The guard is started while the job still copies and costs the guest nothing. It inherits the monitor connection, and sends
`cont` when our end of the control socket goes away, or when we say nothing for longer than a limit. A guest that did not
run is left as it is, and a guest that somebody stops later is not ours to resume.
"""

import asyncio
import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from qmpmerge import shield
from qmpmerge.errors import CommandError, NoReply, PauseUnproven, SessionLost
from qmpmerge.guest import pause_child
from qmpmerge.qemu import mutex
from qmpmerge.qemu.monitor import Monitor

LIMIT_SECONDS = 30.0
"""How long the guest may stand still if our process hangs."""

START_SECONDS = 10.0


@dataclass
class Pause:
    """
    `guest_rests` says that no vCPU runs during the block, because we have stopped them or because they stood still
    before. `milliseconds` is how long the guest was paused by us, None where it was not; known after the block.
    `is_unguarded` says that the guest was to be paused, and was not for want of a guard.
    """

    guest_rests: bool
    is_unguarded: bool = False
    milliseconds: float | None = None


class Guard:
    """A guard on duty. Started early, used once, `end` in every case."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._is_used = False

    @classmethod
    def start(cls, monitor: Monitor, limit: float = LIMIT_SECONDS) -> "Guard | None":
        """None where it cannot be started: then nobody may be paused."""
        control, theirs = socket.socketpair()
        control.setblocking(False)
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable or "python3", "-I", "-S", os.path.abspath(pause_child.__file__), str(limit)],
                    stdin=theirs.fileno(),
                    stdout=monitor.descriptor,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C is for us
                )
        except (OSError, ValueError):
            control.close()
            return None
        return cls(process, control)

    async def is_on_duty(self) -> bool:
        """Whether it is there; asked before the guest is paused."""
        with contextlib.suppress(OSError):  # TimeoutError too
            async with asyncio.timeout(START_SECONDS):
                return await asyncio.get_running_loop().sock_recv(self._control, 1) == pause_child.READY
        return False

    def say(self, word: bytes) -> None:
        """Tell it that the guest is about to be stopped, or runs again; a guard that is gone cannot be told."""
        self._is_used = True
        with contextlib.suppress(OSError):
            self._control.send(word)

    @contextlib.asynccontextmanager
    async def patient(self) -> AsyncIterator[None]:
        """While the block runs the limit counts anew again and again, for as long as our event loop turns."""

        async def beat() -> None:
            while True:
                self.say(pause_child.ARMED)
                await asyncio.sleep(LIMIT_SECONDS / 10)

        beating = asyncio.ensure_future(beat())
        try:
            yield
        finally:
            beating.cancel()

    async def takes_over(self) -> bool:
        """Have it resume the guest, since we could not; whether it could."""
        self.end()
        try:
            return await asyncio.to_thread(self._process.wait, pause_child.TRIES * pause_child.ANSWER_SECONDS) == 0
        except subprocess.TimeoutExpired:
            return False

    def end(self) -> None:
        """Go away: unless it is armed, so does the guard."""
        self._control.close()

    def reap(self) -> None:
        """Wait for its end, so that no zombie is left of it. One that was not needed may still be starting."""
        self.end()
        if not self._is_used:
            self._process.kill()
        if self._process.poll() is None:
            with contextlib.suppress(OSError), os.fdopen(os.pidfd_open(self._process.pid)) as descriptor:
                watch = select.poll()  # which returns at once, while `wait` looks every few milliseconds
                watch.register(descriptor, select.POLLIN)
                watch.poll(START_SECONDS * 1000)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(START_SECONDS)


@contextlib.asynccontextmanager
async def paused(monitor: Monitor, guarded: Guard | None) -> AsyncIterator[Pause]:
    """
    Pause a running guest for the block, if `guarded` is on duty. Without it, and where there is no guest (a storage
    daemon), nobody is paused. One pause of a guest at a time: else somebody could take another's for a guest at rest.

    Raises PauseUnproven when nobody can say whether the guest runs again, whatever the block raised.
    """
    async with mutex.taken(mutex.PAUSE, monitor), _paused(monitor, guarded) as pause:
        yield pause


@contextlib.asynccontextmanager
async def _paused(monitor: Monitor, guarded: Guard | None) -> AsyncIterator[Pause]:
    running = await _is_running(monitor)
    if running is not True or guarded is None:
        yield Pause(guest_rests=running is False)
        return
    if not await guarded.is_on_duty():
        yield Pause(guest_rests=False, is_unguarded=True)
        return
    pause, began = Pause(guest_rests=True), time.monotonic()
    guarded.say(pause_child.ARMED)
    try:
        await monitor.execute("stop")
        yield pause
    finally:
        # A signal that comes now waits: between the move and its proof nobody may leave, nor with a guest that stands still.
        await shield.finished(_resume(monitor, guarded))
        pause.milliseconds = (time.monotonic() - began) * 1000


async def _resume(monitor: Monitor, guarded: Guard) -> None:
    try:
        await monitor.execute("cont")
    except SessionLost as error:  # most likely QEMU is gone, which is fine by the guard too
        if not await guarded.takes_over():
            raise PauseUnproven(target=monitor.name, reason=str(error)) from None
    except (NoReply, CommandError) as error:
        raise PauseUnproven(target=monitor.name, reason=str(error)) from None
    else:
        guarded.say(pause_child.DISARMED)
        guarded.end()


async def _is_running(monitor: Monitor) -> bool | None:
    """None where there is no guest."""
    try:
        return bool((await monitor.execute("query-status"))["running"])
    except CommandError:
        return None
