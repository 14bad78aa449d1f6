"""One line of a recording: docs/recording.md says what stands in it."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from qmpmerge.recording import secrets


class Entry(NamedTuple):
    """
    `message` is a QMP message as it went over the wire, None for what is none; `command` the one that it is, or answers, None
    for an event.
    """

    run: str
    seconds: float
    kind: str
    facts: Mapping[str, object]
    message: bytes | None = None
    command: str | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The same as a value, without secrets."""
        return dict(json.loads(self.line))

    @property
    def line(self) -> bytes:
        """The same as JSON on one line, with its end, without secrets."""
        known = {"run": self.run, "t": round(self.seconds, 6), "kind": self.kind}
        shown = json.dumps({**known, **secrets.without(self.facts)}, default=str).encode()
        if self.message is None:
            return shown + b"\n"
        key = b"greeting" if self.kind == "session" else b"message"
        return b'%s, "%s": %s}\n' % (shown[:-1], key, secrets.masked(self.message))
