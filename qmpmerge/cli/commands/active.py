"""`active`: the one image that a VM must be started from."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, basic
from qmpmerge.cli.run import look

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output


@group.cli.command()
@click.argument("path", type=click.Path(readable=False))
@basic
def active(path: str, options: Options) -> int:
    """
    Print the one image that a VM must be started from.

    PATH is any image of its chain, or their folder. A snapshot and a pivot change which image that is: let a launch script
    ask, and a VM is never started from older data. Headers are read, and the notes of snapshots in other folders; what was
    merged away leads to the base that has its data now.

    \b
    Examples:
      img=$(qmpmerge active /vm/base.raw) || exit 1
      qmpmerge active /vm --json

    \b
    Exit codes:
      0    it is printed
      3    there is none, or more than one: both are said
      6    a merge is not finished: `qmpmerge recover PATH` comes first
    """

    def work(output: "Output") -> str:
        from qmpmerge.operations import active as operation

        output.active(path, operation.active(path))
        return "done"

    return look(options, work)
