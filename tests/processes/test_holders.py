"""Who has a file for longer than a moment."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpmerge.journal import spared
from qmpmerge.processes import holders


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, "subprocess.Popen[bytes]"]]:
    """A file, and a process that has it open."""
    path = tmp_path / "a.qcow2.merged"
    path.touch()
    with path.open() as file, subprocess.Popen(["sleep", "600"], stdin=file) as process:
        yield path, process
        process.kill()


async def test_who_only_looks_at_a_file_is_in_nobody_s_way(
    held: tuple[Path, "subprocess.Popen[bytes]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another qmpmerge reads the headers of all that QEMUs have open."""
    path, process = held
    assert [user.pid for user in await holders.lasting([str(path)])] == [process.pid]
    assert spared.in_use(str(path)) == f"in use by sleep (pid {process.pid})"

    def wait(seconds: float) -> None:
        process.kill()
        process.wait()

    monkeypatch.setattr(time, "sleep", wait)
    assert spared.in_use(str(path)) is None
    assert await holders.lasting([str(path)]) == ()
