"""`snapshot`: overlays on one or more disks."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli import complete, options
from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Assignment, Options, for_images, forcing, shared
from qmpmerge.cli.run import on_target, run

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.targets.target import Target


def _one_a_disk(
    context: click.Context, param: click.Parameter, overlays: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    """Of a line without TARGET it is that which is missing, though DISK=FILE has been taken for it."""
    if context.resilient_parsing:
        return overlays
    if not overlays:
        target = next(one for one in context.command.params if one.name == "target")
        raise click.MissingParameter(ctx=context, param=target if "=" in context.params["target"] else param)
    names = [name for name, _ in overlays]
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise click.UsageError(f"{doubled[0]} is named twice: a disk gets one overlay at a time", context)
    return overlays


@group.cli.command()
@options.target
@click.argument(
    "overlays",
    metavar="DISK=FILE...",
    nargs=-1,
    callback=_one_a_disk,
    type=Assignment(),
    shell_complete=complete.assignments,
)
@click.option("--reuse", is_flag=True, help="FILE is there: an empty overlay, or a device with one.")
@click.option("--dry-run", is_flag=True, help="Check everything, change nothing.")
@click.option("--quiesce", is_flag=True, help="Freeze the guest's filesystems for that moment.")
@click.option("--agent", metavar="SOCKET", help="--quiesce by the guest agent at this socket.")
@for_images
@forcing("in-use", "libvirt")
@shared
def snapshot(
    target: str,
    overlays: tuple[tuple[str, str], ...],
    reuse: bool,
    dry_run: bool,
    quiesce: bool,
    agent: str | None,
    options: Options,
) -> int:
    """
    Put overlays (external snapshots) on disks, all or none.

    FILE must not exist; it is made with the size of the disk. The image used so far becomes its backing file and is not
    written any more. The backing name is relative where both lie in one folder.

    With --reuse FILE is an overlay that you have made, or a block device with one, whose header names the image used so far;
    it must hold nothing yet.

    \b
    Examples:
      qmpmerge snapshot vm1 vda=/vm/snap1.qcow2
      qmpmerge snapshot vm1 vda=/vm/a1.qcow2 vdb=/vm/b1.qcow2
      qmpmerge snapshot vm1 vda=/vm/snap1.qcow2 --quiesce
      qmpmerge snapshot vm1 vda=/dev/vg/snap1 --reuse --dry-run

    \b
    Exit codes:
      0    created, or planned with --dry-run
      3    refused: nothing was changed
      4    no session with TARGET
      6    unknown: the overlay may be in use, or the guest may still be frozen
    """

    async def work(target: "Target", output: "Output") -> str:
        from qmpmerge.operations import snapshot as operation

        wanted = {"reuse": reuse, "dry_run": dry_run}
        made = await operation.snapshot(target, dict(overlays), **wanted, quiesce=agent or quiesce, force=options.force)
        output.snapshot(made)
        return "planned" if dry_run else "created"

    return run(options, on_target(target, options, work, write=True, dry_run=dry_run))
