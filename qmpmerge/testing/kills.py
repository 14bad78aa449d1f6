"""A tool, or its QEMU, dies when a given QMP command goes over the wire."""

import contextlib
import os
import socket
from dataclasses import dataclass
from typing import Literal, get_args

from qmpmerge.testing import wire
from qmpmerge.testing.jobs import known
from qmpmerge.testing.processes import kill, kill_peer
from qmpmerge.testing.vms import StartVm, Vm
from qmpmerge.testing.wire import Wire

Victim = Literal["tool", "qemu", "both"]
Moment = Literal["sent", "answered"]


@dataclass
class Killer(Wire):
    """
    Strikes once, with SIGKILL: the tool is told to use `path` as its monitor. `seen` are the commands that went by, `struck` is
    whether it has struck.
    """

    vm: Vm
    command: str
    victim: Victim
    moment: Moment
    number: int
    path: str = ""
    optional: bool = False
    struck: bool = False

    def __post_init__(self) -> None:
        self.seen: list[str] = []
        self._answered: list[str] = []
        self.problem = ""

    def sent(self, command: str, client: socket.socket) -> None:
        """Before QEMU has it."""
        self.seen.append(command)
        if self.moment == "sent" and command == self.command and self.seen.count(command) == self.number:
            self._strike(client)

    def received(self, text: bytes, command: str, client: socket.socket) -> list[object]:
        """Before the tool has the reply."""
        self._answered.append(command)
        if self.moment == "answered" and command == self.command and self._answered.count(command) == self.number:
            self._strike(client)
        return [] if self.struck else [text]

    def _strike(self, client: socket.socket) -> None:
        pid = wire.peer(client)
        if self.victim != "qemu" and pid == os.getpid():
            self._miss("the test itself", client)
            return
        self.struck = True
        if self.victim != "tool":
            kill(self.vm.process.pid)
        if self.victim != "qemu" and not kill_peer(client, pid):
            self._miss("gone, and a child of its goes on", client)

    def _miss(self, who: str, client: socket.socket) -> None:
        self.struck = False
        self.problem = (
            f"the tool to be killed, the process that has connected, is {who}: run it in one of its own, that stays"
        )
        client.shutdown(socket.SHUT_RDWR)


class KillAt:
    """Puts killers between the test's VMs and the tool."""

    def __init__(self, vms: StartVm, stack: contextlib.ExitStack) -> None:
        self._vms = vms
        self._stack = stack
        self._killers: list[Killer] = []

    def __call__(
        self,
        command: str,
        *,
        victim: Victim = "qemu",
        moment: Moment = "sent",
        number: int = 1,
        vm: Vm | None = None,
        optional: bool = False,
    ) -> Killer:
        """
        Kill QEMU, the tool or both when this command goes by for the `number`-th time: ``sent`` is before QEMU has it,
        ``answered`` when QEMU has replied and the tool does not know. The tool is to use the `path` of what is returned as its
        monitor. It is the process that connects there which dies: the test fails where that is its own, or one that has left
        the connection to a child and is gone, as daemons do. Where there are several VMs, say which; its first monitor is the
        killer's while the tool is connected. A test in which nobody has died fails at its end, unless that is `optional`.

        Raises ValueError for what is no victim, moment or number.
        """
        known("victim", victim, get_args(Victim))
        known("moment", moment, get_args(Moment))
        if number < 1:
            raise ValueError(f"number is {number}, and the first time is 1")
        vm = self._vms.only(vm)
        path, listener = self._stack.enter_context(wire.behind(vm, f"wire{len(self._killers) + 1}"))
        killer = Killer(vm.target, vm, command, victim, moment, number, path, optional)
        self._killers.append(killer)
        self._stack.enter_context(wire.laid(killer, listener))
        return killer

    def close(self) -> None:
        """See that all have killed whom they were to kill."""
        for killer in self._killers:
            assert not killer.problem, killer.problem
            seen = ", ".join(killer.seen) or "nothing"
            assert killer.struck or killer.optional, (
                f"nobody has died: {killer.command} was to go by {killer.number} times, and what has gone by is {seen}; "
                "kill_at(..., optional=True) is for a test that may do without"
            )
