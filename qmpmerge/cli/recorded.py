"""`--record` and `-v`: the work of a command, watched."""

import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpmerge.cli import bug
from qmpmerge.cli.options import Options
from qmpmerge.errors import EXIT_CODES, Cancelled
from qmpmerge.recording import record

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.recording.entry import Entry
    from qmpmerge.recording.recorder import Taker


class Screen:
    """Shows entries as they come; those of a pause after it, since a terminal can be slow."""

    def __init__(self, output: "Output") -> None:
        self._output = output
        self._held: deque[Entry] = deque()
        self._holds = False

    def take(self, entry: "Entry") -> None:
        """See `recorder.Taker`."""
        self._held.append(entry)
        if not self._holds:
            self._show()

    def hurry(self, is_on: bool) -> None:
        """See `recorder.Taker`."""
        self._holds = is_on
        if not is_on:
            self._show()

    def _show(self) -> None:
        while self._held:
            self._output.trace(self._held.popleft().document)


def work(done: "Callable[[Output], str]", options: Options) -> "Callable[[Output], str]":
    """The same work, with its recording around it."""

    def watched(output: "Output") -> str:
        takers: list[Taker] = [Screen(output)] if options.trace else []
        command = ["qmpmerge", *sys.argv[1:]]
        files = [options.record] if options.record is not None else []
        with record.recorded(files, takers, command=command, warn=output.note) as recorder:
            try:
                verdict = done(output)
            except KeyboardInterrupt:
                recorder.end_with(Cancelled())
                raise
            except BaseException as error:
                recorder.end_with(error, "bug", bug.EXIT_CODE)
                raise
            recorder.end(verdict, EXIT_CODES[verdict])
            return verdict

    return watched
