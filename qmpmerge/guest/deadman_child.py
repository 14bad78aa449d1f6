"""
The other side of `deadman`: the process that sends what is to be sent when we are dead.

Run as a script, ``python -I -S lastwill.py LIMIT LINE...``, so that it is there at once: it imports nothing but what it
needs, and nothing of ours. Standard input is the socket to the process that is guarded, standard output is that process's
monitor connection.
"""

import contextlib
import select
import signal
import socket
import sys
import time

READY = b"r"
ID = "qmpmerge-deadman"
ANSWER_SECONDS = 30.0

# Whoever died may have left half a command: this byte makes QEMU's parser begin anew (docs/interop/qmp-spec).
_BEGIN_ANEW = b"\xff\n"


def guard(control: socket.socket, monitor: socket.socket, limit: float | None, lines: list[str]) -> None:
    """Be on guard until the other end of `control` is gone; `limit` is in seconds, `lines` are what is sent then."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control.send(READY)
    said = "".join(line + "\n" for line in lines).encode()
    if not select.select([control], [], [], limit)[0]:
        _send(monitor, said)  # it hangs, and will read the answers when it wakes up
    control.recv(1)  # nobody says anything: it returns when the other is gone
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
        while got.count(ID.encode()) < count:
            if not select.select([monitor], [], [], max(0, deadline - time.monotonic()))[0]:
                return
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
