"""
A socket between a QMP client and a real QEMU: what goes over the wire is looked at, and may be changed.

Clients that ask the kernel whose socket it is hear QEMU's pid, since it is QEMU that listens on it: `behind`.
"""

import contextlib
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qmpmerge.testing.machines import Machine, remove

LONGEST = 65536
End = object()
"""Among what is passed on: the connection is closed here."""


@dataclass
class Wire:
    """
    Passes QMP on between its clients, one after the other as QEMU serves them, and a monitor. A subclass looks at it, and makes
    something else of it, by `sent` and `received`, which are called by threads of the wire's.
    """

    monitor: str

    def sent(self, command: str, client: socket.socket) -> None:
        """A command has come, and has not gone to QEMU."""

    def received(self, text: bytes, command: str, client: socket.socket) -> list[object]:
        """
        A line of QEMU's has come; what is returned goes to the client in its place, bytes or `End`. `command` is what it is the
        reply to, ``greeting``, or ``event``.
        """
        return [text]

    def serve(self, listener: socket.socket, stop: socket.socket) -> None:
        """One client after the other, until `stop` is closed at its other end."""
        while stop not in select.select([listener, stop], [], [])[0]:
            client, _ = listener.accept()
            with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
                server.connect(self.monitor)
                self._converse(client, server, stop)

    def _converse(self, client: socket.socket, server: socket.socket, stop: socket.socket) -> None:
        asked: dict[str, str] = {}
        upward = threading.Thread(target=self._pass_up, args=(client, server, stop, asked))
        upward.start()
        with contextlib.suppress(OSError), server.makefile("rb") as stream:
            for text in stream:
                for piece in self.received(text, _command(text, asked), client):
                    if isinstance(piece, bytes):
                        client.sendall(piece)
                    else:
                        client.shutdown(socket.SHUT_RDWR)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        upward.join()

    def _pass_up(
        self, client: socket.socket, server: socket.socket, stop: socket.socket, asked: dict[str, str]
    ) -> None:
        rest, decoder = "", json.JSONDecoder()
        with contextlib.suppress(OSError):
            while (
                stop not in select.select([client, stop], [], [])[0] and (got := socket.recv_fds(client, LONGEST, 8))[0]
            ):
                rest = (rest + got[0].decode(errors="replace")).lstrip()
                with contextlib.suppress(ValueError):
                    while rest:
                        command, end = decoder.raw_decode(rest)
                        asked[str(command.get("id"))] = command.get("execute", "")
                        rest = rest[end:].lstrip()
                        self.sent(command.get("execute", ""), client)
                _pass_on(server, got[0], got[1])
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def _pass_on(server: socket.socket, received: bytes, descriptors: list[int]) -> None:
    try:
        if descriptors:
            socket.send_fds(server, [received], descriptors)
        else:
            server.sendall(received)
    finally:
        for one in descriptors:
            os.close(one)


def _command(text: bytes, asked: dict[str, str]) -> str:
    message = json.loads(text)
    if "event" in message:
        return "event"
    return "greeting" if "QMP" in message else asked.get(str(message.get("id")), "qmp_capabilities")


def peer(client: socket.socket) -> int:
    """The pid of who is at the other end."""
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


@contextlib.contextmanager
def laid(wire: Wire, listener: socket.socket) -> Iterator[None]:
    """While the block runs clients of `listener` are served by the wire."""
    stop, ours = socket.socketpair()
    thread = threading.Thread(target=wire.serve, args=(listener, stop))
    thread.start()
    try:
        yield
    finally:
        ours.close()
        thread.join()
        stop.close()


@contextlib.contextmanager
def behind(vm: Machine, name: str = "front") -> Iterator[tuple[str, socket.socket]]:
    """
    A socket beside the machine's monitor, and its listener, which is ours too: QEMU has called listen(2) on it, so that whoever
    asks the kernel hears QEMU's pid. A character device takes one client, which is ours, and accepts no other meanwhile.
    """
    path = str(Path(vm.target).with_name(name))
    address = {"type": "fd", "data": {"str": name}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    with contextlib.ExitStack() as stack:
        listener, placeholder = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        remove([path])
        stack.callback(remove, [path])
        listener.bind(path)
        vm.session.give(name, listener.fileno())
        vm.session.execute("chardev-add", id=name, backend=backend)
        placeholder.connect(path)
        while "disconnected" in _file_of(vm, name):
            pass  # every question lets QEMU's loop turn
        yield path, listener


def _file_of(vm: Machine, chardev: str) -> str:
    return next(str(one["filename"]) for one in vm.session.execute("query-chardev") if one["label"] == chardev)
