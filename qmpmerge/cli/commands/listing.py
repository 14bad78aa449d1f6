"""`vms`, `disks`, `chain` and `jobs`: what is there."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli import complete, options
from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, basic, for_images, forcing, shared
from qmpmerge.cli.run import on_target, run

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.targets.target import Target


@group.cli.command()
@basic
def vms(options: Options) -> int:
    """
    List the running QEMUs of this host and their monitors.

    NAME, and pid:N, is what the other commands take as TARGET. A VM without a QMP monitor is listed as such. A VM of
    libvirt is marked, and left alone by the other commands.

    \b
    Example:
      qmpmerge vms

    \b
    Exit codes:
      0    they are listed
      3    refused: the limit of open files is too low
    """

    async def work(output: "Output") -> str:
        from qmpmerge.processes import vms as running

        output.vms(running.vms())
        return "done"

    return run(options, work)


@group.cli.command()
@options.target
@click.option(
    "--details", is_flag=True, help="Of each disk its device, bus, and the size of the file or device it is in."
)
@for_images
@forcing("libvirt")
@shared
def disks(target: str, details: bool, options: Options) -> int:
    """
    List disks and the image each one uses now.

    \b
    Examples:
      qmpmerge disks vm1
      qmpmerge disks /run/vm1.sock --json

    \b
    Exit codes:
      0    they are listed
      3    refused: the hint says what to do instead
      4    no session with TARGET
      6    TARGET has stopped answering
    """

    async def work(target: "Target", output: "Output") -> str:
        from qmpmerge.targets.target import unfinished

        found = await target.disks(details=details)
        output.disks(found, [odd for disk in found for odd in unfinished(disk)])
        return "done"

    return run(options, on_target(target, options, work))


@group.cli.command()
@options.target
@click.argument("disk", required=False, shell_complete=complete.disks)
@click.option(
    "--details", is_flag=True, help="Of each image its features, snapshots, bitmaps, and the size of its file."
)
@for_images
@forcing("libvirt")
@shared
def chain(target: str, disk: str | None, details: bool, options: Options) -> int:
    """
    Show the chain of a disk, base first.

    What QEMU uses is shown, next to what the images' headers say.

    DISK is a drive id, a qdev id, a node name or the active image's path; it may be left out where only one disk has a
    backing chain. The active image is marked with a star.

    \b
    Examples:
      qmpmerge chain vm1
      qmpmerge chain /vm/c.qcow2
      qmpmerge chain /run/vm1.sock vda --json

    \b
    Exit codes:
      0    it is shown
      3    refused: the hint says what to do instead
      4    no session with TARGET
      6    TARGET has stopped answering
    """

    async def work(target: "Target", output: "Output") -> str:
        output.chain(await target.chain(disk, details=details))
        return "done"

    return run(options, on_target(target, options, work))


@group.cli.command()
@options.target
@forcing("libvirt")
@shared
def jobs(target: str, options: Options) -> int:
    """
    List block jobs and what can be done with each.

    All jobs of TARGET are shown, whoever started them; `qmpmerge job` controls one.

    \b
    Example:
      qmpmerge jobs vm1

    \b
    Exit codes:
      0    they are listed
      3    refused: the hint says what to do instead
      4    no session with TARGET
      6    TARGET has stopped answering
    """

    async def work(target: "Target", output: "Output") -> str:
        output.jobs(await target.jobs())
        return "done"

    return run(options, on_target(target, options, work, live=True))
