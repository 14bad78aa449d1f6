"""
For callers without asyncio: the functions of `qmpmerge`, which here block until they are done.

    with qmpmerge.sync.open("/run/vm1.sock") as target:
        for disk in target.disks():
            print(disk.name, disk.chain)
        outcome = qmpmerge.sync.commit(target, "vda", report=print)
        print(outcome.verdict, outcome.after)

Each session has an event loop of its own, that runs in whichever thread makes a call, and only while it does. So `report` is
called in that thread, and Ctrl-C in the main one does what it does to the command: it cancels a merge, waits until the old
chain is back, and raises KeyboardInterrupt; from the switch to the proof it waits, and the outcome is returned.

Threads can share a target: one call goes on at a time, the others wait for their turn. To merge several disks at once give each
thread a target of its own, where QEMU has as many monitors, or use asyncio. A target of images lives no longer than the thread
that opened it. A forked process must open its own: two readers of one session take each other's replies. Where an event loop
runs in the calling thread a call raises RuntimeError: `await` the function of the same name there.
"""

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar

from qmpmerge.operations import clean as clean_
from qmpmerge.operations import commit as commit_
from qmpmerge.operations import control as control_
from qmpmerge.operations import examine as examine_
from qmpmerge.operations import follow as follow_
from qmpmerge.operations import graph as graph_
from qmpmerge.operations import plan as plan_
from qmpmerge.operations import pull as pull_
from qmpmerge.operations import recover as recover_
from qmpmerge.operations import snapshot as snapshot_
from qmpmerge.operations import tidy as tidy_
from qmpmerge.operations.active import active
from qmpmerge.processes.vms import vms
from qmpmerge.recording.record import record
from qmpmerge.targets import live as live_
from qmpmerge.targets import offline as offline_
from qmpmerge.targets import open as open_
from qmpmerge.targets import target as target_

P = ParamSpec("P")
T = TypeVar("T")

__all__ = [
    "Target",
    "active",
    "clean",
    "commit",
    "control",
    "examine",
    "examine_all",
    "follow",
    "graph",
    "live",
    "offline",
    "open",
    "plan",
    "pull",
    "record",
    "recover",
    "snapshot",
    "tidy",
    "vms",
]


def _with_target(
    function: Callable[Concatenate[target_.Target, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Target", P], T]:
    @functools.wraps(function)
    def blocking(target: "Target", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return target.run(lambda session: function(session, *args, **kwargs))

    return blocking


def _without_target(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    @functools.wraps(function)
    def blocking(*args: P.args, **kwargs: P.kwargs) -> T:
        _refuse_running_loop()
        return asyncio.run(function(*args, **kwargs))

    return blocking


def _with_any(
    function: Callable[Concatenate["target_.Target | str | os.PathLike[str]", P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Target | str | os.PathLike[str]", P], T]:
    @functools.wraps(function)
    def blocking(target: "Target | str | os.PathLike[str]", /, *args: P.args, **kwargs: P.kwargs) -> T:
        if isinstance(target, Target):
            return target.run(lambda session: function(session, *args, **kwargs))
        return _without_target(function)(target, *args, **kwargs)

    return blocking


def _door(
    door: Callable[P, AbstractAsyncContextManager[target_.Target]],
) -> Callable[P, AbstractContextManager["Target"]]:
    @functools.wraps(door)
    @contextlib.contextmanager
    def blocking(*args: P.args, **kwargs: P.kwargs) -> Iterator[Target]:
        _refuse_running_loop()
        with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
            session = contextlib.AsyncExitStack()
            target = Target(runner.run(session.enter_async_context(door(*args, **kwargs))), runner)
            stack.push(lambda *raised: target.run(lambda _: session.__aexit__(*raised)))  # after what threads are at
            yield target

    return blocking


def _refuse_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # there is none
        return
    raise RuntimeError(
        "qmpmerge.sync blocks, and an event loop runs in this thread: await the function of `qmpmerge` itself"
    )


async def _ended(work: Awaitable[T]) -> T:
    return await work


class Target:
    """A `qmpmerge.Target` whose methods block. `open`, `live` and `offline` make one."""

    def __init__(self, target: target_.Target, runner: asyncio.Runner) -> None:
        self._target = target
        self._runner = runner
        self._turn = threading.Lock()

    def run(self, work: Callable[[target_.Target], Coroutine[Any, Any, T]]) -> T:
        """
        What `work` returns of the `qmpmerge.Target`, for what has no function here.

            with qmpmerge.sync.open("/run/vm1.sock") as target:
                print(target.run(lambda session: session.monitor.execute("query-status")))
        """
        _refuse_running_loop()
        with self._turn:
            task = self._runner.get_loop().create_task(work(self._target))
            try:
                return self._runner.run(_ended(task))
            finally:
                if not task.done():  # a signal handler has raised past it, the one of a second Ctrl-C too
                    task.cancel()
                    self._runner.run(_ended(asyncio.wait({task})))

    @property
    def name(self) -> str:
        """What the user called it."""
        return self._target.name

    @property
    def pid(self) -> int | None:
        """The QEMU process, where the kernel tells it."""
        return self._target.pid

    @property
    def is_live(self) -> bool:
        """Whether somebody else, a guest, can write to the disks at any time."""
        return self._target.is_live

    @property
    def notes(self) -> list[str]:
        """What the user should know of how it was found."""
        return self._target.notes

    disks = _with_target(target_.Target.disks)
    disk = _with_target(target_.Target.disk)
    chain = _with_target(target_.Target.chain)
    jobs = _with_target(target_.Target.jobs)
    job = _with_target(target_.Target.job)


open = _door(open_.open)
live = _door(live_.live)
offline = _door(offline_.offline)

snapshot = _with_target(snapshot_.snapshot)
commit = _with_target(commit_.commit)
pull = _with_target(pull_.pull)
plan = _with_target(plan_.plan)
follow = _with_target(follow_.follow)
control = _with_target(control_.control)
graph = _with_target(graph_.graph)

examine = _with_any(examine_.examine)
examine_all = _without_target(examine_.examine_all)
recover = _without_target(recover_.recover)
clean = _without_target(clean_.clean)
tidy = _without_target(tidy_.tidy)


def __dir__() -> list[str]:
    return [*__all__, *(name for name, value in globals().items() if name.startswith("__") and not callable(value))]
