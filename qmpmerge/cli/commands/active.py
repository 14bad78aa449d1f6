"""`active`: the one image that a VM must be started from."""

import sys
from typing import TYPE_CHECKING

import click

from qmpmerge.cli import streams
from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, basic
from qmpmerge.cli.run import look

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output


@group.cli.command()
@click.argument("path", type=click.Path(readable=False))
@click.option("--drive", is_flag=True, help="Print it as QEMU's -drive takes it: file=FILE,format=FORMAT.")
@basic
def active(path: str, drive: bool, options: Options) -> int:
    """
    Print the one image that a VM must be started from.

    PATH is any image of its chain, or their folder. A snapshot and a pivot change which image that is: let a launch script
    ask, and a VM is never started from older data. Headers are read, and the notes of snapshots in other folders; what was
    merged away leads to the base that has its data now.

    \b
    Examples:
      drive=$(qmpmerge active --drive /vm/base.raw) || exit 1
      qmpmerge active /vm --json

    \b
    Exit codes:
      0    it is printed
      3    there is none, more than one, or doubt: all are said
      5    stdout did not take it
      6    a merge is not finished: `qmpmerge recover PATH` comes first
    """

    def work(output: "Output") -> str:
        from qmpmerge.operations import active as operation

        output.active(operation.active(path), drive=drive)
        return "failed" if streams.is_failing(sys.stdout) else "done"  # a VM is not to be started from an empty name

    return look(options, work)
