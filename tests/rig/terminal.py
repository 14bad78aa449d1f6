"""
Terminals: the command on one, as people see it; and the shells that people type in, each of which says which words a command
got.
"""

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rig.command import COMMAND, Run, invoke

PATIENCE = 60.0

# The completion scripts run the program, people run the function.
BASH = """
PS1='> '
bind 'set enable-bracketed-paste off'
qmpmerge() {{ printf '%s\\0' "$@" > {said}; }}
"""
ZSH = """
PS1='> '
bindkey -e
fpath=({folder}/bin $fpath)
autoload -Uz compinit && compinit -u -D
function qmpmerge {{ printf '%s\\0' "$@" > {said} }}
"""
FISH = """
function fish_prompt; echo '> '; end
function qmpmerge; string join0 -- $argv > {said}; end
"""
STARTED = {
    "bash": (BASH, ["--noprofile", "--rcfile", "{rc}", "-i"]),
    "zsh": (ZSH, ["-d", "-i"]),
    "fish": (FISH, ["--no-config", "--private", "--init-command", "source {rc}", "--interactive"]),
}

# A slow machine is no reason to offer nothing.
PROGRAM = """#!{python}
from qmpmerge.cli import complete, main
complete.SECONDS = 60.0
main()
"""


ENTER, CTRL_C, CTRL_D = "\r", "\x03", "\x04"


class Seen:
    """The command on a terminal of its own: what was shown on it until now."""

    def __init__(self, process: "subprocess.Popen[bytes]", terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self._looked_at = 0
        self.screen = ""

    def wait_for(self, *texts: str) -> str:
        """Until one of them is shown, after what was waited for before; which one, and it is the first of them."""
        while not (
            places := [(place, text) for text in texts if (place := self.screen.find(text, self._looked_at)) >= 0]
        ):
            assert self._read(), f"ended without {texts}: {self.screen!r}"
        place, text = min(places)
        self._looked_at = place + len(text)
        return text

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def end(self) -> Run:
        """Wait until it has ended; `out` is all that was shown, as written, colours included."""
        while self._read():
            pass
        return Run(self.process.wait(PATIENCE), self.screen, "")

    def _read(self) -> bool:
        assert select.select([self._terminal], [], [], PATIENCE)[0], f"silent after {self.screen!r}"
        try:
            more = os.read(self._terminal, 65536)
        except OSError:  # nobody has the other end any more
            return False
        self.screen += more.decode(errors="replace").replace("\r\n", "\n")
        return bool(more)


@contextlib.contextmanager
def on_terminal(
    *arguments: str, columns: int = 80, env: dict[str, str] | None = None, elsewhere: str = "", is_ours: bool = True
) -> Iterator[Seen]:
    """
    The command on a terminal so wide, which controls it if it `is_ours`; `elsewhere` redirects streams that are not on it
    (``< /dev/null``).
    """
    command = ["sh", "-c", f'exec "$0" "$@" {elsewhere}', COMMAND, *arguments]
    with terminal(*command, columns=columns, env=env, is_ours=is_ours) as seen:
        yield seen


@contextlib.contextmanager
def terminal(
    *command: str, columns: int, env: dict[str, str] | None = None, is_ours: bool = True, cwd: Path | None = None
) -> Iterator[Seen]:
    """Any program on one."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    line = ["setsid", *(["--ctty"] if is_ours else []), "--wait", *command]
    environment = {**clean, "TERM": "xterm", **(env or {})}
    with subprocess.Popen(line, env=environment, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            yield Seen(process, ours)
        finally:
            process.kill()
            os.close(ours)


def plain(shown: str) -> str:
    """What is read, without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", shown)


class Terminal:
    """A shell in a folder of its own."""

    def __init__(self, name: str, terminal: int, said: Path) -> None:
        self.name = name
        self._terminal = terminal
        self._said = said
        self.screen = b""

    def type(self, keys: str) -> list[str]:
        """Type them and Enter; the words that the command got."""
        reading = os.open(self._said, os.O_RDONLY | os.O_NONBLOCK)
        os.write(self._terminal, keys.encode() + b"\r")
        deadline, received, more = time.monotonic() + PATIENCE, b"", b""
        try:
            while not received or more:
                ready = select.select([self._terminal, reading], [], [], max(0.0, deadline - time.monotonic()))[0]
                assert ready, f"{keys!r} ended in {self.screen.decode(errors='replace')!r}"
                if self._terminal in ready:
                    self.screen += os.read(self._terminal, 65536)
                if reading in ready:
                    more = os.read(reading, 65536)
                    received += more
                    time.sleep(0.001)  # a FIFO that nobody has opened yet is always ready
        finally:
            os.close(reading)
        return received.decode().split("\0")[:-1]


@contextlib.contextmanager
def shell(name: str, folder: Path) -> Iterator[Terminal]:
    """An interactive one, which completes `qmpmerge`; skipped where it is not installed."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"no {name} here")
    said, rc = folder / "said", folder / (".zshrc" if name == "zsh" else "rc")
    os.mkfifo(said)
    settings, arguments = STARTED[name]
    script = invoke("completion", name).out
    (folder / "bin").mkdir()
    (folder / "bin/_qmpmerge").write_text(script)
    rc.write_text(settings.format(said=said, folder=folder) + (script if name != "zsh" else ""))
    (folder / "bin/qmpmerge").write_text(PROGRAM.format(python=sys.executable))
    (folder / "bin/qmpmerge").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "HOME": str(folder),
        "ZDOTDIR": str(folder),
        "XDG_CONFIG_HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", program, *(argument.format(rc=rc) for argument in arguments)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment) as process:
        os.close(theirs)
        try:
            yield Terminal(name, ours, said)
        finally:
            process.kill()
            os.close(ours)
