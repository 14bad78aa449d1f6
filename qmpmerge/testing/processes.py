"""The end of a process."""

import contextlib
import errno
import os
import select
import signal
import socket

SO_PEERPIDFD = 77
"""Of Linux 6.5; Python has no name for it."""


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is dead; who started it finds the zombie as it was."""
    with contextlib.suppress(ProcessLookupError):
        _end(os.pidfd_open(pid))


def kill_peer(client: socket.socket, pid: int) -> bool:
    """
    The same with the process that has connected this socket, by that pid, and no other one. Return False where it is gone
    already: then somebody else has the connection, such as a child of its.
    """
    try:
        descriptor = _peer(client, pid)
    except ProcessLookupError:
        return False
    has_ended = bool(select.select([descriptor], [], [], 0)[0])
    _end(descriptor)
    return not has_ended


def _peer(client: socket.socket, pid: int) -> int:
    try:
        return client.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # of one that is gone, the number differs by kernel
            raise ProcessLookupError(pid) from error
    return os.pidfd_open(pid)


def _end(descriptor: int) -> None:
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        select.select([descriptor], [], [])
    finally:
        os.close(descriptor)
