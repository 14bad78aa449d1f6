"""
The commands: each declares itself, gathers its options into one value, and runs.

Whatever a user can do here, `import qmpmerge` can do, with the same values and the same errors. Imports that only one
command needs are made where it runs: start-up time is a feature.
"""

import click

from qmpmerge import __version__


class StoryOrder(click.Group):
    """Lists the commands in the order in which one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The order in which they are declared."""
        return list(self.commands)


@click.group(
    cls=StoryOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="TARGET is a QMP socket, unix:PATH, tcp:HOST:PORT, the name of a running VM, pid:N, or an image file.",
)
@click.version_option(__version__, prog_name="qmpmerge", message="%(prog)s %(version)s")
def cli() -> None:
    """
    Merge QEMU disk image chains, while the guest keeps writing, without libvirt.

    \b
    qmpmerge vms                                  which VMs run here
    qmpmerge disks vm1                            their disks
    qmpmerge snapshot vm1 vda=/vm/c.qcow2         put an overlay on top
    qmpmerge chain vm1 vda                        base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2
    qmpmerge commit vm1 vda --top [3]             base.raw <-- c.qcow2
    qmpmerge commit vm1 vda                       base.raw, the guest moved onto it
    """
