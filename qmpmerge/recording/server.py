"""QMP on a socket, as QEMU speaks it, with the answers of a script: one client at a time, the others wait."""

import asyncio
import codecs
import contextlib
import json
import os
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qmpmerge.qemu.monitor import REPLAY
from qmpmerge.recording.places import Places
from qmpmerge.recording.reading import is_deep
from qmpmerge.recording.script import CAPABILITIES, Script, shown
from qmpmerge.recording.stand_ins import StandIns

Tell = Callable[[str], None]
"""Hears a sentence about what a client does."""

LARGEST = 64 * 1024 * 1024
"""Characters of one command."""

SILENCE_SECONDS = 0.2
"""A client that says nothing for so long waits for an event, and gets the next one."""

_DESCRIPTORS = 253
"""As many as the kernel hands over at once."""


class Server:
    """
    Serves clients on a socket that listens. `tell` hears of each command that changes something, and of the first that is not
    as it was recorded.
    """

    def __init__(
        self, script: Script, places: Places, stand_ins: StandIns, listener: socket.socket, tell: Tell
    ) -> None:
        self._script = script
        self._places = places
        self._stand_ins = stand_ins
        self._listener = listener
        self._tell = tell

    def serve(self) -> None:
        """One client, until it leaves, or until QEMU has said all that it said."""
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(json.dumps(self._greeting).encode() + b"\r\n")
            is_ready = False
            for message in self._messages(connection):
                command, arguments = _read(message)
                if command is None or not (is_ready or command == CAPABILITIES):
                    self._send(connection, _no_command(command, message))
                    continue
                is_ready = True
                if not self._answered(connection, command, arguments, message):
                    return

    @property
    def _greeting(self) -> Mapping[str, Any]:
        """QEMU's, which says that it is not: clients of ours change no file outside of the folder then."""
        told = self._script.greeting.get("QMP")
        told = told if isinstance(told, dict) else {}
        version = told.get("version")
        version = version if isinstance(version, dict) else {}
        return {"QMP": {**told, "version": {**version, REPLAY: self._places.folder}}}

    def _answered(self, connection: socket.socket, command: str, arguments: Mapping[str, Any], message: Any) -> bool:
        """Whether QEMU has."""
        had_diverged, played = self._script.diverged, self._script.played
        answer = self._script.answer(command, self._places.there(arguments))
        if self._script.diverged is not had_diverged:
            self._tell(str(self._script.diverged))
        elif self._script.played > played:
            asyncio.run(self._stand_ins.follow(command, arguments))
            self._tell(f"{self._script.played} of {len(self._script.acts)}: {shown(command, arguments)}")
        for event in answer.before:
            self._send(connection, event)
        if answer.message is None:
            self._tell(f"the recording has no answer to {command}: QEMU, or who recorded it, was gone")
            return False
        self._send(connection, {**answer.message, **_id(message)})
        for event in answer.after:
            self._send(connection, event)
        return True

    def _messages(self, connection: socket.socket) -> Iterator[Any]:
        """What the client sends, until it leaves; while it waits it gets events."""
        decoder, text, is_ready = codecs.getincrementaldecoder("utf-8")("replace"), "", False
        while True:
            if is_ready and not select.select([connection], [], [], SILENCE_SECONDS)[0]:
                event = self._script.event()
                if event is not None:
                    self._send(connection, event)
                    continue
            data, descriptors, _, _ = socket.recv_fds(connection, 65536, _DESCRIPTORS)
            for descriptor in descriptors:  # for a QEMU that is not there
                os.close(descriptor)
            if not data:
                return
            text += decoder.decode(data)
            values, text = _values(text)
            for value in values:
                is_ready = True
                yield value

    def _send(self, connection: socket.socket, message: Mapping[str, Any]) -> None:
        connection.sendall(json.dumps(self._places.message(message)).encode() + b"\r\n")


def _values(text: str) -> tuple[list[Any], str]:
    """The JSON values that it begins with, None for what is none, and the rest, of which more has to come."""
    values: list[Any] = []
    while text := text.lstrip():
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError:
            if "\n" not in text and len(text) < LARGEST:
                break
            text = text.partition("\n")[2]
            value, end = None, 0
        except (ValueError, RecursionError):
            return [*values, None], ""
        values.append(None if is_deep(value) else value)
        text = text[end:]
    return values, text


def _read(message: Any) -> tuple[str | None, Mapping[str, Any]]:
    """Command and arguments; None for what is no command."""
    if not isinstance(message, dict):
        return None, {}
    command = message.get("execute", message.get("exec-oob"))
    arguments = message.get("arguments", {})
    is_one = isinstance(command, str) and isinstance(arguments, dict)
    return (command, arguments) if is_one else (None, {})


def _no_command(command: str | None, message: Any) -> Mapping[str, Any]:
    """As QEMU refuses it."""
    kind, reason = "GenericError", "QMP input must be a JSON object with the key 'execute'"
    if command is not None:
        kind, reason = "CommandNotFound", f"Expecting capabilities negotiation with 'qmp_capabilities', not {command}"
    return {"error": {"class": kind, "desc": reason}, **_id(message)}


def _id(message: Any) -> dict[str, Any]:
    return {"id": message["id"]} if isinstance(message, dict) and "id" in message else {}
