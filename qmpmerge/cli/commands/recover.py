"""`recover`: put names and headers right after a crash."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, allow, shared
from qmpmerge.cli.run import run

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.recovery.evidence import Use


@group.cli.command()
@click.argument("path", type=click.Path(readable=False))
@click.option(
    "--use",
    type=click.Choice(["base", "top"]),
    help="Where the evidence does not decide: you have looked, and this one holds the last writes.",
)
@allow("A folder or file that the record may name, besides what lies in the record's own folder.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, change nothing.")
@shared
def recover(path: str, use: "Use | None", dry_run: bool, options: Options) -> int:
    """
    Put names and headers right after an interrupted merge.

    PATH is the image that the VM is started from, even if it is not there any more, another image of its chain, or a
    folder. Which image is right is told by the record that the merge has left beside the image, by QEMU where it still
    runs, by headers and contents; where they do not decide, nothing is changed and the evidence is shown. Can be run again
    at any time. Nothing is deleted, and a file outside the record's folder is renamed only with --allow.

    \b
    Examples:
      qmpmerge recover /vm/c.qcow2 --dry-run
      qmpmerge recover /vm

    \b
    Exit codes:
      0    done, planned, unchanged
      3    refused: another qmpmerge or a VM is at work there, or the record
           names files elsewhere
      4    no session with the QEMU that carried the merge out and still runs
      6    unknown: the evidence does not decide, see --use
      7    a job is at work: the command to follow it is printed
    """

    async def work(output: "Output") -> str:
        from qmpmerge.operations import recover as operation

        found = await operation.recover(path, use=use, allow=options.allow, dry_run=dry_run)
        output.recovered(found)
        return operation.verdict_of(found)

    return run(options, work)
