"""`pull`: shorten a chain from below, into the image that the guest writes to."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli import complete, merge_options, options
from qmpmerge.cli.commands import commit, group
from qmpmerge.cli.merge_options import POLITE_SECONDS
from qmpmerge.cli.options import Options, detaching, for_images, forcing, refuse_together, shared, waiting
from qmpmerge.cli.run import on_target, run
from qmpmerge.errors import FORCEABLE

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Policy
    from qmpmerge.cli.render.output import Output
    from qmpmerge.targets.target import Target


@group.cli.command()
@options.target
@click.argument("disk", required=False, shell_complete=complete.disks)
@merge_options.layers(
    base="Stop above this image, which stays (default: none).", top="Pull into this image (default: the active one)."
)
@options.habits("--wait", "--verbose")
@click.option("--shallow", is_flag=True, help="Pull the image right below the top only.")
@merge_options.speed
@merge_options.verifying(
    "Compare what was copied before the switch, whatever it costs (default: see that nothing is missing).",
    "Do not look.",
)
@options.search
@merge_options.holding()
@merge_options.merged_files
@click.option("--dry-run", is_flag=True, help="Make all checks, show the chain that would result, change nothing.")
@waiting
@detaching
@for_images
@forcing(*FORCEABLE)
@shared
def pull(
    target: str,
    disk: str | None,
    base: str | None,
    top: str | None,
    shallow: bool,
    speed: int | None,
    verify: bool | None,
    search: tuple[str, ...],
    hold: bool,
    merged_files: "Policy | None",
    dry_run: bool,
    polite: bool,
    options: Options,
) -> int:
    """
    Copy what lies below an image into it.

    By default all that lies below the active image goes into it, and it has no backing file any more. With --base what lies
    above that image is pulled, and it stays. With --top it goes into an image further down.

    Images below are only read, so others may be built on them, as on a golden image; they are left where they are, unless
    --merged-files says otherwise and nobody is seen to need them. The VM is started from the same image as before. What is
    pulled takes space where the active image lies.

    LAYER is an index as `qmpmerge chain` shows it (`3`; 1 is the base, `-1` the active image), a file name as it shows it,
    a path, or a node name. What means two images is refused. An index means another image
    once layers are gone: name files in what is run more than once.

    \b
    Examples:
      qmpmerge pull vm1 vda                        all into the active image
      qmpmerge pull vm1 vda --base debian.qcow2    but for that golden image
      qmpmerge pull vm1 vda --top 3 --dry-run      look first
      qmpmerge pull vm1 vda --hold                 copy now, switch later

    A job belongs to QEMU. Ctrl-C cancels it; a second Ctrl-C, a closed terminal, --detach and --timeout leave it, and
    the same command again goes on from where it stands.

    \b
    Exit codes:
      0    pulled, held, planned or unchanged, as asked
      3    refused: the disks are untouched, the hint says what to do instead
      4    no session with TARGET: the disks are untouched
      5    the job failed: the old chain is in use and right
      6    unknown: the outcome is not proven
      7    --timeout passed, or we have left it: the job goes on in QEMU; that of
           images that no VM uses was taken back
      130  cancelled by Ctrl-C, or not begun before --timeout: the old chain is
           in use
    """
    refuse_together({"--base": base is not None, "--shallow": shallow})

    async def work(target: "Target", output: "Output") -> str:
        from qmpmerge.operations import pull as operation

        outcome = await operation.pull(
            target,
            disk,
            base=base,
            top=top,
            shallow=shallow,
            speed=speed,
            verify=verify,
            hold=hold,
            merged_files=merged_files or "keep",
            force=options.force,
            search=search,
            dry_run=dry_run,
            report=output.progress,
            patience=options.patience,
            polite=POLITE_SECONDS if polite else None,
        )
        output.commit(outcome)
        return outcome.verdict

    begun = on_target(target, options, work, write=True, dry_run=dry_run)
    return run(options, begun if dry_run else commit.resuming(target, options, begun, "pull"))
