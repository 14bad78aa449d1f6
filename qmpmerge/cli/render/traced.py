"""A line of a recording as `-v` shows it: when, which session of several, and what."""

import json
from collections.abc import Mapping
from typing import Any

_ARROWS = {"sent": "->", "received": "<-"}


def line(entry: Mapping[str, Any]) -> str:
    """Messages as on the wire, but for their ids: QEMU answers in order."""
    shown = _message(entry) if entry["kind"] in _ARROWS else f"-- {_words(entry)}"
    return f"{entry['t']:.6f} {shown}"


def _message(entry: Mapping[str, Any]) -> str:
    message = entry["message"]
    arrow = "<!" if "event" in message else _ARROWS[entry["kind"]]
    number = f"{entry['session']} " if entry["session"] > 1 else ""
    return f"{number}{arrow} {json.dumps({key: value for key, value in message.items() if key != 'id'})}"


def _words(entry: Mapping[str, Any]) -> str:
    match entry["kind"]:
        case "step":
            return ": ".join(filter(None, (entry["target"], entry["about"], entry["text"])))
        case "session":
            pid = f" (pid {entry['pid']})" if entry["pid"] is not None else ""
            return f"session {entry['session']} with {entry['name']}{pid}: {json.dumps(entry['greeting'])}"
        case "closed":
            return f"session {entry['session']} was closed {entry['reason']}"
        case kind:
            facts = {key: value for key, value in entry.items() if key not in ("run", "t", "kind")}
            return f"{kind} {json.dumps(facts)}"
