"""
What only one of all merges of a QEMU may do at a time, whichever process they are in.

The queue stands in QEMU itself, so that nobody can be in it who may not use its monitor, and all meet in it, whichever of its
monitors they use. (A name of the kernel's could be taken by anybody, and kept; and one that were secret can be read in
/proc/net/unix by all, once it is in use.) Who wants a turn makes an object there, a ticket of its own whose number is above all
that are seen; and makes another one where a look after that shows one that is not below it, for whoever has that may have
looked first. It is our turn when none is below ours whose owner lives.

Owners die without a word. So a ticket names a socket on which its owner listens, and which is gone with the last process that
has it; who listens there, the kernel tells. Where nobody does, or another user than the ticket says, the owner is dead, and
whoever comes next takes the ticket away. Where we cannot see that far (another host, another network namespace) it is alive.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any, NamedTuple

from qmpmerge import shield, sockets, users
from qmpmerge.errors import NoReply, QemuRefused, SessionLost
from qmpmerge.processes import proc
from qmpmerge.qemu.monitor import COMMAND_SECONDS, Monitor
from qmpmerge.value import Value

LOOK_AGAIN_SECONDS = 0.01
"""On average: two that look at the same times would be in each other's way."""

TELL_SECONDS = 1.0
"""After how long it is said for whom we wait."""

LIMIT_SECONDS = 300.0
"""How long another process may have a turn. A pause takes milliseconds, unless base and top are compared in it."""

LEAVE_SECONDS = 2.0
"""How long we wait for QEMU to hear that we have done; it may hang."""

FLUSH, PAUSE = "flush", "pause"

_LIST = ("qom-list", {"path": "/objects"})


class NoTurn(Exception):
    """Somebody else, `holder`, has the turn for too long, or QEMU takes no tickets; says so in words."""

    def __init__(self, holder: str, why: str) -> None:
        super().__init__(f"{holder} {why}")
        self.holder = holder


class _Owner(Value):
    """What a ticket says: the process, as whom it runs, and where its socket can be seen."""

    pid: int
    user: int
    place: str

    def __str__(self) -> str:
        elsewhere = "" if self.place == _place() else " on another host or network"
        return f"pid {self.pid} of user {users.name(self.user)}{elsewhere}"


class _Ticket(NamedTuple):
    """Its number; `mark` is in the names of the object and of the socket, and no two have the same."""

    number: int
    mark: str

    @property
    def socket(self) -> str:
        return f"\0qmpmerge-{self.mark}"


@contextlib.asynccontextmanager
async def taken(what: str, monitor: Monitor, seconds: float | None = None) -> AsyncIterator[socket.socket]:
    """
    Wait for our turn at `what` of this QEMU, and have it during the block.

    It is freed with the last descriptor of the socket that the block gets: who hands that on hands on the turn.

    After a moment `monitor.tell` hears for whom we wait. Raises NoTurn after `seconds`, by default after `LIMIT_SECONDS`
    where the turn is another process's.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        queue = _Queue(what, monitor)
        listener.bind(_Ticket(0, queue.mark).socket)
        listener.listen()
        try:
            await queue.wait(seconds)
            yield listener
        finally:
            await shield.finished(queue.leave())  # nobody may leave between what was done in it and its proof


async def is_taken(what: str, monitor: Monitor) -> bool:
    """Whether somebody who lives has a turn at it, or waits for one."""
    queue = _Queue(what, monitor)
    return any([await queue.owner(ticket) is not None for ticket in await queue.tickets()])


def _place() -> str:
    """Where a socket's name and a user's number mean the same."""
    return " ".join([proc.boot_id(), *(proc.read_link(f"/proc/self/ns/{kind}") for kind in ("net", "user"))])


class _Queue:
    """The tickets for one thing, and ours among them."""

    def __init__(self, what: str, monitor: Monitor) -> None:
        self.mark = os.urandom(16).hex()
        self._monitor = monitor
        self._prefix = f"qmpmerge-turn-{what}-"
        self._ours: _Ticket | None = None
        self._ahead: _Owner | None = None
        self._first: _Ticket | None = None
        self._is_told = False

    async def wait(self, seconds: float | None) -> None:
        """Until it is our turn."""
        began = time.monotonic()
        while not await self._is_our_turn():
            waited = time.monotonic() - began
            limit = LIMIT_SECONDS if seconds is None else seconds
            if waited >= limit and not (seconds is None and self._waits_for_ourselves):
                raise NoTurn(f"{self._holder}{self._cure}", f"has been at work on it for more than {limit:g} s")
            if waited >= TELL_SECONDS:
                self._tell()
            await asyncio.sleep(LOOK_AGAIN_SECONDS * os.urandom(1)[0] / 128)

    async def leave(self) -> None:
        """Take our ticket away; where QEMU does not hear it, who comes next does."""
        ticket, self._ours = self._ours, None
        if ticket is not None:
            with contextlib.suppress(SessionLost, NoReply):
                await self._remove(ticket, LEAVE_SECONDS)

    @property
    def _waits_for_ourselves(self) -> bool:
        return self._ahead is not None and (self._ahead.pid, self._ahead.place) == (os.getpid(), _place())

    @property
    def _holder(self) -> str:
        return str(self._ahead) if self._ahead is not None else "somebody"

    @property
    def _cure(self) -> str:
        """How a turn is taken away whose owner we cannot see: another host's, another network's, or nobody's."""
        if self._ahead is None or self._first is None or self._ahead.place == _place():
            return ""
        command = sockets.typed(self._monitor.name, ("object-del", {"id": self._object(self._first)}))
        return f" (if it is gone, `{command}` takes its turn away)"

    def _tell(self) -> None:
        """Once, as soon as it is known that it is another process."""
        if self._ahead is not None and not (self._is_told or self._waits_for_ourselves):
            self._is_told = True
            self._monitor.tell(f"waiting for {self._ahead}, who is at work on {self._monitor.name} too")

    async def _is_our_turn(self) -> bool:
        is_new = self._ours is None
        waiting = await (self._drawn(1) if is_new else self.tickets())
        ours = self._ours
        if ours is None or ours not in waiting:
            self._ours = None  # somebody has made QEMU forget it
            return False
        below = [ticket for ticket in waiting if ticket.number < ours.number]
        if is_new and len(below) + 1 < len(waiting):
            await self.leave()
            return False
        self._ahead = None
        for ticket in below:
            self._ahead, self._first = await self.owner(ticket), ticket
            if self._ahead is not None:
                return False
            await self._remove(ticket)
        return True

    async def _drawn(self, number: int) -> list[_Ticket]:
        """
        Draw a ticket, and return those that wait then. All in one go, as if there were none with this number or above, as there
        mostly is none; where there was, it is given back for one that is above all.
        """
        self._ours = ours = _Ticket(number, self.mark)
        data = json.dumps(asdict(_Owner(os.getpid(), os.geteuid(), _place())))
        made = ("object-add", {"qom_type": "secret", "id": self._object(ours), "data": data})
        before, added, after = await self._monitor.execute_all([_LIST, made, _LIST])
        if isinstance(added, QemuRefused):
            raise NoTurn("QEMU", f"takes no ticket for it: {added.reason}")
        highest = max((ticket.number for ticket in self._read(before)), default=0)
        if highest < number:
            return self._read(after)
        await self.leave()
        return await self._drawn(highest + 1)

    async def tickets(self) -> list[_Ticket]:
        """Those that wait, or whose turn it is, in their order."""
        return self._read((await self._monitor.execute_all([_LIST]))[0])

    def _read(self, objects: Any) -> list[_Ticket]:
        if isinstance(objects, QemuRefused):  # a storage daemon has none before its first
            return []
        names = [
            entry["name"].removeprefix(self._prefix) for entry in objects if entry["name"].startswith(self._prefix)
        ]
        found = [re.fullmatch(r"([0-9]{1,15})-([0-9a-f]{32})", name) for name in names]
        return sorted(_Ticket(int(match[1]), match[2]) for match in found if match is not None)

    def _object(self, ticket: _Ticket) -> str:
        return f"{self._prefix}{ticket.number}-{ticket.mark}"

    async def _remove(self, ticket: _Ticket, seconds: float = COMMAND_SECONDS) -> None:
        with contextlib.suppress(QemuRefused):  # it is gone
            await self._monitor.execute("object-del", id=self._object(ticket), timeout=seconds)

    async def owner(self, ticket: _Ticket) -> _Owner | None:
        """Who has this ticket, None where it is dead or gone."""
        path = f"/objects/{self._object(ticket)}"
        try:
            owner = _Owner(**json.loads(await self._monitor.execute("qom-get", path=path, property="data")))
        except QemuRefused:
            return None
        except (ValueError, TypeError, RecursionError):
            return _Owner(0, 0, "")
        return owner if owner.place != _place() or _lives(ticket, owner) else None


def _lives(ticket: _Ticket, owner: _Owner) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
            tried.setblocking(False)
            tried.connect(ticket.socket)
            credentials = tried.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except ConnectionRefusedError:
        return False
    except OSError:  # it has more callers than it has room for, or we may have no socket
        return True
    _pid, user, _group = struct.unpack("3i", credentials)
    return bool(user == owner.user)
