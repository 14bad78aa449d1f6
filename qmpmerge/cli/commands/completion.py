"""`completion`: what a shell has to run for completion."""

import re

import click

from qmpmerge.cli import options
from qmpmerge.cli.commands import group


@group.cli.command()
@options.habits("--json")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """
    Print the completion script of a shell.

    VMs, disks, layers and jobs are completed live. Put what is printed where your shell looks for it:

    \b
    bash   ~/.local/share/bash-completion/completions/qmpmerge
    zsh    _qmpmerge in a folder of $fpath
    fish   ~/.config/fish/completions/qmpmerge.fish

    \b
    Example:
      qmpmerge completion fish > ~/.config/fish/completions/qmpmerge.fish

    \b
    Exit codes:
      0    it is printed
    """
    from click.shell_completion import get_completion_class

    from qmpmerge.cli import shells

    shells.register()
    maker = get_completion_class(shell)
    assert maker is not None, "it was registered"
    click.echo(re.sub(r"\n+\Z", "", maker(group.cli, {}, "qmpmerge", "_QMPMERGE_COMPLETE").source()))
    return 0
