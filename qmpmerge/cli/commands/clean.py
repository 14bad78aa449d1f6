"""`clean`: remove what merges have put aside."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, shared
from qmpmerge.cli.quantities import Duration
from qmpmerge.cli.run import run

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output


@group.cli.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(readable=False))
@click.option("--dry-run", is_flag=True, help="Say what would be removed, change nothing.")
@click.option(
    "--older-than",
    type=Duration(with_unit=True),
    metavar="TIME",
    help="Only what was merged so long ago, as in 12h, 7d or 2w.",
)
@shared
def clean(paths: tuple[str, ...], dry_run: bool, older_than: float | None, options: Options) -> int:
    """
    Remove merged files that nobody uses or needs any more.

    A merge renames the files that it has merged to NAME.merged. PATH is such a file, or a folder of them. Removed is what
    the note that the merge has left beside it, or else a comparison with the image below it, proves to be merged. What a
    process has open, what another image is built on, and what a merge that was not finished may need, stays.

    \b
    Examples:
      qmpmerge clean /vm --dry-run
      qmpmerge clean /vm --older-than 7d

    \b
    Exit codes:
      0    done, planned, unchanged
      3    refused: nothing was removed, the hint says what to do instead
      6    a file could not be removed
    """

    async def work(output: "Output") -> str:
        from qmpmerge.cli.render.humanize import cleaned_verdict
        from qmpmerge.operations import clean as operation

        found = await operation.clean(paths, dry_run=dry_run, older_than=older_than)
        output.cleaned(found, dry_run=dry_run)
        return cleaned_verdict(found, dry_run=dry_run)

    return run(options, work)
