"""
The guard's side of `pausing`: a process that lets the guest run again when the one that paused it dies or hangs.

Run as a script, ``python -I -S guard.py LIMIT``, so that it is there in 15 ms: it imports nothing but what it needs, and
nothing of ours. Standard input is the socket to the process that is guarded, standard output is that process's monitor
connection. It reads from the connection only once the other is dead, since two readers would take each other's replies.
"""

import contextlib
import select
import signal
import socket
import sys
import time

ARMED = b"s"  # the guest is about to be stopped: the limit counts from now
DISARMED = b"c"  # it runs again, or was never stopped: what happens to it now is not our doing
READY = b"r"  # the guard is on duty

TICK_SECONDS = 0.02
"""
Between the death and `cont`: what the guest writes then must show in the files' times, which the kernel takes from a
clock that ticks every 1 to 10 ms.
"""
ANSWER_SECONDS = 10.0
TRIES = 6
_ID = b'"qmpmerge-guard"'
_CONT = b'{"execute": "cont", "id": ' + _ID + b"}\n"
# Whoever died may have left half a command: this byte makes QEMU's parser begin anew (docs/interop/qmp-spec).
_BEGIN_ANEW = b"\xff\n"


def guard(control: socket.socket, monitor: socket.socket, limit: float) -> bool:
    """Be on guard until the other end of `control` is gone; False if the guest may stand still. `limit` is in seconds."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control.send(READY)
    armed = False
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([control], [], [], left)[0]:
            deadline = None
            _send(monitor, _CONT)  # it hangs, and will read the answer when it wakes up
            continue
        words = _receive(control)
        if not words:
            break
        armed = words.endswith(ARMED)
        deadline = time.monotonic() + limit if armed else None
    if not armed:
        return True
    time.sleep(TICK_SECONDS)
    return _resume(monitor)


def _resume(monitor: socket.socket) -> bool:
    """Say it until QEMU has done it: a command whose sender has gone is dropped, so the answer is waited for."""
    for _ in range(TRIES):
        _send(monitor, _BEGIN_ANEW + _CONT)
        answer = _answer(monitor)
        if answer is None or b'"return"' in answer:
            return True
    return False


def _answer(monitor: socket.socket) -> bytes | None:
    """The line that answers us; None when QEMU is gone. Empty when there was none in time."""
    deadline, got = time.monotonic() + ANSWER_SECONDS, b""
    while select.select([monitor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        said = _receive(monitor)
        if not said:
            return None
        *lines, got = (got + said).split(b"\n")
        for line in lines:
            if _ID in line:
                return line
    return b""


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except BlockingIOError:
        return b" "  # its flags are the other process's too, which does not block
    except OSError:
        return b""


def _send(monitor: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        select.select([], [monitor], [], ANSWER_SECONDS)
        monitor.send(data)


if __name__ == "__main__":
    sys.exit(0 if guard(socket.socket(fileno=0), socket.socket(fileno=1), float(sys.argv[1])) else 1)
