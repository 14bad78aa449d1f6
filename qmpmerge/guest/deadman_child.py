"""
The process behind `deadman`: it sends a request on a shared connection when the tool is gone, or hangs for too long.

Run as a script, ``python -I -S deadman_child.py AGAIN REQUEST END DONE``, so that it is there in 15 ms: it imports little,
and nothing of ours. Standard input is the control socket, which keeps messages apart; standard output is the connection.

    tool    ARM, limit   undo when I am gone, or not heard of for `limit` seconds from now; sent again, they count anew.
                         A descriptor that comes along (the tool's turn) is kept open until this process ends
    tool    ASK          where do you stand?
    child   a Duty       the answer to ASK

While the tool lives only it reads from the connection, for two readers would take each other's replies. Once it is gone
the child reads, and stays until the other side (QEMU, or the guest's agent) has answered or closed the connection: the
commands of a client that has gone are dropped unread.
"""

import contextlib
import enum
import fcntl
import select
import signal
import socket
import sys
import termios
import time

ARM = b"a"

ASK = b"?"


class Duty(enum.Enum):
    """What the child has to do while the tool lives, and what it answers to ASK."""

    IDLE = b"i"
    """Nothing is to be undone: it ends with the tool."""
    ARMED = b"r"
    """It acts when the tool is gone or the limit has passed."""
    ACTED = b"x"
    """The limit has passed and the request was sent; when the tool is gone too, it sees to it that it was answered."""
    GONE = b""
    """Never said: the child has ended or is silent."""


class Undoing(enum.IntEnum):
    """What came of the request; the exit status of the process."""

    DONE = 0
    REFUSED = 1
    CLOSED = 2
    """By the other side: QEMU is gone, most likely."""
    NONE = 3
    """Not yet, or the process was killed."""


TRIES = 5
"""How often a request that is refused is made."""

REFUSED_SECONDS = 0.2

TICK_SECONDS = 0.02
"""
Between the tool's end and the request: what a guest writes once it runs again must show in the files' times, which the
kernel takes from a clock that ticks every 1 to 10 ms.
"""

_NEVER = float("inf")

_LONGEST_WAIT = 3600.0

_KEPT = 64 * 1024

# Who has gone may have left half a command: this byte makes the parser begin anew (QEMU's docs/interop/qmp-spec).
_BEGIN_ANEW = b"\xff\n"


class UndoRequest:
    """
    What undoes it, and how its answer is known.

    The answer is complete with a line that contains `end`. The request was done if that line is no error and `done` has
    come by then.
    """

    def __init__(self, connection: socket.socket, *words: bytes) -> None:
        self._connection = connection
        self._request, self._end, self._done = words
        self._received = b""

    def send(self, *, first: bytes = b"") -> None:
        """All of it; the connection does not block, since its flags are the tool's too."""
        rest = first + self._request
        with contextlib.suppress(OSError):
            while rest:
                select.select([], [self._connection], [])
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self._connection.send(rest) :]

    def see_it_done(self, again: float, *, was_sent: bool) -> Undoing:
        """Send it until it is answered or the connection is closed; `again` is the seconds between two tries."""
        answer, refusals = self._answer(0) if was_sent else Undoing.NONE, 0
        while answer is Undoing.NONE or (answer is Undoing.REFUSED and refusals < TRIES):
            if not was_sent or self._is_read():  # a QEMU that hangs gets it once
                self.send(first=_BEGIN_ANEW)
            was_sent = True
            answer = self._answer(again)
            if answer is Undoing.REFUSED:
                refusals += 1
                time.sleep(REFUSED_SECONDS)
        return answer

    def _is_read(self) -> bool:
        """Whether the other side has read all that was sent."""
        return not any(fcntl.ioctl(self._connection, termios.TIOCOUTQ, bytes(4)))

    def _answer(self, seconds: float) -> Undoing:
        """What comes in the next `seconds`."""
        deadline = time.monotonic() + seconds
        while select.select([self._connection], [], [], max(0.0, deadline - time.monotonic()))[0]:
            with contextlib.suppress(BlockingIOError):
                received = _receive(self._connection)
                if not received:
                    return Undoing.CLOSED
                self._received = self._received[-_KEPT:] + received
            before, end, after = self._received.partition(self._end)
            if end and b"\n" in after:
                return self._judge(before, after)
        return Undoing.NONE

    def _judge(self, before: bytes, after: bytes) -> Undoing:
        rest_of_line, _, self._received = after.partition(b"\n")
        is_error = b'"error"' in before.rpartition(b"\n")[2] + rest_of_line
        return Undoing.DONE if self._done in before + self._end and not is_error else Undoing.REFUSED


def watch(control: socket.socket, request: UndoRequest) -> Duty:
    """Return when the tool is gone; send the request where it is not heard of for longer than its limit."""
    state, deadline = Duty.IDLE, _NEVER
    while True:
        left = deadline - time.monotonic()
        if select.select([control], [], [], max(0.0, min(left, _LONGEST_WAIT)))[0]:
            word = _receive(control)
            if not word:
                return state
            if word == ASK:
                _reply(control, state)
            else:
                state = Duty.ACTED if state is Duty.ACTED else Duty.ARMED
                deadline = time.monotonic() + float(word.removeprefix(ARM))
        elif left <= 0:
            request.send()  # without a reset of the parser, over which the tool would lose its session
            state, deadline = Duty.ACTED, _NEVER


def _receive(connection: socket.socket) -> bytes:
    """What has come, empty when the other end is gone; a descriptor that came along stays open."""
    try:
        return socket.recv_fds(connection, 65536, 1)[0]
    except BlockingIOError:
        raise
    except OSError:
        return b""


def _reply(control: socket.socket, state: Duty) -> None:
    with contextlib.suppress(OSError):
        control.send(state.value)


def main(again: str, *words: str) -> Undoing:
    """Be on duty, and see the request done if the tool ends while it is armed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    request = UndoRequest(socket.socket(fileno=1), *map(str.encode, words))
    state = watch(socket.socket(fileno=0), request)
    if state is Duty.IDLE:
        return Undoing.DONE
    time.sleep(TICK_SECONDS)
    return request.see_it_done(float(again), was_sent=state is Duty.ACTED)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
