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


@group.cli.command()
@options.target
@click.argument(
    "overlays",
    metavar="DISK=FILE...",
    nargs=-1,
    required=True,
    type=Assignment(),
    shell_complete=complete.assignments,
)
@click.option("--relative", is_flag=True, help="Write a relative backing name even into another folder.")
@click.option("--quiesce", is_flag=True, help="Freeze the guest's filesystems for the moment; needs --agent.")
@click.option("--agent", metavar="SOCKET", help="The socket of the guest agent.")
@for_images
@forcing("in-use", "libvirt")
@shared
def snapshot(
    target: str,
    overlays: tuple[tuple[str, str], ...],
    relative: bool,
    quiesce: bool,
    agent: str | None,
    options: Options,
) -> int:
    """
    Put overlays (external snapshots) on disks, all or none.

    FILE must not exist; it is made with the size of the disk. The image used so far becomes its backing file and is not
    written any more. The backing name is relative where both lie in one folder.

    \b
    Examples:
      qmpmerge snapshot vm1 vda=/vm/snap1.qcow2
      qmpmerge snapshot vm1 vda=/vm/a1.qcow2 vdb=/vm/b1.qcow2
      qmpmerge snapshot vm1 vda=/vm/s.qcow2 --quiesce --agent /run/vm1-agent.sock

    \b
    Exit codes:
      0    created
      3    refused: nothing was changed
      4    no session with TARGET
      6    unknown: the overlay may be in use, or the guest may still be frozen
    """
    if quiesce != (agent is not None):
        raise click.UsageError("--quiesce and --agent SOCKET go together")
    doubled = [disk for disk, _ in overlays if [name for name, _ in overlays].count(disk) > 1]
    if doubled:
        raise click.UsageError(f"{doubled[0]} is named twice: a disk gets one overlay at a time")

    async def work(target: "Target", output: "Output") -> str:
        from qmpmerge.operations import snapshot as operation

        made = await operation.snapshot(target, dict(overlays), relative=relative, agent=agent, force=options.force)
        output.snapshot(made)
        return "created"

    return run(options, on_target(target, options, work, write=True))
