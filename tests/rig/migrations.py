"""The states of a VM in which its disks are not its own: from a migration that is awaited to one that is over."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rig.machines import Machine, machine

INCOMING = ("-incoming", "defer")
SECONDS = 60.0
"""What a migration of 128 MiB of nothing may take on a busy host."""


def becomes(vm: Machine, status: str) -> None:
    """Wait until the migration has this status."""
    deadline = time.monotonic() + SECONDS
    while (now := vm.session.execute("query-migrate").get("status", "none")) != status:
        assert time.monotonic() < deadline, f"{now} instead of {status}"
        time.sleep(0.01)


def able(vm: Machine, capability: str) -> None:
    """Switch a capability of migrations on."""
    vm.session.execute("migrate-set-capabilities", capabilities=[{"capability": capability, "state": True}])


@contextlib.contextmanager
def under_way(vm: Machine) -> Iterator[None]:
    """A migration to somebody who does not read."""
    path = vm.folder / "nobody"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        vm.session.execute("migrate", uri=f"unix:{path}")
        becomes(vm, "active")
        yield


def cancel(vm: Machine) -> None:
    """And wait until it is."""
    vm.session.execute("migrate_cancel")
    becomes(vm, "cancelled")


def save(vm: Machine) -> None:
    """Migrate into a file, as who saves a VM does."""
    vm.session.execute("migrate", uri=f"exec:cat > '{vm.folder}/state'")
    becomes(vm, "completed")


def load(vm: Machine) -> None:
    """And back."""
    vm.session.execute("migrate-incoming", uri=f"exec:cat '{vm.folder}/state'")
    becomes(vm, "completed")


@contextlib.contextmanager
def waiting(folder: Path, arguments: Sequence[str]) -> Iterator[Machine]:
    """For a guest, which was saved and can be loaded."""
    with machine(folder, *arguments) as source:
        source.session.execute("cont")
        save(source)
    with machine(folder, *arguments, *INCOMING) as vm:
        yield vm


@contextlib.contextmanager
def migrated(folder: Path, arguments: Sequence[str]) -> Iterator[Machine]:
    """The guest has gone."""
    with machine(folder, *arguments) as vm:
        save(vm)
        yield vm


@contextlib.contextmanager
def reset(folder: Path, arguments: Sequence[str]) -> Iterator[Machine]:
    """The guest has gone, and the state does not say so any more."""
    with migrated(folder, arguments) as vm:
        vm.session.execute("system_reset")
        while vm.session.execute("query-status")["status"] != "prelaunch":
            pass
        yield vm


@contextlib.contextmanager
def arrived(folder: Path, arguments: Sequence[str]) -> Iterator[Machine]:
    """The guest has come and was not let go on yet."""
    with waiting(folder, arguments) as vm:
        able(vm, "late-block-activate")
        load(vm)
        yield vm


@contextlib.contextmanager
def leaving(folder: Path, arguments: Sequence[str]) -> Iterator[Machine]:
    """The guest is being migrated away."""
    with machine(folder, *arguments) as vm, under_way(vm):
        yield vm


@contextlib.contextmanager
def switching_over(folder: Path, arguments: Sequence[str]) -> Iterator[Machine]:
    """All but the last step is done."""
    with machine(folder, *arguments) as vm:
        able(vm, "pause-before-switchover")
        vm.session.execute("cont")
        vm.session.execute("migrate", uri="exec:cat > /dev/null")
        becomes(vm, "pre-switchover")
        yield vm


STATES: dict[str, Callable[[Path, Sequence[str]], contextlib.AbstractContextManager[Machine]]] = {
    "inmigrate": waiting,
    "postmigrate": migrated,
    "prelaunch": reset,
    "paused": arrived,
    "migration active": leaving,
    "migration pre-switchover": switching_over,
}
"""By what a refusal calls them; from 10.0 on, where the nodes tell, some are ``inactive``."""
