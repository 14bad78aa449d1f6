"""`record`: what is done in a block is recorded."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qmpmerge import watch
from qmpmerge.engine import log
from qmpmerge.recording.entry import Entry
from qmpmerge.recording.file import Recording
from qmpmerge.recording.recorder import Recorder, Taker

Hear = Callable[[dict[str, Any]], None]
"""Hears each line of a recording, as a dict."""


class Hearing:
    """A function that hears each entry at once."""

    def __init__(self, hear: Hear) -> None:
        self._hear = hear

    def take(self, entry: Entry) -> None:
        """As it comes."""
        with log.harmless():
            self._hear(entry.document)

    def hurry(self, is_on: bool) -> None:
        """It hears that the guest is paused."""


@contextlib.contextmanager
def record(to: "str | os.PathLike[str] | Hear") -> Iterator[None]:
    """
    Record what is done in the block: each QMP message as it goes over the wire, and each step of ours. `to` is a file, to which
    lines are added as docs/recording.md has them, or a function that hears each of them as a dict: at once, before a message
    is sent, so it must be quick, and raise nothing.

    Recorded are the sessions that are begun in the block. Raises RecordingUnwritable before it. What goes wrong with the file
    later harms nothing, and is a warning to the logger `qmpmerge`.
    """
    takers: list[Taker] = [Hearing(to)] if callable(to) else []
    with recorded(None if callable(to) else os.fspath(to), takers, warn=log.log.warning) as recorder:
        try:
            yield
        except BaseException as error:
            recorder.end_with(error)
            raise
        recorder.end(None, None)


@contextlib.contextmanager
def recorded(
    file: str | None,
    takers: Sequence[Taker],
    *,
    command: Sequence[str] | None = None,
    warn: Callable[[str], None],
) -> Iterator[Recorder]:
    """
    The same into the file, if any, and for these; whoever enters the block ends the recording. `warn` hears where the file has
    not got all of it. Raises RecordingUnwritable.
    """
    recording = Recording(file) if file is not None else None
    recorder = Recorder([*takers, *([recording] if recording is not None else [])])
    recorder.start(command)
    try:
        with watch.watched(recorder):
            yield recorder
    finally:
        if recording is not None:
            recording.close()
            if recording.problem is not None:
                warn(f"the recording {recording.path} has ended early: {recording.problem}")
