"""The commands, a file each; they are listed in the order in which they are imported here."""

from qmpmerge.cli.commands import listing, snapshot, commit, job, recover, clean, doctor, completion  # noqa: F401, I001
from qmpmerge.cli.commands.group import cli

__all__ = ["cli"]
