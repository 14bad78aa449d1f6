"""Addresses of sockets, names that are too long for one, and how a user talks to one."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping

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


def typed(monitor: str, *commands: tuple[str, Mapping[str, object]]) -> str:
    """A line for the shell that sends QMP commands to the monitor of this name, for what no command of ours does."""
    where = f"TCP:{monitor.removeprefix('tcp:')}" if monitor.startswith("tcp:") else f"UNIX-CONNECT:{monitor}"
    sent: list[tuple[str, Mapping[str, object]]] = [("qmp_capabilities", {}), *commands]
    lines = [json.dumps({"execute": name, **({"arguments": given} if given else {})}) for name, given in sent]
    return f"printf '%s\\n' {shlex.join(lines)} | socat -t5 - {shlex.quote(where)}"
