"""The installed command, run and begun."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        self.process = subprocess.Popen([COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        assert b'"progress"' in self.process.stderr.readline()

    def end(self) -> Run:
        out, err = self.process.communicate(timeout=60)
        return Run(self.process.returncode, out.decode(), err.decode())


def invoke(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> Run:
    done = subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)
