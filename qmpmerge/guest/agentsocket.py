"""
Where the guest agent can be asked: the socket of its channel, as QEMU's own devices and chardevs tell it.

The agent's channel is known by the name of its port, which the agent looks for in the guest. One on a serial port has no name,
and is not found.
"""

import os
import re
from typing import Any

from qmpmerge.errors import NoAgent, QemuRefused
from qmpmerge.processes import proc
from qmpmerge.qemu import reply
from qmpmerge.qemu.monitor import Monitor

PORT = "org.qemu.guest_agent.0"
_DEVICES = "/machine/peripheral", "/machine/peripheral-anon"
_LISTENING = re.compile(r"(?:disconnected:)?unix:(.+?),server(?:=on)?(?: <-> .*)?", re.DOTALL)
"""What QEMU calls the chardev of a UNIX socket that it listens on, with a client or without (char-socket.c)."""


async def find(monitor: Monitor) -> str:
    """The path of the socket. Raises NoAgent where there is none."""
    try:
        labels = await _chardevs(monitor)
        told = {entry["label"]: entry["filename"] for entry in await monitor.execute("query-chardev")}
    except QemuRefused:  # a storage daemon has no devices
        raise NoAgent(target=monitor.name, reason="it has no guest") from None
    if not labels:
        raise NoAgent(target=monitor.name, reason=f"it has no virtserialport of the name {PORT}")
    if len(labels) > 1:
        raise NoAgent(target=monitor.name, reason=f"it has {len(labels)} ports of the name {PORT}")
    filename = told.get(labels[0], "")
    listening = _LISTENING.fullmatch(filename)
    if listening is None:
        raise NoAgent(
            target=monitor.name, reason=f"its channel is {filename or labels[0]}, and no socket to connect to"
        )
    return _reached(monitor, listening[1])


async def _chardevs(monitor: Monitor) -> list[str]:
    """The chardevs of the ports that are the agent's, by their ids."""
    paths = [
        f"{folder}/{entry['name']}"
        for folder in _DEVICES
        for entry in await monitor.execute("qom-list", path=folder)
        if entry["type"] == "child<virtserialport>"
    ]
    found = []
    for path in paths:
        name, chardev = [await _property(monitor, path, one) for one in ("name", "chardev")]
        if name == PORT:
            found.append(chardev)
    return found


async def _property(monitor: Monitor, path: str, name: str) -> Any:
    value = await monitor.execute("qom-get", path=path, property=name)
    reply.see_shape(monitor.name, "qom-get", value, str)
    return value


def _reached(monitor: Monitor, path: str) -> str:
    """The path as we get there: a relative one is QEMU's, and so are its folders."""
    if monitor.pid is None:
        return path
    whole = os.path.join(proc.start_folder(monitor.pid) or "", path)
    seen = proc.as_seen_by(monitor.pid, whole)
    return whole if proc.identity(seen) in (None, proc.identity(whole)) else seen
