"""
The commands: each declares itself, gathers its options into one value, and runs.

Whatever a user can do here, `import qmpmerge` can do, with the same values and the same errors. A command's file is imported
when the command is asked for, and what only one way through it needs where that way begins: start-up time is a feature.
"""

import importlib
import itertools
import sys

import click

from qmpmerge import __version__
from qmpmerge.cli.commands.grouped import Grouped

FILES = {
    "vms": "listing",
    "disks": "listing",
    "chain": "listing",
    "graph": "graph",
    "jobs": "listing",
    "snapshot": "snapshot",
    "active": "active",
    "plan": "plan",
    "commit": "commit",
    "pull": "pull",
    "job": "job",
    "recover": "recover",
    "clean": "clean",
    "tidy": "tidy",
    "doctor": "doctor",
    "explain": "explain",
    "replay": "replay",
    "completion": "completion",
}
"""The commands in the order in which one needs them, and the file of each."""


def typed() -> str | None:
    """The command that was typed, as `FILES` has it; None where there is none."""
    word = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return word if word in FILES else None


SHOWN = frozenset({"-h", "--help", "-V", "--version"})
"""What is text, with `--json` beside it too."""


class Lazy(click.Group):
    """A group whose commands are imported when they are asked for; `--help` asks for all of them."""

    command_class = Grouped

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of `FILES`."""
        return list(FILES)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """``help``, ``help COMMAND`` and ``version`` are the options of these names, and text whatever stands beside them."""
        while args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        if args[:1] == ["version"]:
            args = ["--version"]
        ours = [*itertools.takewhile(lambda word: word.startswith("-"), args)]
        if not SHOWN.isdisjoint(ours):
            args = [*(word for word in ours if word != "--json"), *args[len(ours) :]]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A path is no option, which click 8.1 takes it for, and shows the help."""
        if not (args[0].startswith("-") or args[0] in FILES or ctx.resilient_parsing):
            ctx.fail(f"No such command {args[0]!r}.")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, which declares itself when its file is imported; None where there is no such command."""
        if cmd_name in FILES:
            importlib.import_module(f"qmpmerge.cli.commands.{FILES[cmd_name]}")
        return super().get_command(ctx, cmd_name)


@click.group(
    cls=Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="TARGET is a QMP socket, unix:PATH, tcp:HOST:PORT, the name of a running VM, pid:N, or an image file. Besides the "
    "exit codes that its help names, every command can end with 1 (a bug of qmpmerge), 2 (usage) and 130 (cancelled).",
)
@click.version_option(__version__, "-V", "--version", prog_name="qmpmerge", message="%(prog)s %(version)s")
def cli() -> None:
    """
    Merge QEMU disk image chains, while the guest keeps writing, without libvirt.

    \b
    qmpmerge vms                             which VMs run here
    qmpmerge disks vm1                       their disks
    qmpmerge snapshot vm1 vda=/vm/c.qcow2    put an overlay on top
    qmpmerge chain vm1 vda                   base <-- a <-- b <-- c
    qmpmerge plan vm1 vda                    commit and pull, side by side
    qmpmerge commit vm1 vda --top 3          base <-- c
    qmpmerge commit vm1 vda                  base, the guest moved onto it
    qmpmerge pull vm1 vda                    c, with all that it was built on
    qmpmerge active /vm/base.raw             what the VM must be started from
    """
