"""
The command in forks of one process that has imported it already: hundreds of runs for what a dozen takes otherwise.

``python forks.py`` is that process: lines of JSON in (arguments, folder, seconds), lines of JSON out (exit code, stdout,
stderr). A run that takes too long is ended by its alarm, exit code -14.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rig import exits
from rig.command import Run, held, prints_json

SECONDS = 60

CODES = {0, 2, 3, 4, 5, 6, 7, 130}
"""All but that of a bug."""


class Forks:
    """Such a process; `run` it, and `close` it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        tests = str(Path(__file__).parents[1])
        command = [sys.executable, "-X", "utf8", "-W", "ignore", __file__]  # as the command starts itself in any locale
        env = {**os.environ, "PYTHONPATH": tests, **environment}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

    def run(self, *arguments: str, cwd: Path, seconds: int = SECONDS) -> Run:
        """One run, in this folder."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, str(cwd), seconds]).encode() + b"\n")
        self._process.stdin.flush()
        code, out, err = json.loads(self._process.stdout.readline())
        exits.see_that_it_is_told(arguments, code)
        run = Run(code, out, err)
        return held(run) if prints_json(arguments) and code in CODES else run

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def forks(environment: Mapping[str, str] | None = None) -> Iterator[Forks]:
    """One for as long as the block runs."""
    server = Forks(environment or {})
    try:
        yield server
    finally:
        server.close()


def complaints(run: Run) -> list[str]:
    """What no command may do, whatever it is given: end without a verdict, hang, or say what a terminal obeys."""
    said = run.out + run.err
    found = [f"exit code {run.code}"] if run.code not in CODES else []
    found += [word for word in ("Traceback", "never retrieved", "never awaited", "Warning:") if word in said]
    return found + (["control characters"] if any(c != "\n" and not c.isprintable() for c in said) else [])


def serve() -> None:
    for name in ("listing", "snapshot", "plan", "commit", "pull", "job", "recover", "clean", "doctor", "completion"):
        __import__(f"qmpmerge.cli.commands.{name}")
    __import__("qmpmerge.targets.offline")
    for line in sys.stdin:
        arguments, folder, seconds = json.loads(line)
        sys.stdout.write(json.dumps(_forked(arguments, folder, seconds)) + "\n")
        sys.stdout.flush()


def _forked(arguments: Sequence[str], folder: str, seconds: int) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _become(arguments, folder, seconds, out.fileno(), err.fileno())
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        said = [stream.read().decode(errors="surrogateescape") for stream in (out, err)]
    return os.waitstatus_to_exitcode(status), said[0], said[1]


def _become(arguments: Sequence[str], folder: str, seconds: int, out: int, err: int) -> None:
    from qmpmerge import cli

    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(folder)
        signal.alarm(seconds)
        sys.argv = ["qmpmerge", *arguments]
        cli.main()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(99)


if __name__ == "__main__":
    serve()
