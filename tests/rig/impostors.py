"""Processes that are called like a QEMU and are none."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534


@contextlib.contextmanager
def impostor(folder: Path, *arguments: str, user: int | None = None) -> Iterator[int]:
    """A shell that says it is a QEMU with these arguments, started by `user`; yields its pid."""
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can start a process of somebody else's")
    program = folder / "qemu-system-x86_64"
    if not program.exists():
        shutil.copy("/bin/sh", program)
    command = [str(program), "-c", "echo; read end", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=user, extra_groups=[] if user is not None else None
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()
