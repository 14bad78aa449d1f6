"""What goes over the wire, for those who listen to it, or act on it at a certain message."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import qmpmerge

Listener = Callable[[str, str], None]
"""Hears a direction (``->`` sent, ``<-`` received, ``<!`` an event) and the message as JSON."""


def heard(listener: Listener) -> AbstractContextManager[None]:
    """It hears all sessions that are begun in the block: each message before it is sent, or before anybody has it."""
    return qmpmerge.record(lambda line: tell(listener, line))


def tell(listener: Listener, line: Mapping[str, Any]) -> None:
    """Tell it of this line of a recording, where that is a message; not of how a session begins."""
    if line["kind"] not in ("sent", "received") or ("id" not in line["message"] and "event" not in line["message"]):
        return
    message = {key: value for key, value in line["message"].items() if key != "id"}
    direction = "->" if line["kind"] == "sent" else "<!" if "event" in message else "<-"
    listener(direction, json.dumps(message))
