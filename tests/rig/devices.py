"""What the kernel makes of images: loop devices and mounts. Each skips the test where we have no leave."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, *options: str | Path) -> Iterator[Path]:
    """Something mounted on a folder, which is made."""
    folder.mkdir(exist_ok=True)
    _or_skip("mount", *options, folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)  # the test may have done it


@contextlib.contextmanager
def loop(file: Path, *options: str) -> Iterator[str]:
    """A loop device on a file, until then or until the test lets it go."""
    device = _or_skip("losetup", "--find", "--show", *options, file).strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)


def _or_skip(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert "wrong fs type" not in done.stderr, done.stderr
    if done.returncode != 0:
        pytest.skip(f"no leave for {command[0]}: {done.stderr}")
    return done.stdout
