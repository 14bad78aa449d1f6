"""
A QEMU, or a qemu-storage-daemon, for as long as a block runs, whatever happens in it.

It has its monitors at paths, for the tool that is tested, and one more on a descriptor that it was started with, so that there
is nothing to poll: once this one greets, the others are there too. The kernel ends it when whoever started it dies.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpmerge.testing.programs import escaped
from qmpmerge.testing.session import Session

CPU = ["-M", "q35", "-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-no-user-config"]
"""A PC that stands still."""

LAUNCH = ["setpriv", "--pdeathsig", "KILL", "stdbuf", "-oL"]
"""
Dies with the thread that has started it, and prints line by line. From a test process of 100 MiB this takes 3 ms, and a fork
with a ``preexec_fn`` 14.
"""

LONGEST = 90
"""Bytes of the name of a folder in which there can be sockets: they have 107, and names of their own."""

SHORT = "qmpmerge-testing-"
"""What a folder in /tmp is called that has the sockets of one with a longer name."""

SECONDS = 60.0
"""How long a reply may take; a busy host is slow, not broken."""


@dataclass
class Machine:
    """A running QEMU or qemu-storage-daemon. `target` is its first monitor, `session` one that the test has for itself."""

    process: "subprocess.Popen[bytes]"
    target: str
    session: Session
    folder: Path

    def wait_for_job(self, status: str) -> None:
        """Wait until the only job is in this state, which it may reach after its command was answered."""
        while (job := self.session.execute("query-jobs")[0])["status"] != status:
            assert job["status"] not in ("concluded", "null"), f"{job} instead of {status}"

    def wait_until_gone(self) -> None:
        """Wait until there is no job any more."""
        while jobs := self.session.execute("query-jobs"):
            assert jobs[0]["status"] != "concluded", f"{jobs[0]} waits for somebody"

    def io(self, device: str, command: str) -> None:
        """
        Do guest I/O, by a command of qemu-io's, on a drive id, a node, or a device by its QOM path; its failure fails the test.

        What came of it QEMU prints on its own standard output, which is kept in the file ``stdout``.
        """
        assert self.process.poll() is None, f"no I/O in {self.folder.name}: its QEMU has ended"
        flag = "-d " if device.startswith("/") else ""
        line = f'qemu-io {flag}{device} "{command}"'
        output = self.folder / "stdout"
        before = output.stat().st_size
        answer = self.session.execute("human-monitor-command", command_line=line)
        with output.open() as file:
            file.seek(before)
            answer += file.read()
        assert "rror" not in answer and "failed" not in answer, f"{line}: {answer}"

    def stop(self) -> None:
        """End it as a user would."""
        self.process.terminate()
        self.process.wait(20)

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait(20)


@contextlib.contextmanager
def machine(
    folder: Path,
    *arguments: str,
    program: str = "qemu-system-x86_64",
    cwd: Path | None = None,
    before: Sequence[str] = (),
    more: Sequence[str] = (),
) -> Iterator[Machine]:
    """
    Start a QEMU with the given disks, by the command `before` where there is one, and wait for its monitors: ``monitor`` in the
    folder, and those called `more`. Raises AssertionError, with what QEMU said, where it does not start.
    """
    ours, theirs = socket.socketpair()
    with ours, _sockets(folder, ("monitor", *more)) as paths:
        command = [*before, *LAUNCH, program, *arguments, *_monitors(program, paths, theirs.fileno())]
        with theirs, open(folder / "stderr", "wb") as complaints, open(folder / "stdout", "wb") as output:
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdout=output, stderr=complaints, cwd=cwd or folder
            )
        ours.settimeout(SECONDS)
        try:
            with contextlib.closing(_greeted(ours, command, folder)) as session:
                yield Machine(process, paths[0], session, folder)
        finally:
            _end(process)


def _greeted(connection: socket.socket, command: list[str], folder: Path) -> Session:
    try:
        return Session(connection)
    except (OSError, ValueError) as error:
        raise AssertionError(f"{(folder / 'stderr').read_text()}{shlex.join(command)}") from error


def _monitors(program: str, paths: Sequence[str], descriptor: int) -> list[str]:
    chardevs = [f"socket,id=m{number},path={escaped(path)},server=on,wait=off" for number, path in enumerate(paths)]
    ours = f"socket,id=bench,fd={descriptor}"
    if "storage-daemon" in program:
        names = [f"m{number}" for number in range(len(paths))]
        words = [("--chardev", one, "--monitor", name) for one, name in zip(chardevs, names, strict=True)]
        return [word for pair in (*words, ("--chardev", f"{ours},server=off", "--monitor", "bench")) for word in pair]
    words = [("-chardev", one, "-mon", f"m{number},mode=control") for number, one in enumerate(chardevs)]
    return [word for pair in (*words, ("-chardev", ours, "-mon", "bench,mode=control")) for word in pair] + CPU


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)  # one that a test stopped
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _sockets(folder: Path, names: Sequence[str]) -> Iterator[list[str]]:
    """Paths for sockets, in the folder, or in another one where its own is too long for them (unix(7)); gone afterwards."""
    with contextlib.ExitStack() as stack:
        if len(os.fsencode(folder)) > LONGEST:
            folder = stack.enter_context(_short_folder())
        paths = [str(folder / name) for name in names]
        remove(paths)
        stack.callback(remove, paths)
        yield paths


@contextlib.contextmanager
def _short_folder() -> Iterator[Path]:
    """One in /tmp, locked while it is used; those of runs that were killed go."""
    for left in Path(tempfile.gettempdir()).glob(f"{SHORT}*"):
        with contextlib.suppress(OSError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left)
    with contextlib.ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=SHORT))
            with contextlib.suppress(
                FileNotFoundError
            ):  # another run takes it for one that was left, until it is locked
                stack.enter_context(_locked(folder, fcntl.LOCK_SH))
                folder.stat()
                break
        stack.callback(shutil.rmtree, folder)
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Raises OSError where somebody has it, or it is gone, or a stranger's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(folder)
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def remove(paths: Sequence[str]) -> None:
    """Remove these files, as far as there are any."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
