"""`plan`: both ways to a shorter chain, side by side."""

import shlex
from typing import TYPE_CHECKING

import click

from qmpmerge.cli import complete, merge_options, options
from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, for_images, forcing, refuse_together, shared
from qmpmerge.cli.quantities import Size
from qmpmerge.cli.run import on_target, run
from qmpmerge.errors import FORCEABLE

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.targets.target import Target


@group.cli.command()
@options.target
@click.argument("disk", required=False, shell_complete=complete.disks)
@merge_options.layers(
    base="What commit would merge into (default: the lowest).",
    top="What commit would merge from (default: the active one).",
)
@click.option("--shallow", is_flag=True, help="What commit --shallow would do.")
@merge_options.keep()
@click.option(
    "--speed",
    type=Size(),
    metavar="SIZE",
    help="How much is copied a second, for the time it takes (default: 200M, assumed).",
)
@options.search
@for_images
@forcing(*FORCEABLE)
@shared
def plan(
    target: str,
    disk: str | None,
    base: str | None,
    top: str | None,
    shallow: bool,
    keep: int | None,
    speed: int | None,
    search: tuple[str, ...],
    options: Options,
) -> int:
    """
    Show both ways to a shorter chain, commit and pull.

    A commit merges down into the base, a pull copies up into the image above; the chain gets as short by both. Of each it is
    told what it copies, which image grows and how much space there is, whether the guest is paused, from which image the VM
    is started then, what it would be refused for, and the command. Who else needs the images is told, and which way to take:

    \b
      a way that is refused is not taken;
      pull, where others need what commit writes to or takes away;
      the way that copies less, by a tenth at least;
      pull, where the VM would be started from another image after a commit;
      else commit, which gives back the space of the images that leave.

    Nothing is changed.

    \b
    Examples:
      qmpmerge plan vm1 vda                  the whole chain into one image
      qmpmerge plan vm1 vda --top 3          of four images, 1 and 4 stay
      qmpmerge plan vm1 vda --keep 2         as tidy --keep 2 leaves it
      qmpmerge plan vm1 vda --json | jq -r .choice

    \b
    Exit codes:
      0    they are shown, refused or not
      3    refused: neither was looked at, the hint says what to do instead
      4    no session with TARGET
      6    TARGET has stopped answering
    """
    refuse_together({"--base": base is not None, "--shallow": shallow})
    refuse_together({"--keep": keep is not None, "--top": top is not None, "--shallow": shallow})

    async def work(target: "Target", output: "Output") -> str:
        from qmpmerge.operations import plan as operation

        ways = await operation.plan(
            target,
            disk,
            base=base,
            top=top,
            shallow=shallow,
            keep=keep,
            speed=speed,
            force=options.force,
            search=search,
        )
        words = _typed(options, search, speed)
        output.plan(ways.typed(shlex.join(words)))
        return ways.verdict

    return run(options, on_target(target, options, work, write=True, dry_run=True))


def _typed(options: Options, search: tuple[str, ...], speed: int | None) -> list[str]:
    """What was typed here and both commands heed; --allow is in them already."""
    given = {"--format": options.form, "--secret": options.secret, "--speed": speed}
    words = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    words += [word for folder in search for word in ("--search", folder)]
    return words + [word for name in sorted(options.force) for word in ("--force", name)]
