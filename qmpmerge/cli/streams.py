"""
The three streams that we were given: each may be closed, full, or without anybody at its other end.

A closed one is the dangerous one: the next file that is opened, an image or a monitor's socket, gets its number, and what is
printed goes in there. So `take` comes before all else. To write never raises: the work goes on, and so does its exit code.
"""

import errno
import io
import json
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Stream(io.RawIOBase):
    """
    stdout or stderr, unbuffered. After the first failure nothing is written any more.

    `problem` is that failure, None while there is none; `lost` is what stdout did not take, from the line on that failed.
    """

    def __init__(self, number: int, problem: OSError | None) -> None:
        self._number = number
        self.problem = problem
        self.lost = b""

    def fileno(self) -> int:
        """The number of the descriptor."""
        return self._number

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._number)

    def writable(self) -> bool:
        """As far as callers are concerned."""
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of it, or keep it."""
        rest = memoryview(data)
        if self.problem is None:
            self.problem = _written(self._number, rest)
        if (
            self.problem is not None and self._number == 1
        ):  # what goes to stderr may be without end, and nobody asks for it
            self.lost += rest
        return len(rest)

    @property
    def is_failing(self) -> bool:
        """Whether it does not take what is written; a reader that has gone has had enough, which is no failure."""
        return self.problem is not None and self.problem.errno != errno.EPIPE


def _written(number: int, rest: memoryview) -> OSError | None:
    while rest:
        try:
            rest = rest[os.write(number, rest) :]
        except BlockingIOError:  # somebody with whom we share the pipe has made it so
            import select  # rarely needed; asyncio has it for whoever has a job

            select.select([], [number], [])
        except OSError as error:
            return error
    return None


def take() -> None:
    """
    Put /dev/null where one of the three is closed, and ours in the place of `sys.stdout` and `sys.stderr`.

    They take any text: what no UTF-8 can say is spelled out.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for _ in closed:  # each gets the lowest number that is free
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if 0 in closed:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as we live
    sys.stdout, sys.stderr = (text(number, closed=number in closed) for number in (1, 2))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def text(number: int, *, closed: bool = False) -> TextIO:
    """What is open there, as one of ours."""
    stream = Stream(number, OSError(errno.EBADF, os.strerror(errno.EBADF)) if closed else None)
    return io.TextIOWrapper(stream, "utf-8", "backslashreplace", write_through=True)  # type: ignore[type-var]


def is_failing(text: TextIO) -> bool:
    """Whether one of ours does not take what is written."""
    return isinstance(text.buffer, Stream) and text.buffer.is_failing


def complain(text: str) -> None:
    """Say why nothing came of a command: on stderr, on stdout where stderr does not take it."""
    sys.stderr.write(text)
    if is_failing(sys.stderr):
        sys.stdout.write(text)


def settle(*, as_json: bool) -> None:
    """A result that stdout did not take is said on stderr, with the reason."""
    out = sys.stdout.buffer
    if not (isinstance(out, Stream) and out.lost and out.is_failing and out.problem is not None):
        return
    reason, lost = out.problem.strerror, out.lost.decode()
    if as_json:
        sys.stderr.write(json.dumps({"event": "not-written", "reason": reason, "document": _parsed(lost)}) + "\n")
    else:
        sys.stderr.write(f"stdout did not take the result ({reason}), which is:\n{lost}")


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:  # `--help --json`
        return text
