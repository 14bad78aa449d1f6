"""Addresses of sockets, and names that are too long for one."""

import contextlib
import os
from collections.abc import Iterator

Address = str | tuple[str, int]
"""The path of a UNIX socket, or host and port."""


@contextlib.contextmanager
def short(path: str) -> Iterator[str]:
    """The path as connect(2) takes it: one of more than 107 bytes goes by a descriptor of the socket's file."""
    if len(os.fsencode(path)) <= 107:
        yield path
        return
    descriptor = os.open(path, os.O_PATH)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
