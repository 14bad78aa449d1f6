"""`record`: what is done in a block is recorded."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qmpmerge import watch
from qmpmerge.engine import log
from qmpmerge.recording.entry import Entry
from qmpmerge.recording.file import Recording
from qmpmerge.recording.recorder import Recorder, Taker

Hear = Callable[[dict[str, Any]], None]
"""Hears each line of a recording, as a dict."""


class Hearing:
    """
    A function that hears each entry at once. Where it raises what is no Exception it hears no more, and that is kept as
    `raised`: no merge is to meet it halfway, nor a guest that is paused.
    """

    def __init__(self, hear: Hear) -> None:
        self._hear = hear
        self.raised: BaseException | None = None

    def take(self, entry: Entry) -> None:
        """As it comes."""
        if self.raised is None:
            try:
                with log.harmless():
                    self._hear(entry.document)
            except BaseException as error:
                self.raised = error

    def hurry(self, is_on: bool) -> None:
        """It hears that the guest is paused."""


@contextlib.contextmanager
def record(*to: "str | os.PathLike[str] | Hear") -> Iterator[None]:
    """
    Record what is done in the block: each QMP message as it goes over the wire, and each step of ours. `to` are files, to which
    lines are added as docs/recording.md has them, and functions that hear each of them as a dict: at once, a message before
    it is sent, so they must be quick. What they raise is shown, and goes no further; what is no Exception (KeyboardInterrupt,
    SystemExit, CancelledError, `pytest.fail`) is raised at the end of the block.

    Recorded are the sessions that are begun in the block; within it another one takes its place. Raises RecordingUnwritable
    before it. What goes wrong with a file later harms nothing, and is a warning to the logger `qmpmerge`.
    """
    files = [os.fspath(one) for one in to if not callable(one)]
    hearings = [Hearing(one) for one in to if callable(one)]
    try:
        with recorded(files, hearings, warn=log.warn) as recorder:
            try:
                yield
            except BaseException as error:
                recorder.end_with(error)
                raise
            recorder.end(None, None)
    finally:
        for hearing in hearings:
            if hearing.raised is not None:
                raise hearing.raised


@contextlib.contextmanager
def recorded(
    files: Iterable[str],
    takers: Iterable[Taker],
    *,
    command: Sequence[str] | None = None,
    warn: Callable[[str], None],
) -> Iterator[Recorder]:
    """
    The same into these; whoever enters the block ends the recording. `warn` hears where a file has not got all of it. Raises
    RecordingUnwritable.
    """
    with contextlib.ExitStack() as stack:
        recorder = Recorder([*takers, *(stack.enter_context(_open(file, warn)) for file in files)])
        recorder.start(command)
        with watch.watched(recorder):
            yield recorder


@contextlib.contextmanager
def _open(file: str, warn: Callable[[str], None]) -> Iterator[Recording]:
    recording = Recording(file)
    try:
        yield recording
    finally:
        recording.close()
        if recording.problem is not None:
            warn(f"the recording {file} has ended early: {recording.problem}")
