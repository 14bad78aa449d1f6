"""The command line: parse, call, render."""

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click


def main() -> None:
    """The `qmpmerge` command."""
    import click

    from qmpmerge.cli.commands import cli

    try:
        code = cli.main(prog_name="qmpmerge", standalone_mode=False)
    except click.ClickException as error:
        _usage(error)
        code = error.exit_code
    except click.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: "click.ClickException") -> None:
    """A usage error as click shows it; with --json also as the one object on stdout that a program waits for."""
    error.show()
    if "--json" in sys.argv:
        told = {"name": "usage", "message": error.format_message(), "hint": "see `qmpmerge --help`", "facts": {}}
        sys.stdout.write(json.dumps({"schema": 1, "verdict": "usage", "error": told}) + "\n")
