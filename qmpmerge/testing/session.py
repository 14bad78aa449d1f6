"""A blocking QMP session for tests."""

import contextlib
import json
import socket
from typing import Any

OLD = {"block_set_io_throttle"}
"""Commands whose arguments have underscores."""


class Session:
    """One that has greeted and takes commands. `events` are those that came before the reply that was waited for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rwb")
        self.events: list[Any] = []
        self.greeting = json.loads(self._stream.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command, with ``_`` for ``-`` in the names of arguments; an error of QEMU's fails the test."""
        reply = self.ask(command, **arguments)
        assert "error" not in reply, f"{command}: {reply['error']}"
        return reply["return"]

    def ask(self, command: str, **arguments: object) -> Any:
        """Run a command and return the whole reply."""
        sent = {key if command in OLD else key.replace("_", "-"): value for key, value in arguments.items()}
        self._stream.write(json.dumps({"execute": command, "arguments": sent}).encode() + b"\n")
        self._stream.flush()
        while True:
            reply = json.loads(self._stream.readline())
            if "event" not in reply:
                return reply
            self.events.append(reply)

    def event(self) -> Any:
        """The next event, waited for."""
        if not self.events:
            self.events.append(json.loads(self._stream.readline()))
        return self.events.pop(0)

    def give(self, name: str, descriptor: int) -> None:
        """Hand a descriptor to QEMU, by ``getfd``."""
        message = json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode() + b"\n"
        socket.send_fds(self._connection, [message], [descriptor])
        while "event" in (reply := json.loads(self._stream.readline())):
            self.events.append(reply)
        assert "error" not in reply, f"getfd: {reply['error']}"

    def close(self) -> None:
        """End it; what was on its way to a machine that has been killed is lost."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self._connection.close()
