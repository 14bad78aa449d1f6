"""The installed command, run and begun."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig import contract, exits

COMMAND = shutil.which("qmpmerge", path=os.path.dirname(sys.executable)) or "qmpmerge"

JOB = "qmpmerge-commit-vda"


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


def invoke(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> Run:
    done = subprocess.run(
        [COMMAND, *arguments],
        stdin=subprocess.DEVNULL,  # whoever runs the tests is asked nothing
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=False,
    )
    run = Run(done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in run.out + run.err, run
    exits.see_that_it_is_told(arguments, done.returncode)
    return held(run) if prints_json(arguments) else run


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
