"""
A dead man's switch on a monitor connection: QMP commands that are sent when we die.

A process of its own session, which inherits the connection, since a monitor serves one client at a time. It keeps silent
until our end of the control socket is gone, or until we have said nothing for longer than `limit`, and reads from the
connection only once we are dead: two readers would take each other's replies. `lastwill` is what it runs.

Nothing helps when both are killed at once, as ``systemctl kill --signal=KILL`` or the end of a container does; what it
would have undone is then for `doctor` to find.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence

from qmpmerge import shield
from qmpmerge.guest import deadman_child

START_SECONDS = 10.0

Command = tuple[str, Mapping[str, object]]
"""A QMP command and its arguments, spelled as QEMU spells them."""


class Switch:
    """The switch while it is armed."""

    disarmed = False

    def disarm(self) -> None:
        """What it would do is done, or need not be done any more."""
        self.disarmed = True


@contextlib.asynccontextmanager
async def armed(descriptor: int, commands: Sequence[Command], *, limit: float | None = None) -> AsyncIterator["Switch"]:
    """
    While the block runs, our death sends `commands` on the monitor connection `descriptor`, and so do `limit` seconds.

    They are also sent at the end of the block, unless we have done by ourselves what they do and said `disarm`; to do it
    twice must do no harm. Raises OSError when the process cannot be started.
    """
    control, theirs = socket.socketpair()
    control.setblocking(False)
    with control:
        with theirs:
            process = _start(theirs, descriptor, commands, limit)
        await _see_ready(control, process)
        switch = Switch()
        try:
            yield switch
        finally:
            if not switch.disarmed:
                control.close()
                await shield.finished(asyncio.to_thread(process.wait))
            process.kill()
            process.wait()


def _start(
    control: socket.socket, descriptor: int, commands: Sequence[Command], limit: float | None
) -> "subprocess.Popen[bytes]":
    lines = [json.dumps({"execute": name, "arguments": given, "id": deadman_child.ID}) for name, given in commands]
    return subprocess.Popen(
        [sys.executable or "python3", "-I", "-S", os.path.abspath(deadman_child.__file__), str(limit or ""), *lines],
        stdin=control.fileno(),
        stdout=descriptor,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for us
    )


async def _see_ready(control: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    word = b""
    try:
        async with asyncio.timeout(START_SECONDS):
            word = await asyncio.get_running_loop().sock_recv(control, 1)
    finally:
        if word != deadman_child.READY:
            process.kill()
            process.wait()
    if word != deadman_child.READY:
        raise OSError("the guard ended at once")
