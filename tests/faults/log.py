"""
The one ordered log of what is done to the files, and the fault that is injected into it.

Whoever sees the storage (`gate`, `nbdserver`) hands each operation to `Log.perform` before it is done. One is done at a
time, so that "after operation 17" has a meaning although QEMU writes from several threads.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["write", "zero", "discard", "allocate", "truncate", "flush", "create", "rename", "unlink", "link"]
DEATH_SECONDS = 20

Victims = Literal["actor", "all", "server"]
"""Who dies at a kill: the process whose operation it is, all whose operations are seen, or the server of the images."""


@dataclass(frozen=True)
class Operation:
    """
    One thing done to a file, by process `pid`. `file` is relative to the bench's folder, and empty for the folder itself,
    `target` its new name. `changed` is the file's st_mtime_ns after it; `full` is a flush that keeps such times too (fsync).
    """

    file: str
    kind: Kind
    offset: int = 0
    length: int = 0
    data: bytes = b""
    target: str = ""
    pid: int = 0
    failed: bool = False
    changed: int = 0
    full: bool = False

    def __str__(self) -> str:
        where = f" -> {self.target}" if self.target else f" {self.length}@{self.offset:#x}" if self.length else ""
        return f"{self.kind} {self.file}{where}"


@dataclass
class Fault:
    """
    What happens at the operation `number` (from 1): it is done and then the `victims` are killed, or it fails with
    `errno` instead; `for_ever` all later ones on the same file too. `reached` tells whether it came to that.
    """

    number: int
    errno: int | None = None
    for_ever: bool = False
    victims: Victims = "actor"
    before: bool = False
    reached: Operation | None = None

    def errno_of(self, number: int, operation: Operation) -> int | None:
        """The errno with which an operation is to fail."""
        if self.errno is None or operation.kind == "discard":
            return None
        if number == self.number:
            self.reached = operation
            return self.errno
        again = self.for_ever and self.reached is not None and operation.file == self.reached.file
        return self.errno if again else None


@dataclass
class Log:
    """Operations in the order in which they were done."""

    fault: Fault | None = None
    operations: list[Operation] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    server_dies: Callable[[], None] = lambda: None
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def count(self) -> int:
        return len(self.operations)

    def arm(self, fault: Fault | None) -> None:
        """From now on, with an empty log."""
        with self._turn:
            self.operations.clear()
            self.fault = fault

    def perform(self, operation: Operation, work: Callable[[], int], changed: Callable[[], int] = lambda: 0) -> int:
        """
        Do `work`, which is the operation, in its turn; `changed` tells the file's time after it. Raises OSError where it
        fails, or was made to.
        """
        with self._turn:
            number = self.count + 1
            fault = self.fault
            kills = fault is not None and fault.errno is None and number == fault.number
            if fault is not None and kills and fault.before:
                self._strike(fault, operation)
            errno = fault.errno_of(number, operation) if fault is not None else None
            if errno is not None:
                self._note(operation, failed=True)
                raise OSError(errno, os.strerror(errno))
            try:
                result = work()
            except OSError:
                self._note(operation, failed=True)
                raise
            self._note(operation, changed=changed())
            if fault is not None and kills:
                self._strike(fault, operation)
            return result

    def _note(self, operation: Operation, *, failed: bool = False, changed: int = 0) -> None:
        self.known.add(operation.pid)
        self.operations.append(replace(operation, failed=failed, changed=changed))

    def _strike(self, fault: Fault, operation: Operation) -> None:
        fault.reached = operation
        if fault.victims == "server":
            self.server_dies()
        else:
            kill([operation.pid] if fault.victims == "actor" else self.known | {operation.pid})


def kill(pids: Iterable[int]) -> None:
    """SIGKILL to all, and wait until they are dead: not one more operation comes from them."""
    descriptors = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptors.append(os.pidfd_open(pid))
    for descriptor in descriptors:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], DEATH_SECONDS)[0], "a killed process does not end"
        os.close(descriptor)
