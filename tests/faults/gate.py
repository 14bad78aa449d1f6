"""
The gate: every system call by which a process changes a file waits here until the bench has done it in its place.

That is seccomp's user notification (seccomp_unotify(2), Linux 5.6 and later, no privileges needed): the process sleeps
in its pwritev() or fdatasync(), and its descriptor is borrowed with pidfd_getfd(2). So an operation can be noted with its data,
made to fail with any errno, or be the last one that a process did. Names (rename, unlink, open for making) are noted and
may fail, the kernel then does them itself.
"""

import ctypes
import fcntl
import itertools
import os
import platform
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from faults import behind_gate
from faults.log import Kind, Log, Operation
from qmpmerge.images.stashed import STASHED

_names = itertools.count(1)
_kernel = ctypes.CDLL(None, use_errno=True)
_kernel.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_CONTINUE = 1
_PIDFD_GETFD = 438
_PUNCH_HOLE, _ZERO_RANGE = 2, 16
_SYNC_FLAGS = 2 | 4  # RWF_DSYNC, RWF_SYNC
CALLS = {number: name for name, number in behind_gate.NUMBERS.items()}


def available() -> str:
    """Why there can be no gate on this machine; empty where there can."""
    if platform.machine() != "x86_64":
        return "the gate knows the system calls of x86-64 only"
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    if not actions.exists() or "user_notif" not in actions.read_text():
        return "this kernel has no seccomp user notification"
    return ""


@dataclass(frozen=True)
class Call:
    """A system call that waits: its id, the thread and its process, its name and arguments."""

    id: int
    thread: int
    pid: int
    name: str
    arguments: tuple[int, ...]

    def memory(self, address: int, length: int) -> bytes:
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(length)

    def text(self, address: int) -> str:
        page = 4096
        data = self.memory(address, page - address % page)
        if b"\0" not in data:
            data += self.memory(address + len(data), page)
        return os.fsdecode(data.split(b"\0", 1)[0])

    def vector(self) -> bytes:
        """The data of a write of several pieces."""
        pieces = self.memory(self.arguments[1], 16 * self.arguments[2])
        return b"".join(self.memory(*piece) for piece in struct.iter_unpack("<QQ", pieces))

    def path(self, folder: int, name: int) -> str:
        """The absolute path of a name given relative to the descriptor `folder`."""
        descriptor = ctypes.c_int(self.arguments[folder]).value if folder >= 0 else -100
        start = os.readlink(f"/proc/{self.thread}/{'cwd' if descriptor == -100 else f'fd/{descriptor}'}")
        return os.path.normpath(os.path.join(start, self.text(self.arguments[name])))

    def borrow(self) -> int:
        """Its descriptor, the first argument, as one of our own on the same open file."""
        process = os.pidfd_open(self.pid)
        try:
            descriptor = int(_kernel.syscall(_PIDFD_GETFD, process, int(self.arguments[0]), 0))
        finally:
            os.close(process)
        if descriptor < 0:
            raise ProcessLookupError(self.pid)
        return descriptor


PATHS: dict[str, tuple[Kind, tuple[int, int], tuple[int, int] | None]] = {
    "rename": ("rename", (-1, 0), (-1, 1)), "renameat": ("rename", (0, 1), (2, 3)), "renameat2": ("rename", (0, 1), (2, 3)),
    "link": ("link", (-1, 0), (-1, 1)), "linkat": ("link", (0, 1), (2, 3)), "unlink": ("unlink", (-1, 0), None),
    "unlinkat": ("unlink", (0, 1), None), "openat": ("create", (0, 1), None),
}  # fmt: skip
"""Calls that take names: the kind, and for each name the places of its folder and of itself among the arguments."""


class Gate:
    """Processes started with `before` in front of their command have their changes to files below `folder` in `log`."""

    def __init__(self, folder: Path, log: Log) -> None:
        self._folder = f"{os.path.realpath(folder)}/"
        self._log = log
        self._name = f"qmpmerge-gate-{os.getpid()}-{next(_names)}"
        self._threads: list[threading.Thread] = []
        self.problems: list[BaseException] = []

    def __enter__(self) -> "Gate":
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(f"\0{self._name}")
        self._server.listen()
        self._run(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join(20)
        if error is None and self.problems:
            raise self.problems[0]

    def before(self, what: str = "storage") -> list[str]:
        """What to write in front of a command so that it goes through the gate."""
        return [sys.executable, "-I", "-S", behind_gate.__file__, self._name, what]

    def _run(self, work: Callable[..., None], *arguments: int) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._server.accept()
            except OSError:
                return
            with connection:
                _data, (listener,), _flags, _from = socket.recv_fds(connection, 1, 1)
                self._run(self._serve, listener)
                connection.send(b".")

    def _serve(self, listener: int) -> None:
        """Answer calls until the last process behind this filter is gone."""
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while not poll.poll()[0][1] & select.POLLHUP:
            request = bytearray(80)
            try:
                fcntl.ioctl(listener, _RECEIVE, request)
                answer = self._answer(_call(request))
                fcntl.ioctl(listener, _SEND, answer)
            except FileNotFoundError:
                continue  # it was killed while it waited
            except Exception as error:  # a bug of the bench: told at the end, the process must not wait for ever
                self.problems.append(error)
                fcntl.ioctl(listener, _SEND, struct.pack("<QqiI", _call(request).id, 0, 0, _CONTINUE))
        os.close(listener)

    def _answer(self, call: Call) -> bytes:
        try:
            value = self._do(call)
        except ProcessLookupError:
            value = 0  # it is dead, and nobody reads this
        except OSError as error:
            return struct.pack("<QqiI", call.id, 0, -(error.errno or 5), 0)
        return struct.pack("<QqiI", call.id, value or 0, 0, _CONTINUE if value is None else 0)

    def _do(self, call: Call) -> int | None:
        """Do the call in the process's place; None where the kernel is to do it."""
        if call.name in PATHS:
            self._do_name(call)
            return None
        try:
            name = os.readlink(f"/proc/{call.thread}/fd/{call.arguments[0]}")
        except FileNotFoundError:
            return None
        if not f"{name}/".startswith(self._folder):
            return None
        descriptor = call.borrow()
        # Whatever it is called by now, it is the same file; the folder itself has no name.
        file = f"{name}/".removeprefix(self._folder).removesuffix("/").removesuffix(STASHED)
        try:
            operation, work = _storage(call, file, descriptor)
            return self._log.perform(operation, work, lambda: os.fstat(descriptor).st_mtime_ns)
        finally:
            os.close(descriptor)

    def _do_name(self, call: Call) -> None:
        kind, first, second = PATHS[call.name]
        path = call.path(*first)
        target = call.path(*second) if second is not None else ""
        if not path.startswith(self._folder) or (kind == "create" and os.path.exists(path)):
            return
        operation = Operation(
            path.removeprefix(self._folder), kind, target=target.removeprefix(self._folder), pid=call.pid
        )
        self._log.perform(operation, lambda: 0)


def _call(request: bytearray) -> Call:
    identity, thread, _flags, number, _architecture, _pointer, *arguments = struct.unpack("<QIIiIQ6Q", request)
    return Call(identity, thread, _process(thread), CALLS[number], tuple(arguments))


def _process(thread: int) -> int:
    try:
        with open(f"/proc/{thread}/status", encoding="utf-8", errors="replace") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Tgid:"))
    except FileNotFoundError:
        return thread


def _storage(call: Call, file: str, descriptor: int) -> tuple[Operation, Callable[[], int]]:
    """The operation that a call is, and how it is done."""
    arguments, pid = call.arguments, call.pid
    match call.name:
        case "fsync" | "fdatasync":
            flush = os.fsync if call.name == "fsync" else os.fdatasync
            return Operation(file, "flush", pid=pid, full=call.name == "fsync"), lambda: _done(flush, descriptor)
        case "ftruncate":
            operation = Operation(file, "truncate", offset=arguments[1], pid=pid)
            return operation, lambda: _done(os.ftruncate, descriptor, operation.offset)
        case "fallocate":
            mode, offset, length = arguments[1:4]
            kind: Kind = "discard" if mode & _PUNCH_HOLE else "zero" if mode & _ZERO_RANGE else "allocate"
            return Operation(file, kind, offset, length, pid=pid), lambda: _fallocate(descriptor, mode, offset, length)
        case _:
            return _write(call, file, descriptor)


def _write(call: Call, file: str, descriptor: int) -> tuple[Operation, Callable[[], int]]:
    in_pieces = call.name in ("pwritev", "pwritev2", "writev")
    data = call.vector() if in_pieces else call.memory(call.arguments[1], call.arguments[2])
    operation = Operation(file, "write", call.arguments[3], len(data), data, pid=call.pid)
    if call.name in ("write", "writev"):
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        return Operation(**{**vars(operation), "offset": place}), lambda: os.write(descriptor, data)
    synchronous = call.name == "pwritev2" and call.arguments[5] & _SYNC_FLAGS

    def write() -> int:
        written = os.pwrite(descriptor, data, operation.offset)
        if synchronous:
            os.fdatasync(descriptor)
        return written

    return operation, write


def _done(call: Callable[..., None], *arguments: int) -> int:
    call(*arguments)
    return 0


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> int:
    if _kernel.fallocate(descriptor, mode, offset, length):
        raise OSError(ctypes.get_errno(), "fallocate")
    return 0
