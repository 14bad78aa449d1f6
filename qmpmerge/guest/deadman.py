"""
The dead man's switch: what must be undone when we die (a paused guest, frozen filesystems, throttled writes) is undone.

A process of its own session that shares our connection to QEMU's monitor or to the guest's agent, since both serve one
client at a time. It acts when we are gone, and when we say nothing for longer than a limit. `deadman_child` is what it
runs; the words between us are explained there.

    switch = Switch.start(descriptor, qmp("cont"))   # early: it takes 15 ms, and costs nobody anything
    await switch.go_on_duty(limit, turn)             # before anything is done that it must undo
    ...
    switch.dismiss()                                 # we have undone it ourselves

Nothing helps when both are killed at once, as ``systemctl kill --signal=KILL`` or the end of a container does; what it
would have undone is then for `doctor` to find.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator

from qmpmerge import shield
from qmpmerge.guest import deadman_child
from qmpmerge.guest.deadman_child import Duty, Undoing
from qmpmerge.value import Value

NEVER = float("inf")

REPLY_SECONDS = 10.0
"""How long we wait for its word; it may still be starting."""

AGAIN_SECONDS = 5.0
"""After how long a request is sent again that was read and not answered: an agent may have been started anew."""

UNDO_SECONDS = 60.0
"""How long we wait for it to have undone something; it goes on without us."""


class Undo(Value):
    """
    A request that undoes what we do; to make it twice must do no harm.

    Its answer is complete with a line that contains `end`, and it was done if that line is no error and `done` has come
    by then.
    """

    request: str
    end: str
    done: str


def qmp(command: str, **arguments: object) -> Undo:
    """A QMP command, its arguments spelled as QEMU spells them."""
    name = f"qmpmerge-deadman-{os.urandom(4).hex()}"  # a monitor may have two switches
    return Undo(json.dumps({"execute": command, "arguments": arguments, "id": name}) + "\n", f'"{name}"', name)


class Switch:
    """A switch that was started. Used once; `close` it in every case."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._is_armed = False
        self._limit = self._deadline = NEVER
        self._has_lapsed = False

    @classmethod
    def start(cls, descriptor: int, undo: Undo) -> "Switch":
        """Start it on the connection `descriptor`. Raises OSError."""
        if descriptor < 0:
            raise OSError(errno.EBADF, "the connection is closed")
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        try:
            with theirs:
                return cls(_spawn(theirs, descriptor, undo), control)
        except OSError:
            control.close()
            raise

    async def go_on_duty(self, limit: float = NEVER, turn: socket.socket | None = None) -> None:
        """
        Arm it and see that it is there; from now on we may do what it is to undo.

        It keeps `turn`, if given, until it ends, so that nobody has it before all is undone. Raises OSError when it does
        not answer.
        """
        self.arm(limit, turn)
        state = Duty.GONE
        try:
            state = await self.state()
        finally:
            if state is not Duty.ARMED:
                self.dismiss()
        if state is not Duty.ARMED:
            raise OSError("it does not answer" if state is Duty.GONE else "it was late")

    def arm(self, limit: float, turn: socket.socket | None = None) -> None:
        """From now on it waits `limit` seconds for a word of ours; where it is gone nobody is told."""
        self._has_lapsed = self.has_lapsed
        self._is_armed, self._limit = True, limit
        self._deadline = time.monotonic() + limit  # a little before its own
        self._send(deadman_child.ARM + str(limit).encode(), turn)

    @property
    def has_lapsed(self) -> bool:
        """Whether we were silent for so long that it may have acted: then what it undoes may be undone already."""
        return self._has_lapsed or time.monotonic() >= self._deadline

    async def state(self) -> Duty:
        """Ask it. It acts between our words only: what it has sent by the answer it has sent wholly."""
        self._send(deadman_child.ASK)
        with contextlib.suppress(OSError):  # TimeoutError too
            async with asyncio.timeout(REPLY_SECONDS):
                return Duty(await asyncio.get_running_loop().sock_recv(self._control, 64))
        return Duty.GONE

    @contextlib.asynccontextmanager
    async def patient(self) -> AsyncIterator[None]:
        """While the block runs the limit of an armed one counts anew again and again, as long as our event loop turns."""

        async def beat() -> None:
            while self._is_armed:
                self.arm(self._limit)
                await asyncio.sleep(self._limit / 10)

        beating = asyncio.ensure_future(beat())
        try:
            yield
        finally:
            beating.cancel()

    async def act(self, seconds: float = UNDO_SECONDS) -> Undoing:
        """
        Have it undo what we could not, and wait for that; after `seconds` it goes on without us.

        It reads from the connection now. Where our own session still does, its reply may be lost to us: it asks again.
        """
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = await asyncio.to_thread(self._process.wait, seconds)
            return Undoing(status) if status >= 0 else Undoing.NONE
        return Undoing.NONE

    def dismiss(self) -> None:
        """There is nothing to undo (any more). Takes a millisecond; then the connection and the turn are ours alone."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Go away: what it is armed for it undoes now, and is waited for a little; one that is not armed is dismissed."""
        if not self._is_armed:
            self.dismiss()
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(REPLY_SECONDS)

    def _send(self, word: bytes, turn: socket.socket | None = None) -> None:
        with contextlib.suppress(OSError):
            socket.send_fds(self._control, [word], [turn.fileno()] if turn is not None else [])


def _spawn(control: socket.socket, descriptor: int, undo: Undo) -> "subprocess.Popen[bytes]":
    script = os.path.abspath(deadman_child.__file__)
    return subprocess.Popen(
        [sys.executable or "python3", "-I", "-S", script, str(AGAIN_SECONDS), undo.request, undo.end, undo.done],
        stdin=control.fileno(),
        stdout=descriptor,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for us
    )


@contextlib.asynccontextmanager
async def armed(
    descriptor: int, undo: Undo, *, limit: float = NEVER, turn: socket.socket | None = None
) -> AsyncIterator[Switch]:
    """
    A switch that is on duty while the block runs.

    At the end of the block it acts, unless we have undone by ourselves what is to be undone, and dismissed it. Raises
    OSError before the block when there is none.
    """
    switch = Switch.start(descriptor, undo)
    await switch.go_on_duty(limit, turn)
    try:
        yield switch
    finally:
        await shield.finished(switch.act())
