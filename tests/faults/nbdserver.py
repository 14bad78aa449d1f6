"""
An NBD server of the bench's own: images as they look on a network, with every operation in the log.

Fixed newstyle handshake and simple replies (doc/proto.md of the NBD project); a thread for each connection. A file is
served as the raw bytes that it is made of, under its own name, with room to grow.
"""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rig.machines import MIB

from faults import cuts
from faults.cuts import State
from faults.log import Log, Operation

_MAGIC, _OPTION, _OPTION_REPLY = b"NBDMAGIC", 0x49484156454F5054, 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _INFORMATION, _UNSUPPORTED, _UNKNOWN = 1, 3, 0x80000001, 0x80000006
_REQUEST, _REPLY = 0x25609513, 0x67446698
_WRITE, _DISCONNECT = 1, 2
_FUA = 1
# has flags, flush, FUA, trim, write zeroes, and several connections see each other's writes
_FEATURES = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8
ROOM = 8 * MIB
"""How much an image can grow: an export has one size."""


class NbdServer:
    """
    Serves the files of `folder`, each as an export of its own name, at the socket `path`.

    When the log has it die, all connections end, and what no flush has covered is lost. Where it `comes_back` it lets
    clients in again at once.
    """

    def __init__(self, folder: Path, path: Path, log: Log, *, comes_back: bool = False) -> None:
        self._folder, self.path, self._log, self._comes_back = folder, path, log, comes_back
        self._connections: list[socket.socket] = []
        log.server_dies = self._die
        self._threads: list[threading.Thread] = []
        self.problems: list[BaseException] = []

    def __enter__(self) -> "NbdServer":
        for file in self._folder.iterdir():
            os.truncate(file, file.stat().st_size + ROOM)
        self._first = {file.name: file.read_bytes() for file in self._folder.iterdir()}
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen()
        self._run(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # it has died
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join(20)
        self.path.unlink()
        if error is None and self.problems:
            raise self.problems[0]

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._server.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._run(self._serve, connection)

    def _die(self) -> None:
        """Called in the log's turn: no operation is under way."""
        done = self._log.operations
        lost = State(len(done), tuple(cuts.unflushed(done)))
        for name, data in cuts.after(self._first, done, lost).items():
            (self._folder / name).write_bytes(data)
        if not self._comes_back:
            self._server.shutdown(socket.SHUT_RDWR)
        for connection in self._connections:
            with contextlib.suppress(OSError):  # ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(ConnectionError, EOFError):  # a client that was killed
                file = _agree(connection, self._folder)
                if file is not None:
                    _Export(connection, file, self._log).serve()
        except Exception as error:  # a bug of the bench: told at the end
            self.problems.append(error)


def _agree(connection: socket.socket, folder: Path) -> Path | None:
    """The handshake: the file that the client has chosen, None where it has gone."""
    connection.sendall(_MAGIC + b"IHAVEOPT" + struct.pack(">H", _FIXED_NEWSTYLE | _NO_ZEROES))
    _read(connection, 4)
    while True:
        _magic, option, length = struct.unpack(">QII", _read(connection, 16))
        data = _read(connection, length)
        if option == _ABORT:
            _answer(connection, option, _ACK)
            return None
        if option not in (_EXPORT_NAME, _INFO, _GO):
            _answer(connection, option, _UNSUPPORTED)
            continue
        name = data if option == _EXPORT_NAME else data[4 : 4 + int.from_bytes(data[:4], "big")]
        file = folder / os.fsdecode(name)
        if not file.is_file():
            _answer(connection, option, _UNKNOWN)
            continue
        size = struct.pack(">QH", file.stat().st_size, _FEATURES)
        if option == _EXPORT_NAME:
            connection.sendall(size)
            return file
        _answer(connection, option, _INFORMATION, struct.pack(">H", 0) + size)
        _answer(connection, option, _ACK)
        if option == _GO:
            return file


def _answer(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    connection.sendall(struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)) + data)


def _read(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


class _Export:
    """One connection to one file."""

    def __init__(self, connection: socket.socket, file: Path, log: Log) -> None:
        self._connection, self._file, self._log = connection, file, log
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self._client = int(struct.unpack("3i", credentials)[0])

    def serve(self) -> None:
        self._descriptor = os.open(self._file, os.O_RDWR)
        try:
            while self._serve_one():
                pass
        finally:
            os.close(self._descriptor)

    def _serve_one(self) -> bool:
        _magic, flags, command, handle, offset, length = struct.unpack(">IHHQQI", _read(self._connection, 28))
        if command == _DISCONNECT:
            return False
        data = _read(self._connection, length) if command == _WRITE else b""
        error, answer = 0, b""
        try:
            answer = self._do(command, offset, length, data, bool(flags & _FUA))
        except OSError as problem:
            error = problem.errno or 5
        self._connection.sendall(struct.pack(">IIQ", _REPLY, error, handle) + answer)
        return True

    def _do(self, command: int, offset: int, length: int, data: bytes, fua: bool) -> bytes:
        name, pid = self._file.name, self._client
        match command:
            case 0:  # _READ
                return os.pread(self._descriptor, length, offset)
            case 1:  # _WRITE
                self._perform(Operation(name, "write", offset, length, data, pid=pid))
            case 3:  # _FLUSH
                self._perform(Operation(name, "flush", pid=pid))
            case 4:  # _TRIM, which promises nothing
                self._perform(Operation(name, "discard", offset, length, pid=pid))
            case 6:  # _ZEROES
                self._perform(Operation(name, "zero", offset, length, pid=pid))
            case _:
                raise OSError(22, "unknown command")
        if fua:
            self._perform(Operation(name, "flush", pid=pid))
        return b""

    def _perform(self, operation: Operation) -> None:
        self._log.perform(operation, lambda: self._change(operation))

    def _change(self, operation: Operation) -> int:
        if operation.kind in ("write", "zero"):
            data = operation.data or bytes(operation.length)
            return os.pwrite(self._descriptor, data, operation.offset)
        return 0
