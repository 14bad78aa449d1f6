"""
The `qmpmerge` command with a killer in it: ``python kills.py NOTES VICTIM MOMENT [qmpmerge's arguments]``.

Every QMP command that is sent and every reply to one is a moment, and so is every report of progress on the way, each
with its number: ``-> job-finalize #1`` is before the first job-finalize leaves us, ``<- job-finalize #1`` is when we have
its reply, ``progress #2`` is at the second report. What is done with names and with the record are moments too: ``=> rename
#1`` is before the first rename, ``<= rename #1`` after it. ``-> job-finalize #1 +0.5`` is half a millisecond after it. At
MOMENT the victim, which is ``tool``, ``daemon`` or ``both``, dies of SIGKILL; the daemon is the private one, or the QEMU
whose pid is in QMPMERGE_VICTIM. Moments, and the daemon's pid, are noted in the file NOTES as they come; a MOMENT that does
not come is a run without a kill.

It is the real command in all else: what ``-v`` shows is what the killer hangs on.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections import Counter, deque
from pathlib import Path
from typing import Any

import psutil

from qmpmerge.cli import main, recorded
from qmpmerge.cli.render.json import JsonOutput
from qmpmerge.engine.pace.progress import Progress
from qmpmerge.folder import File, Folder
from qmpmerge.images import notes as beside_images
from qmpmerge.journal import store
from qmpmerge.testing.processes import kill as dies
from rig import wire

ALSO = "QMPMERGE_KILL_ALSO"
"""The variable with the pid of a process that is a victim as the daemon is: a machine that somebody else has started."""

PATHS = {"PYTHONPATH": str(Path(__file__).parents[1])}
"""Of its environment, where it is run as a script."""

DAEMON = "daemon"
KILLED = "killed"
VICTIM = os.environ.get("QMPMERGE_VICTIM")
MARKS = ("->", "<-", "=>", "<=", "pr")
"""What the notes of moments begin with."""


class Killer:
    """Watches the conversation and strikes once."""

    def __init__(self, notes: int, victim: str, moment: str) -> None:
        self._notes = notes
        self._victim = victim
        self._moment, _, delay = moment.partition(" +")
        self._milliseconds = float(delay or 0)
        self._seen: Counter[str] = Counter()
        self._unanswered: deque[str] = deque()

    def trace(self, direction: str, text: str) -> None:
        """Hears each message."""
        if direction == "->":
            self._unanswered.append(json.loads(text)["execute"])
            self._come(f"-> {self._unanswered[-1]}")
        elif direction == "<-":
            self._come(f"<- {self._unanswered.popleft()}")

    def progress(self, _output: JsonOutput, told: Progress) -> None:
        """Stands in for the renderer's. What counts is a part of the data copied, and a part not."""
        if 0 < told.done < told.total:
            self._come("progress")

    def around(self, module: Any, name: str) -> None:
        """Strike before and after a function."""
        function = getattr(module, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self._come(f"=> {name}")
            result = function(*arguments, **options)
            self._come(f"<= {name}")
            return result

        setattr(module, name, watched)

    def _come(self, what: str) -> None:
        if not self._seen:
            self._note(f"{DAEMON} {' '.join(str(daemon.pid) for daemon in daemons())}")
        self._seen[what] += 1
        moment = f"{what} #{self._seen[what]}"
        self._note(moment)
        if moment != self._moment:
            return
        if self._milliseconds:
            threading.Timer(self._milliseconds / 1000, self._strike).start()
        else:
            self._strike()

    def _strike(self) -> None:
        self._note(KILLED)
        if self._victim != "tool":
            for daemon in daemons():
                kill(daemon.pid)
            if VICTIM is not None and self._victim == "daemon":
                dies(int(VICTIM))
            elif VICTIM is not None:
                os.kill(int(VICTIM), signal.SIGKILL)  # and no waiting: we must not come to an end of our own
        if self._victim != "daemon":
            os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, line: str) -> None:
        os.write(self._notes, f"{line}\n".encode())


def daemons() -> list[psutil.Process]:
    """The storage daemon that we have started, and the machine of `ALSO`."""
    also = [psutil.Process(int(os.environ[ALSO]))] if os.environ.get(ALSO) else []
    return also + [child for child in psutil.Process().children() if child.name().startswith("qemu-storage")]


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is dead; who started it finds the zombie as it was."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def run(notes: str, victim: str, moment: str, *arguments: str) -> None:
    """Be the command."""
    killer = Killer(os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND), victim, moment)
    renderer: Any = JsonOutput
    screen: Any = recorded.Screen
    screen.take = lambda screen, entry: wire.tell(killer.trace, entry.document)
    renderer.progress = lambda output, told: killer.progress(output, told)
    for name in ("rename", "remove", "sync", "put"):
        killer.around(Folder, name)
    killer.around(File, "write")
    killer.around(store, "mark")
    for name in ("put_on", "take_away", "merged"):
        killer.around(beside_images, name)
    speaks = [] if arguments[0] in ("clean", "active") else ["-v"]
    sys.argv = ["qmpmerge", *arguments, "--json", *speaks]
    main()


if __name__ == "__main__":
    run(*sys.argv[1:])
