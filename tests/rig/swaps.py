"""
The `qmpmerge` command with a neighbour in it who gives names to other files: ``python swaps.py NOTES MOMENT KIND OTHER
[qmpmerge's arguments]``.

Every open, create, rename and remove of a name in the folder QMPMERGE_SWAPS_IN is a moment, with its number: ``open base.raw
#2`` is right before the second open of base.raw. So is every QMP command that is sent: at ``-> block-commit #1 base.raw`` it
is base.raw that is swapped. At MOMENT the file that has the name is moved to ``NAME.was``, and what KIND says gets the name: a
``link`` to OTHER, a ``fifo``, another ``file``, or a ``hard`` link to such a one. Moments are noted as they come, and which
inode was planted.

It is the real command in all else, as that of `kills`.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from qmpmerge import folder
from qmpmerge.cli import main, recorded
from rig import wire

PLANTED = "planted"
WAS = ".was"
KINDS = ("link", "fifo", "file", "hard")


class Neighbour:
    """Strikes once."""

    def __init__(self, notes: Path, moment: str, kind: str, other: Path, place: Path) -> None:
        self._notes, self._moment, self._kind, self._other, self._place = notes, moment, kind, other, place
        self._seen: Counter[str] = Counter()

    def before(self, operation: str, path: str) -> None:
        """Stands in for that of `folder`."""
        is_there = os.path.dirname(os.path.abspath(path)) == str(self._place)
        if is_there and self._come(f"{operation} {os.path.basename(path)}") == self._moment:
            self._strike(Path(path))

    def trace(self, direction: str, text: str) -> None:
        """Hears each message."""
        if direction == "->":
            command, _, name = self._moment.rpartition(" ")
            if self._come(f"-> {json.loads(text)['execute']}") == command:
                self._strike(self._place / name)

    def _come(self, what: str) -> str:
        self._seen[what] += 1
        moment = f"{what} #{self._seen[what]}"
        self._note(moment)
        return moment

    def _strike(self, path: Path) -> None:
        self._moment = ""
        if os.path.lexists(path):
            path.rename(f"{path}{WAS}")
        theirs = self._notes.with_name("theirs")
        theirs.write_bytes(b"theirs" * 1000)
        match self._kind:
            case "link":
                path.symlink_to(self._other)
            case "fifo":
                os.mkfifo(path)
            case "file":
                path.write_bytes(theirs.read_bytes())
            case _:
                path.hardlink_to(theirs)
        self._note(f"{PLANTED} {path.lstat().st_ino} {path.name}")

    def _note(self, line: str) -> None:
        with self._notes.open("a") as file:
            file.write(f"{line}\n")


def run(notes: str, moment: str, kind: str, other: str, *arguments: str) -> None:
    """Be the command."""
    neighbour = Neighbour(Path(notes), moment, kind, Path(other), Path(os.environ["QMPMERGE_SWAPS_IN"]))
    screen: Any = recorded.Screen
    screen.take = lambda screen, entry: wire.tell(neighbour.trace, entry.document)
    folder.before = neighbour.before
    speaks = [] if arguments[0] in ("clean", "active") else ["-v"]
    sys.argv = ["qmpmerge", *arguments, "--json", *speaks]
    main()


if __name__ == "__main__":
    run(*sys.argv[1:])
