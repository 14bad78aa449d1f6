"""`replay`: QEMU's part of a recording, on a socket."""

import signal
from typing import TYPE_CHECKING

import click

from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, basic
from qmpmerge.cli.run import look

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.recording.reading import Recording
    from qmpmerge.recording.replay import Replayed


@group.cli.command()
@click.argument("file", type=click.Path(readable=False))
@click.option("--socket", metavar="PATH", help="Listen here, instead of in a private folder.")
@click.option("--qemu", metavar="NAME", help="Which QEMU of several, as the recording calls it.")
@click.option("--once", is_flag=True, help="End once all was played, and the client has left.")
@basic
def replay(file: str, socket: str | None, qemu: str | None, once: bool, options: Options) -> int:
    """
    Play QEMU's part of a recording on a socket.

    FILE is what `--record` has written. The socket's path is printed: it is a TARGET for other commands, and takes any QMP
    client. Questions are answered as they were; what changes something must come as it came, in its order, and the first
    command that does not is shown, with what was expected. Ctrl-C ends it.

    The names of files are changed: they lie in a private folder, where empty images stand in for those of the recording. So no
    client can reach a file of this machine by a name that comes from the recording; qmpmerge itself knows that it speaks to a
    replay, and changes no file elsewhere.

    \b
    Examples:
      qmpmerge replay merge.jsonl
      qmpmerge replay merge.jsonl --socket /tmp/vm --once

    \b
    Exit codes:
      0    all commands that change something were played, and no others came
      3    refused: FILE is no recording, or the socket cannot be made
      5    it was ended before all was played, or another command came
    """

    def work(output: "Output") -> str:
        from qmpmerge.recording import reading

        found = _played(reading.read(file), output, socket=socket, qemu=qemu, once=once)
        output.replayed(found)
        return found.verdict

    return look(options, work)


def _played(
    recording: "Recording", output: "Output", *, socket: str | None, qemu: str | None, once: bool
) -> "Replayed":
    """Until Ctrl-C, SIGTERM, or the end of its terminal, which end it as it is meant to."""
    from qmpmerge.recording.replay import replaying

    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup wants us to stay
        signal.signal(signal.SIGHUP, _hang_up)
    with replaying(recording, qemu=qemu, path=socket, tell=output.note) as replay:
        try:
            output.listening(replay.socket)
            replay.serve()
            while not (once and not replay.result.unplayed):
                replay.serve()
        except KeyboardInterrupt:
            pass
        return replay.result


def _hang_up(*_signal: object) -> None:
    """The shell says it, and the kernel once more when the shell ends: that must not end the cleaning up."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _end()


def _end(*_signal: object) -> None:
    """As Ctrl-C does, at which asyncio ends what it has begun; in the background of a shell that is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
