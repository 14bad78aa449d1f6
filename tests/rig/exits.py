"""The exit codes that the help of a command names: no run of a test may end with another one."""

import functools
import inspect
import re
from collections.abc import Sequence

import click

from qmpmerge.cli.commands.group import FILES, cli

_LIST = re.compile(r"^Exit codes:\n((?:  .*\n?)+)", re.MULTILINE)


@functools.cache
def of(name: str) -> frozenset[int]:
    """Those of one of `FILES`."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    listed = _LIST.search(inspect.cleandoc(command.help or ""))
    assert listed is not None, f"the help of {name} has no exit codes"
    return frozenset(int(code) for code in re.findall(r"^  (\d+) ", listed[1], re.MULTILINE))


def of_all() -> frozenset[int]:
    """Those that any command can end with, as `qmpmerge --help` tells them."""
    return frozenset(int(code) for code in re.findall(r"\b(\d+) \(", cli.epilog or ""))


def see_that_it_is_told(arguments: Sequence[str], code: int) -> None:
    """That a run with this line ends like this; a signal's is told nowhere."""
    name = next((word for word in arguments if word in FILES), None)
    if name is not None and code >= 0:
        assert code in of(name) | of_all(), f"`qmpmerge {name} --help` does not name the exit code {code}"
