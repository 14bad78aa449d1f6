"""
A fresh shell on a terminal, in a home folder of its own: what a newcomer types and sees, and the guests of the VMs that are
started there.
"""

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import choices

import psutil

from rig.machines import Session, run
from rig.terminal import ENTER, Seen, plain, terminal

COLUMNS = 100
SHOWN = "/home/me"
"""What the home is called on the pages; the real one has a name of the same length, so that tables look alike."""

PROMPT, MORE, QUESTION = "\x1b]133;A\a$ ", "\x1b]133;P\a> ", "[y/N] "
PROMPTS = {"PS1": r"\e]133;D;$?\a\e]133;A\a$ ", "PS2": r"\e]133;P\a> "}
"""With the marks that terminals know as OSC 133: how the last command ended, and where a prompt begins."""
ENDED = re.compile(r"\x1b\]133;D;(\d+)\a")

EVENT = re.compile(r"(\S+) (writes a file|has all its files|has the files of (\S+)|is switched off|is killed)")


@dataclass(frozen=True)
class File:
    """What a guest has written: a MiB of one byte."""

    pattern: int

    @property
    def place(self) -> str:
        return f"-P {self.pattern} {2 * self.pattern}M 1M"


@dataclass
class Home:
    """
    The shell, and the files that the guests have written, by their VM. Its monitor is a socket that has its name, so that it is
    found from its folder, whatever other VMs are called on this host.
    """

    folder: Path
    seen: Seen
    _files: dict[str, list[File]] = field(default_factory=dict)

    def type(self, lines: Sequence[str], answers: Sequence[str] = ()) -> tuple[int, str]:
        """Type a command, of one line or more, and what is asked: its exit code, and what is seen."""
        begin = len(self.seen.screen)
        for line in lines[:-1]:
            self.seen.type(line + ENTER)
            assert self.seen.wait_for(MORE, PROMPT) == MORE, f"the shell takes this for whole: {line}"
        self.seen.type(lines[-1] + ENTER)
        given = iter(answers)
        while (shown := self.seen.wait_for(QUESTION, PROMPT, MORE)) == QUESTION:
            self.seen.type(next(given, "y") + ENTER)
        assert shown == PROMPT, f"the shell waits for more than {lines[-1]}"
        said = self.seen.screen[begin:].removesuffix(PROMPT)
        (code,) = ENDED.findall(said)
        screen = plain(ENDED.sub("", said)).split("\n", len(lines))[-1]  # what was typed is echoed
        drawn = "\n".join(line.replace("\x1b[K", "").rpartition("\r")[2] for line in screen.split("\n"))
        return int(code), drawn.replace(str(self.folder), SHOWN)

    def event(self, text: str) -> None:
        """What happens to a VM, or what is seen in its guest."""
        told = EVENT.fullmatch(text)
        assert told is not None, f"nobody knows how this is done: {text}"
        name, event, other = told.groups()
        files = self._files.setdefault(name, [])
        if event == "writes a file":
            files.append(File(1 + sum(map(len, self._files.values()))))
            with self._monitor(name) as session:
                for command in (f"write {files[-1].place}", "flush"):
                    session.execute("human-monitor-command", command_line=f'qemu-io {_disk(session)[0]} "{command}"')
        elif event.startswith("has"):
            with self._monitor(name) as session:
                _, file, form = _disk(session)
            reads = [word for one in self._files[other or name] for word in ("-c", f"read {one.place}")]
            said = run("qemu-io", "-r", "-U", "-f", form, *reads, file)
            assert "failed" not in said, f"{text}: {said}"
        else:
            self._end(name, signal.SIGKILL if event == "is killed" else signal.SIGTERM)

    @contextlib.contextmanager
    def _connected(self, name: str) -> Iterator[socket.socket]:
        path = next((path for path in self.folder.rglob(name) if path.is_socket()), None)
        assert path is not None, f"{name} does not run: {self.seen.screen[-800:]}"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(path))
            yield connection

    @contextlib.contextmanager
    def _monitor(self, name: str) -> Iterator[Session]:
        with self._connected(name) as connection, contextlib.closing(Session(connection)) as session:
            yield session

    def _end(self, name: str, number: signal.Signals) -> None:
        with self._connected(name) as connection:
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _send(int.from_bytes(peer[:4], sys.byteorder), number)

    def close(self) -> None:
        """End all that was started from here, and remove what it has left."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.folder):
                    _send(process.pid, signal.SIGKILL)
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def home() -> Iterator[Home]:
    """One that is empty, and gone afterwards."""
    folder = _new_folder()
    environment = {"HOME": str(folder), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", **PROMPTS}
    shell = ["bash", "--norc", "--noprofile", "--noediting", "-i"]
    with (
        terminal(*shell, columns=COLUMNS, env={**environment, "LC_ALL": "C.UTF-8"}, cwd=folder) as seen,
        contextlib.closing(Home(folder, seen)) as here,
    ):
        seen.wait_for(PROMPT)
        yield here


def _new_folder() -> Path:
    while True:
        name = "".join(choices(string.ascii_lowercase + string.digits, k=len(SHOWN) - len("/tmp/")))
        with contextlib.suppress(FileExistsError):
            folder = Path("/tmp") / name
            folder.mkdir(mode=0o700)
            return folder


def _disk(session: Session) -> tuple[str, str, str]:
    """The first one of a VM: its name, its active image and that one's format."""
    disk = session.execute("query-block")[0]
    return disk["device"], disk["inserted"]["file"], disk["inserted"]["drv"]


def _send(pid: int, number: signal.Signals) -> None:
    """End a process, and wait until it has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with contextlib.closing(os.fdopen(process)):
        signal.pidfd_send_signal(process, number)
        assert select.select([process], [], [], 60)[0], f"{pid} does not end"
