"""Tests that are run by root look at things as somebody who is not."""

import codecs
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights; what is meant to be seen must be open to all, see `public`."""
    if os.geteuid() != 0:
        yield
        return
    codecs.lookup("ascii")  # nobody cannot load it, and that would be remembered
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextlib.contextmanager
def public() -> Iterator[Path]:
    """A folder into which everybody may look."""
    with tempfile.TemporaryDirectory(prefix="qmpmerge-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)
