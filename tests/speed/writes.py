"""
What each write of a guest takes while its disk is merged, the flush after it included, and how long the guest stands still.

The guest is `writers`: it does nothing but write a sector, have it flushed, and say so; we note when it does, by the host's
clock. The pause is from STOP to RESUME, by QEMU's.
"""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rig import writers
from rig.machines import TCP, Machine, Session, machine, port

from speed.figures import BARE, OURS, Figures, alternating, percentile
from speed.images import DataChain, data_chain
from speed.peers import bare, ours

SECTION = "a guest's writes"
ALONE = "no merge"
LAYERS = 3
SETTLED, QUIET = 20, 1.0
"""The writes before a merge, and the seconds of a sample without one."""


def measure(figures: Figures, folder: Path, runs: int, sizes: list[int]) -> None:
    """Write and flush during merges of so many MiB, and while nothing is merged."""
    for megabytes in sizes:
        chain = data_chain(folder / f"writes-{megabytes}", LAYERS, megabytes)
        for active in (False, True):
            name = f"{'active, pivot' if active else 'intermediate'}, {megabytes} MiB"
            for who in alternating(runs, [OURS, BARE, ALONE]):
                chain.put_back()
                took = _written(folder, chain, who, active=active)
                figures.add(SECTION, f"{name}: worst write and flush", who, max(took))
                figures.add(SECTION, f"{name}: 95 of 100 are within", who, percentile(took, 95))
        chain.remove()


def pauses(figures: Figures, folder: Path, runs: int) -> None:
    """How long the guest stands still for a pivot: asked by a monitor on a UNIX socket, and by one on TCP."""
    chain = data_chain(folder / "pauses", LAYERS, 0)
    for tcp in (False, True):
        for who in alternating(runs, [OURS, BARE]):
            chain.put_back()
            with _writing(folder, chain) as (vm, _acknowledged):
                _merge_by_tcp(vm, chain, who) if tcp else _merge(vm, chain, who, active=True, still=True)
                figures.add(SECTION, f"the guest's pause{', by TCP' if tcp else ''}", who, _pause(vm.session))


def _merge_by_tcp(vm: Machine, chain: DataChain, who: str) -> None:
    """By the monitor on a port, which serves one client."""
    address = "127.0.0.1", port(vm)
    if who == OURS:
        ours("commit", f"tcp:{address[0]}:{address[1]}", "vda")
        return
    with socket.create_connection(address) as connection:
        bare(Session(connection), chain.merge(active=True), still=True)


def _written(folder: Path, chain: DataChain, who: str, *, active: bool) -> list[float]:
    """The milliseconds of each write and flush during the merge."""
    with _writing(folder, chain) as (vm, acknowledged):
        first = len(acknowledged.times) - 1
        if who == ALONE:
            time.sleep(QUIET)
        else:
            _merge(vm, chain, who, active=active)
        acknowledged.wait(len(acknowledged.times) + 1)  # the one that the end of the merge fell into
        times = acknowledged.times[first:]
    return [(later - earlier) * 1000 for earlier, later in itertools.pairwise(times)]


def _merge(vm: Machine, chain: DataChain, who: str, *, active: bool, still: bool = False) -> None:
    if who == OURS:
        ours("commit", vm.target, "vda", *([] if active else chain.middle))
    else:
        bare(vm.session, chain.merge(active=active), still=still)


def _pause(session: Session) -> float:
    """The milliseconds between the last STOP and RESUME that were heard."""
    session.execute("query-status")  # all events before it are here then
    at = {event["event"]: event["timestamp"] for event in session.events}
    seconds: list[float] = [at[name]["seconds"] + at[name]["microseconds"] / 1e6 for name in ("STOP", "RESUME")]
    return (seconds[1] - seconds[0]) * 1000


class _Acknowledged:
    """When the guest said that a write is done, by `time.perf_counter`."""

    def __init__(self, connection: socket.socket) -> None:
        self.times: list[float] = []
        self._connection = connection
        self._news = threading.Condition()
        self._ended = False

    def hear(self) -> None:
        """Until QEMU is gone. Four bytes are said for each write."""
        heard = 0
        while said := self._connection.recv(4096):
            now, heard = time.perf_counter(), heard + len(said)
            with self._news:
                self.times += [now] * (heard // 4 - len(self.times))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait(self, count: int) -> None:
        """Until so many are done."""
        with self._news:
            self._news.wait_for(lambda: self._ended or len(self.times) >= count)
            if self._ended:
                raise SystemExit("bench: QEMU ended while its guest was writing")


@contextlib.contextmanager
def _writing(folder: Path, chain: DataChain) -> Iterator[tuple[Machine, _Acknowledged]]:
    """A machine whose guest writes to the chain."""
    with contextlib.ExitStack() as ending:
        listening = ending.enter_context(socket.socket(socket.AF_UNIX))
        path = folder / "said"
        path.unlink(missing_ok=True)
        listening.bind(str(path))
        listening.listen()
        vm = ending.enter_context(machine(folder, *_arguments(folder, chain, path)))
        connection, _ = listening.accept()
        ending.enter_context(connection)
        acknowledged = _Acknowledged(connection)
        listener = threading.Thread(target=acknowledged.hear)
        listener.start()
        ending.callback(listener.join)
        ending.callback(connection.shutdown, socket.SHUT_RDWR)
        vm.session.execute("cont")
        acknowledged.wait(SETTLED)
        yield vm, acknowledged


def _arguments(folder: Path, chain: DataChain, path: Path) -> Sequence[str]:
    """Those of the guest, who says to a socket what it has written."""
    *arguments, option, _file = writers.arguments(folder, [f"file={chain.active},format=qcow2,discard=unmap"])
    assert option == "-debugcon"
    tcp = [argument.format("127.0.0.1") for argument in TCP]
    return [
        *arguments,
        *tcp,
        "-chardev",
        f"socket,id=said,path={path}",
        "-device",
        "isa-debugcon,iobase=0xe9,chardev=said",
    ]
