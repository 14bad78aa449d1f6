"""What goes over the wire, for those who listen to it, or act on it at a certain message."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import qmpmerge

Listener = Callable[[str, str], None]
"""Hears a direction (``->`` sent, ``<-`` received, ``<!`` an event) and the message as JSON."""


class heard:
    """
    A block, of either kind, in which it hears all sessions that are begun: each message before it is sent, or before anybody
    has it.
    """

    def __init__(self, listener: Listener) -> None:
        self._record = qmpmerge.record(lambda line: tell(listener, line))

    def __enter__(self) -> None:
        self._record.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._record.__exit__(*raised)

    async def __aenter__(self) -> None:
        self._record.__enter__()

    async def __aexit__(self, *raised: Any) -> None:
        self._record.__exit__(*raised)


def tell(listener: Listener, line: Mapping[str, Any]) -> None:
    """Tell it of this line of a recording, where that is a message; not of how a session begins."""
    if line["kind"] not in ("sent", "received") or ("id" not in line["message"] and "event" not in line["message"]):
        return
    message = {key: value for key, value in line["message"].items() if key != "id"}
    direction = "->" if line["kind"] == "sent" else "<!" if "event" in message else "<-"
    listener(direction, json.dumps(message))
