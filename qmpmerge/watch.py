"""
Who watches what we do: every message on the wire, and every step of our own. Nobody, as a rule.

`recording` has those who do. Watched is what is begun while there is somebody: each task, and each thread that asyncio starts,
has its own watcher, or none.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Protocol


class Wire(Protocol):
    """Sees the messages of one session as they go over the wire, one JSON object each, in their order."""

    def sent(self, message: bytes, command: str, id: str | None) -> None:
        """Right before it is written."""

    def received(self, message: bytes, id: str | None) -> None:
        """As it arrives, before anybody who waits for it has it; the first one is the greeting. No `id`: an event."""

    def closed(self, reason: str) -> None:
        """Nothing more will come."""


class Watcher(Protocol):
    """What is told here must take no time, and raise nothing: a guest may stand still meanwhile."""

    def connected(self, name: str, pid: int | None) -> Wire:
        """A session is begun with what is called so; `pid` is the process, where it is known."""

    def step(self, name: str, text: str, facts: Mapping[str, object]) -> None:
        """We have done something: `text` says it to people, `facts` to programs."""

    def header(self, when: str, file: str, header: Mapping[str, object]) -> None:
        """What the header of an image says ``before`` a merge, or ``after`` it."""

    def hurry(self, is_on: bool) -> None:
        """A guest stands still from now on, or no more."""


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def current() -> Watcher | None:
    """Who watches here."""
    return _watcher.get()


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """It watches what is begun in the block."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
