"""The command line: parse, call, render."""

import contextlib
import gc
import json
import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import click


COLLECT_AFTER = 100_000
"""New objects before the collector looks through them; Python's own 700 costs a sixth of a short command's time."""


def main() -> None:
    """The `qmpmerge` command."""
    gc.set_threshold(COLLECT_AFTER)
    import click

    from qmpmerge.cli.commands.group import cli

    try:
        code = cli.main(prog_name="qmpmerge", standalone_mode=False)
    except click.ClickException as error:
        _usage(error)
        code = error.exit_code
    except click.Abort:
        code = 130
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> NoReturn:
    """Exit without taking the interpreter apart, which takes an eighth of a short command's time and frees nothing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _usage(error: "click.ClickException") -> None:
    """A usage error as click shows it; with --json also as the one object on stdout that a program waits for."""
    error.show()
    if "--json" in sys.argv:
        document = {"name": "usage", "message": error.format_message(), "hint": "see `qmpmerge --help`", "facts": {}}
        sys.stdout.write(json.dumps({"schema": 1, "verdict": "usage", "error": document}) + "\n")
