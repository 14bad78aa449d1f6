"""
The process behind `writer`: it adds lines to a file, and hangs by itself where the file's disk does.

Run as a script, ``python -I -S writer_child.py FILE``, so that it is there in 12 ms: it imports little, and nothing of ours.
Standard input is a socket.

    tool    lines; then it closes its end, or dies
    child   a line: empty once the file is open, or why it is not taken
    child   another one: empty once all that came is written, or why no more is

What came by then is written, whole lines only, also where the tool has died. A signal does not end it, since Ctrl-C and the end
of a service are for the tool, which has something to say after that.
"""

import errno
import os
import signal
import stat
import sys

MOST = 1024 * 1024
"""Bytes that are read at once; a line may have more."""


def opened(path: str) -> int:
    """To add to what is there. Raises OSError where it is not taken."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(0, "it is a symlink") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "it is no regular file")
    if status.st_uid != os.geteuid():
        raise OSError(0, "it belongs to another user")
    if status.st_size and not _is_recording(descriptor):
        raise OSError(0, "it is no recording")
    return descriptor


def _is_recording(descriptor: int) -> bool:
    """By its first line, wholly: an image can begin with whatever its guest has written there."""
    import json  # only here, for it takes milliseconds

    first, newline, _ = os.pread(descriptor, MOST, 0).partition(b"\n")
    try:
        line = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(newline) and isinstance(line, dict) and line.get("kind") == "start" and "schema" in line


def add(descriptor: int) -> None:
    """All that comes. Raises OSError where the disk takes no more."""
    size = os.fstat(descriptor).st_size
    is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a full disk, most likely
    waiting = bytearray(b"\n" if is_torn else b"")
    while chunk := _read():
        waiting += chunk
        if end := chunk.rfind(b"\n") + 1:
            whole = len(waiting) - len(chunk) + end
            _write(descriptor, bytes(waiting[:whole]))
            del waiting[:whole]


def _read() -> bytes:
    try:
        return os.read(0, MOST)
    except OSError:  # the tool has died
        return b""


def _write(descriptor: int, lines: bytes) -> None:
    while lines:  # a full disk takes a part before it says so
        lines = lines[os.write(descriptor, lines) :]


def main() -> None:
    """Until there is nothing more to do."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        descriptor = opened(sys.argv[1])
        os.chdir("/")
        _say("")
        add(descriptor)
        os.close(descriptor)
        _say("")
    except OSError as error:
        _say(error.strerror or str(error))


def _say(text: str) -> None:
    try:
        os.write(0, text.encode() + b"\n")
    except OSError:  # nobody hears it
        pass


if __name__ == "__main__":
    main()
    os._exit(0)
