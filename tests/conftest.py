"""What holds for the whole run, and the disk that most tests begin with; a module that wants another one defines its own."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from rig.disks import Setup, drive
from rig.machines import Content, fill

from qmpmerge.testing import MakeChain

# Whoever runs the tests in the background or without a terminal may have them ignore these, and so would every command that
# the tests start, which heeds that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


# On a busy machine an example takes as long as it takes.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture
def images(qcow2_chain: MakeChain) -> list[Path]:
    """``base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2``."""
    return qcow2_chain("base.raw", "a.qcow2", "b.qcow2", "c.qcow2", fill=False).images


@pytest.fixture
def content(images: list[Path]) -> Content:
    """Data in each of them, and what the disk shows."""
    content = Content()
    fill(images, content)
    return content


@pytest.fixture
def setup(tmp_path: Path, images: list[Path], content: Content) -> Iterator[Setup]:
    """That chain as a -drive disk of a QEMU that stands still."""
    with drive(tmp_path, images, content) as setup:
        yield setup
