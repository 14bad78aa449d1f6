"""
A dead man's switch on a monitor connection: QMP commands that are sent when we die. Both its sides.

A process of its own session, which inherits the connection, since a monitor serves one client at a time. It keeps silent
until our end of the control socket is gone, or until we have said nothing for longer than `limit`, and reads from the
connection only once we are dead: two readers would take each other's replies. It is run as a script, so that it is there
in 15 ms, and imports nothing of ours.

Nothing helps when both are killed at once, as ``systemctl kill --signal=KILL`` or the end of a container does; what it
would have undone is then for `doctor` to find.
"""

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence

START_SECONDS = 10.0
ANSWER_SECONDS = 30.0

_READY = b"r"
_NOW = b"n"
_ID = "qmpmerge-deadman"
# Whoever died may have left half a command: this byte makes QEMU's parser begin anew (docs/interop/qmp-spec).
_BEGIN_ANEW = b"\xff\n"

Command = tuple[str, Mapping[str, object]]
"""A QMP command and its arguments, spelled as QEMU spells them."""


# --- our side -----------------------------------------------------------------------------------------------------


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
                with contextlib.suppress(OSError):
                    control.send(_NOW)
                from qmpmerge import shield  # not at the top: the script has nothing of ours

                await shield.finished(asyncio.to_thread(process.wait))
            process.kill()
            process.wait()


def _start(
    control: socket.socket, descriptor: int, commands: Sequence[Command], limit: float | None
) -> "subprocess.Popen[bytes]":
    lines = [json.dumps({"execute": name, "arguments": given, "id": _ID}) for name, given in commands]
    return subprocess.Popen(
        [sys.executable or "python3", "-I", "-S", os.path.abspath(__file__), str(limit or ""), *lines],
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
        if word != _READY:
            process.kill()
            process.wait()
    if word != _READY:
        raise OSError("the guard ended at once")


# --- its side -----------------------------------------------------------------------------------------------------


def guard(control: socket.socket, monitor: socket.socket, limit: float | None, lines: list[str]) -> None:
    """Be the guard, in a process of its own: see this module's docstring."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control.send(_READY)
    said = "".join(line + "\n" for line in lines).encode()
    if not select.select([control], [], [], limit)[0]:
        _send(monitor, said)  # it hangs, and will read the answers when it wakes up
    word = control.recv(1)
    if word == _NOW:
        _send(monitor, said)
    if not word:
        _send(monitor, _BEGIN_ANEW + said)
        _await_answers(monitor, len(lines))


def _send(monitor: socket.socket, data: bytes) -> None:
    """All of it; the connection does not block, since its flags are the other process's too."""
    with contextlib.suppress(OSError):
        while data:
            select.select([], [monitor], [], ANSWER_SECONDS)
            data = data[monitor.send(data) :]


def _await_answers(monitor: socket.socket, count: int) -> None:
    """Stay until QEMU has answered: it drops the commands of a client that has gone."""
    deadline, got = time.monotonic() + ANSWER_SECONDS, b""
    with contextlib.suppress(OSError):
        while (
            got.count(_ID.encode()) < count and select.select([monitor], [], [], max(0, deadline - time.monotonic()))[0]
        ):
            said = monitor.recv(65536)
            if not said:
                return
            got += said


if __name__ == "__main__":
    guard(
        socket.socket(fileno=0),
        socket.socket(fileno=1),
        float(sys.argv[1]) if sys.argv[1] else None,
        sys.argv[2:],
    )
