"""A recording, replayed: a socket on which its QEMU answers, and empty images where it had its own."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

from qmpmerge.errors import CannotListen, RecordingUnreadable, SeveralQemus
from qmpmerge.folder import Folder
from qmpmerge.recording import private
from qmpmerge.recording.places import Places
from qmpmerge.recording.reading import Recording
from qmpmerge.recording.script import Divergence, Script
from qmpmerge.recording.server import Server, Tell
from qmpmerge.recording.stand_ins import StandIns
from qmpmerge.value import Value


class Replayed(Value):
    """
    What was played: of `commands` that changed something so many, and those that are left. `diverged` is the first that came
    out of turn. `unasked` are questions of the recording that nobody has asked, `unknown` those that it could not answer.
    """

    socket: str
    commands: int
    played: int
    unplayed: tuple[str, ...]
    diverged: Divergence | None
    unasked: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Whether all was played, and nothing else."""
        return "failed" if self.diverged or self.unplayed else "done"


class Replay:
    """One under way, at `socket`. Made by `replaying`."""

    def __init__(self, path: str, script: Script, server: Server, images: StandIns) -> None:
        self.socket = path
        self._script = script
        self._server = server
        self._images = images

    def serve(self) -> None:
        """The next client, until it leaves."""
        self._server.serve()

    @property
    def result(self) -> Replayed:
        """What has been played so far."""
        script = self._script
        return Replayed(
            self.socket,
            len(script.acts),
            script.played,
            tuple(script.unplayed),
            script.diverged,
            tuple(script.unasked),
            tuple(script.unknown),
            tuple(self._images.missing),
        )


def qemus(recording: Recording) -> list[str]:
    """The names of those that were spoken to, as the recording has them."""
    sessions = (line for run in recording.runs for line in run.lines if line.kind == "session")
    return list(dict.fromkeys(line["name"] for line in sessions))


@contextlib.contextmanager
def replaying(recording: Recording, *, qemu: str | None, path: str | None, tell: Tell) -> Iterator[Replay]:
    """
    Listen at `path`, in a private folder where that is None, as the QEMU of this name, or as the only one. After the block
    nothing is left of it. Raises RecordingUnreadable, SeveralQemus, CannotListen, ToolMissing.
    """
    script = Script(recording.runs, _chosen(recording, qemu))
    with private.folder() as folder:
        places = Places(folder)
        images = StandIns(script, places)
        try:
            asyncio.run(images.make())
            with _listening(path or f"{folder}/monitor") as listener:
                yield Replay(
                    path or f"{folder}/monitor", script, Server(script, places, images, listener, tell), images
                )
        finally:
            images.close()


def _chosen(recording: Recording, qemu: str | None) -> str:
    names = qemus(recording)
    if not names:
        raise RecordingUnreadable(file=recording.file, reason="no session with a QEMU is in it")
    if qemu is None and len(names) == 1:
        return names[0]
    if qemu is None or qemu not in names:
        raise SeveralQemus(file=recording.file, known=names)
    return qemu


@contextlib.contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    """For us alone, at a name that nothing has."""
    folder, name = os.path.split(os.path.abspath(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        try:
            place = Folder(folder)
            mask = os.umask(0o177)
            try:
                listener.bind(f"{place.link}/{name}")
            finally:
                os.umask(mask)
            made = place.inode_of(name)
        except OSError as error:
            raise CannotListen(path=path, reason=error.strerror or str(error)) from None
        with place:
            try:
                listener.listen()
                yield listener
            finally:
                with contextlib.suppress(OSError):
                    place.remove(name, made)
