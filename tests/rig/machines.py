"""
The bench: real QEMUs, paused, on tiny images.

Machines are started with two monitors: one at a path, for the product; one on a descriptor that the bench made itself, so
that there is nothing to poll: once it greets, the other one is there too.
"""

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rig.stored import Stored

MIB = 1024 * 1024
SIZE = 8 * MIB
OLD = {"block_set_io_throttle"}
"""Commands whose arguments have underscores."""
CPU = ["-M", "q35", "-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-no-user-config"]


class Session:
    """A blocking QMP session of the bench's own."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rwb")
        self.events: list[Any] = []
        self.greeting = json.loads(self._stream.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command; an error of QEMU's fails the test."""
        reply = self.ask(command, **arguments)
        assert "error" not in reply, f"{command}: {reply['error']}"
        return reply["return"]

    def ask(self, command: str, **arguments: object) -> Any:
        """Run a command and return the whole reply."""
        sent = {key if command in OLD else key.replace("_", "-"): value for key, value in arguments.items()}
        self._stream.write(json.dumps({"execute": command, "arguments": sent}).encode() + b"\n")
        self._stream.flush()
        while True:
            reply = json.loads(self._stream.readline())
            if "event" not in reply:
                return reply
            self.events.append(reply)

    def event(self) -> Any:
        """The next event, waited for."""
        if not self.events:
            self.events.append(json.loads(self._stream.readline()))
        return self.events.pop(0)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was on its way to a machine that has been killed
            self._stream.close()
        self._connection.close()


@dataclass
class Machine:
    """A running QEMU or qemu-storage-daemon. `target` is its monitor, `session` the bench's own."""

    process: subprocess.Popen[bytes]
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
        Do guest I/O on a drive id, a node, or a device by its QOM path.

        What came of it QEMU prints on its own standard output, which is kept in the file ``stdout``.
        """
        flag = "-d " if device.startswith("/") else ""
        line = f'qemu-io {flag}{device} "{command}"'
        said = self.folder / "stdout"
        before = said.stat().st_size
        answer = self.session.execute("human-monitor-command", command_line=line)
        with said.open() as file:
            file.seek(before)
            answer += file.read()
        assert "rror" not in answer and "failed" not in answer, f"{line}: {answer}"

    def stop(self) -> None:
        """End it as a user would."""
        self.process.terminate()
        self.process.wait(20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@contextlib.contextmanager
def machine(
    folder: Path,
    *arguments: str,
    program: str = "qemu-system-x86_64",
    cwd: Path | None = None,
    before: Sequence[str] = (),
) -> Iterator[Machine]:
    """Start a QEMU with the given disks, by the command `before` where there is one, and wait for its monitors."""
    ours, theirs = socket.socketpair()
    path = str(folder / "monitor")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    command = [*before, "stdbuf", "-oL", program, *arguments, *_monitors(program, path, theirs.fileno())]
    with open(folder / "stderr", "wb") as complaints, open(folder / "stdout", "wb") as output:
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdout=output, stderr=complaints, cwd=cwd or folder
        )
    theirs.close()
    ours.settimeout(60)
    try:
        session = _greeted(ours, command, folder)
        try:
            yield Machine(process, path, session, folder)
        finally:
            session.close()
    finally:
        ours.close()
        if process.poll() is None:
            process.send_signal(18)  # one that a test stopped
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


TCP = ["-chardev", "socket,id=tcp,host={},port=0,server=on,wait=off", "-mon", "tcp,mode=control"]
"""One more monitor for a machine, on a port of this host address that the kernel chooses: see `port`."""


def port(vm: Machine) -> int:
    """That of the `TCP` monitor."""
    (name,) = [entry["filename"] for entry in vm.session.execute("query-chardev") if entry["label"] == "tcp"]
    return int(name.split(",")[0].rpartition(":")[2])


def _greeted(connection: socket.socket, command: list[str], folder: Path) -> Session:
    try:
        return Session(connection)
    except (OSError, ValueError) as error:
        raise AssertionError(f"{command}: {(folder / 'stderr').read_text()}") from error


def _monitors(program: str, path: str, descriptor: int) -> list[str]:
    sockets = [f"socket,id=m0,path={path.replace(',', ',,')},server=on,wait=off", f"socket,id=m1,fd={descriptor}"]
    if "storage-daemon" in program:
        return ["--chardev", sockets[0], "--monitor", "m0", "--chardev", sockets[1] + ",server=off", "--monitor", "m1"]
    return ["-chardev", sockets[0], "-mon", "m0,mode=control", "-chardev", sockets[1], "-mon", "m1,mode=control", *CPU]


# --- images ----------------------------------------------------------------------------------------------------------


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program; its failure fails the test."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def create_encrypted(*arguments: str | Path, cwd: Path | None = None) -> None:
    """
    `qemu-img create` of an image with LUKS, by a slow hash.

    QEMU times its key function first, and gives up ("Unable to get accurate CPU usage") when the clock of its thread has
    not ticked meanwhile: with the default hash that was 27 of 60 times, with this one never. It is told apart all the
    same, since only that failure is no word about the image.
    """
    line = ["qemu-img", "create", "-q", *map(str, arguments)]
    complaint = "at first"
    while complaint:
        done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)
        complaint = done.stderr
        assert done.returncode == 0 or "accurate CPU usage" in complaint, complaint


def make_chain(
    folder: Path, names: Sequence[str] = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2"), size: int = SIZE
) -> list[Path]:
    """A chain with relative backing names, each layer holding data of its own: see `Content`."""
    below: str | None = None
    for name in names:
        _created(name.rpartition(".")[2], below, size).put(folder / name)
        below = name
    return [folder / name for name in names]


@functools.cache
def _created(form: str, below: str | None, size: int) -> Stored:
    """An empty image as qemu-img makes it, on that one."""
    backing = ["-u", "-b", below, "-F", below.rpartition(".")[2]] if below else []
    with tempfile.TemporaryDirectory() as folder:
        run("qemu-img", "create", "-q", "-f", form, *backing, "image", str(size), cwd=Path(folder))
        return Stored.of(Path(folder) / "image")


@dataclass
class Content:
    """What the guest must see: written here and there alike, compared byte by byte."""

    data: bytearray = field(default_factory=lambda: bytearray(SIZE))

    def put(self, pattern: int, offset: int, length: int) -> str:
        """Note a write, and return it as a qemu-io command."""
        self.data[offset : offset + length] = bytes([pattern]) * length
        return f"write -P {pattern} {offset} {length}"

    def check(self, image: Path | str, form: str | None = None) -> None:
        """The image's view must be the noted content. The image must not be in use."""
        run("qemu-img", "check", "-q", image) if not str(image).endswith("raw") else None
        form = form or str(image).rpartition(".")[2]
        view = f"{image}.view"
        run("qemu-img", "convert", "-f", form, "-O", "raw", image, view)
        seen = Path(view).read_bytes()
        os.unlink(view)
        assert len(seen) == len(self.data)
        if seen == self.data:
            return
        differing = [
            block for block in range(0, len(seen), 512) if seen[block : block + 512] != self.data[block : block + 512]
        ]
        raise AssertionError(f"{image} differs at {differing[:5]} and {len(differing)} blocks in all")


def fill(images: Sequence[Path], content: Content) -> None:
    """Write a pattern of its own into each layer, overlapping the layer below, and note what the top shows."""
    before = tuple(map(Stored.of, images))
    commands = [
        (
            content.put(0x10 + number, number * MIB, MIB + 128 * 1024),
            content.put(0x20 + number, 6 * MIB + number * 64 * 1024, 192 * 1024),
        )
        for number in range(len(images))
    ]
    if before not in _FILLED:
        for image, (one, other) in zip(images, commands, strict=True):
            run("qemu-io", "-f", str(image).rpartition(".")[2], "-c", one, "-c", other, image)
        _FILLED[before] = tuple(map(Stored.of, images))
    for image, filled in zip(images, _FILLED[before], strict=True):
        filled.put(image)


_FILLED: dict[tuple[Stored, ...], tuple[Stored, ...]] = {}
"""What `fill` has made of images that were like this."""


def have(program: str) -> bool:
    return shutil.which(program) is not None
