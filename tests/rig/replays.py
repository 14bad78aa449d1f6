"""`qmpmerge replay` under way."""

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig import contract
from rig.command import COMMAND


@dataclass
class Replaying:
    """It listens at `target`; `end` is Ctrl-C, and tells what it came to."""

    process: subprocess.Popen[str]
    target: str

    @property
    def folder(self) -> Path:
        """Below which the files of the recording lie."""
        return Path(self.target).parent

    def end(self, number: int = signal.SIGINT) -> tuple[int, Any]:
        """Exit code and result."""
        self.process.send_signal(number)
        return self.result()

    def result(self) -> tuple[int, Any]:
        """The same of one that ends by itself."""
        out, err = self.process.communicate(timeout=60)
        contract.hold(out, err)
        return self.process.returncode, json.loads(out)


@contextlib.contextmanager
def replaying(recording: Path, *options: str) -> Iterator[Replaying]:
    """Begin one."""
    words = [COMMAND, "replay", str(recording), "--json", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert '"listening"' in line, line + process.stderr.read()
        try:
            yield Replaying(process, json.loads(line)["socket"])
        finally:
            process.kill()
