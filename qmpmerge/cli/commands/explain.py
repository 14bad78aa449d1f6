"""`explain`: the time line of a recording."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, basic
from qmpmerge.cli.run import look

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output


@group.cli.command()
@click.argument("file", type=click.Path(readable=False))
@basic
def explain(file: str, options: Options) -> int:
    """
    Show what a recording holds, as a time line.

    FILE is what `--record` has written. Each QMP command is shown with the reason why it was sent, and with what does the same
    by virsh or qemu-img; what was only asked is one line, however often; then what the guest felt of it, and where the time
    went. A recording that was cut off is shown as far as it goes.

    \b
    Example:
      qmpmerge explain merge.jsonl

    \b
    Exit codes:
      0    it is shown
      3    refused: FILE is no recording, or none that this version reads
    """

    def work(output: "Output") -> str:
        from qmpmerge.recording import explained, reading

        recording = reading.read(file)
        output.explained(explained.explain(recording), unread=recording.unread)
        return "done"

    return look(options, work)
