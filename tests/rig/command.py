"""The command, run and begun."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig import contract, exits
from rig.forks import forks

COMMAND = shutil.which("qmpmerge", path=os.path.dirname(sys.executable)) or "qmpmerge"

JOB = "qmpmerge-commit-vda"

SECONDS = 60

CODES = {0, 2, 3, 4, 5, 6, 7, 130}
"""All but that of a bug."""


@dataclass
class Run:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one object on stdout."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


class Begun:
    """A command under way, stopped where it has reported progress for the first time."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self.process = subprocess.Popen([COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        assert b'"progress"' in self.process.stderr.readline()

    def end(self) -> Run:
        out, err = self.process.communicate(timeout=60)
        exits.see_that_it_is_told(self._arguments, self.process.returncode)
        return held(Run(self.process.returncode, out.decode(), err.decode()))


def invoke(*arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Run:
    """
    What becomes of a command that is told where it is wrong, by docs/json.md and by its help.

    It is a fork of a process that has imported it; with an environment of its own, which Python itself may read, it is started.
    """
    if env is not None:
        return started(*arguments, cwd=cwd, env=env)
    with forks() as server:
        done = server.run(arguments, cwd=cwd)
    return _sound(arguments, done)


def started(*arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Run:
    """The same of the installed command, started as users do."""
    done = subprocess.run(
        [COMMAND, *arguments],
        stdin=subprocess.DEVNULL,  # whoever runs the tests is asked nothing
        capture_output=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=False,
    )
    return _sound(arguments, done)


def _sound(arguments: Sequence[str], done: "subprocess.CompletedProcess[bytes]") -> Run:
    run = Run(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert "Traceback" not in run.out + run.err, run
    exits.see_that_it_is_told(arguments, done.returncode)
    return held(run) if prints_json(arguments) else run


def attempt(*arguments: str, cwd: Path | None = None, seconds: int = SECONDS) -> Run:
    """What becomes of a command that may do anything, see `complaints`; one that takes too long ends with -14."""
    with forks() as server:
        done = server.run(arguments, cwd=cwd, seconds=seconds)
    exits.see_that_it_is_told(arguments, done.returncode)
    said = [stream.decode(errors="surrogateescape") for stream in (done.stdout, done.stderr)]
    run = Run(done.returncode, *said)
    return held(run) if prints_json(arguments) and run.code in CODES else run


def scripted(
    script: str, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, seconds: int = 0
) -> Run:
    """What becomes of a script of the rig's that is the command and something more; it is a fork too."""
    with forks() as server:
        done = server.run([*map(str, arguments)], script=script, cwd=cwd, env=env, seconds=seconds)
    assert done.returncode != -signal.SIGALRM, f"{arguments} has not ended after {seconds} seconds"
    said = [stream.decode(errors="surrogateescape") for stream in (done.stdout, done.stderr)]
    return Run(done.returncode, *said)


def complaints(run: Run) -> list[str]:
    """What no command may do, whatever it is given: end without a verdict, hang, or say what a terminal obeys."""
    said = run.out + run.err
    found = [f"exit code {run.code}"] if run.code not in CODES else []
    found += [word for word in ("Traceback", "never retrieved", "never awaited", "Warning:") if word in said]
    return found + (["control characters"] if any(c != "\n" and not c.isprintable() for c in said) else [])


def prints_json(arguments: Sequence[str]) -> bool:
    """Whether one object is what is to come of it; what stands after a `--` is no option."""
    arguments = [*itertools.takewhile(lambda word: word != "--", arguments)]
    shown = {"-h", "--help", "-V", "--version"} & set(arguments) or {"help", "version", "completion"} & set(
        arguments[:1]
    )
    return "--json" in arguments and not shown


def held(run: Run) -> Run:
    """The same, which is what docs/json.md says; of one that was killed there is nothing to hold."""
    if run.code >= 0:
        contract.hold(run.out, run.err)
    return run
