"""
A real Linux guest, emulated: it boots in seconds, runs commands, and never stops writing.

`guest` boots it, `Guest.start_writer` makes it write, `Guest.check` and `check_image` tell whether a disk holds all that
was acknowledged. What it boots is made by `scripts/build-guest`; the programs inside are in `tests/rig/guest_image`.

All ports and our own monitor are socket pairs whose other ends QEMU inherits, so everything is connected before it
starts: there is nothing to poll and no race. When we die the guest sees its port close and powers off.
"""

import asyncio
import base64
import contextlib
import functools
import itertools
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILD = Path(__file__).parents[2] / "scripts" / "build-guest"

BOOT_SECONDS = 120.0
SECONDS = 60.0
"""How long anything else may take: a busy host is slow, not broken."""

KERNEL_OPTIONS = "console=ttyS0 quiet no_timer_check mitigations=off rcupdate.rcu_expedited=1 panic=-1"
# Without rdrand the kernel takes 5 s to collect randomness, and mkfs waits for it.
MACHINE = "-accel tcg -cpu qemu64,+rdrand -m 256 -display none -nodefaults -no-user-config -no-reboot -S".split()  # noqa: SIM905
REPLY_LIMIT = 16 * 1024 * 1024


class GuestFailed(Exception):
    """The guest, or a command in it, did not do what the test needs. `said` is what it said."""

    def __init__(self, what: str, said: str = "") -> None:
        super().__init__(f"{what}\n{said}".strip())
        self.said = said


@functools.cache
def built() -> Path:
    """The folder of vmlinux, initramfs and writer; builds them if they are missing or old."""
    done = subprocess.run([sys.executable, BUILD], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


@dataclass(frozen=True)
class Verdict:
    """What the checker found: numbers of bad sectors, and its words. `newest` is the last operation seen on the disk."""

    newest: int
    lost: int
    torn: int
    misplaced: int
    foreign: int
    said: str

    @property
    def clean(self) -> bool:
        """Every sector holds what it must."""
        return self.lost + self.torn + self.misplaced + self.foreign == 0

    @classmethod
    def parse(cls, said: str) -> "Verdict":
        """Read the checker's last line; raises GuestFailed where it broke off before that."""
        counts = re.search(r"newest found (\d+): (\d+) lost, (\d+) torn, (\d+) misplaced, (\d+) foreign\n\Z", said)
        if counts is None:
            raise GuestFailed("the checker failed", said)
        newest, lost, torn, misplaced, foreign = map(int, counts.groups())
        return cls(newest, lost, torn, misplaced, foreign, said)


def _check_words(disk: str, seed: int, acknowledged: int, issued: int | None) -> list[str]:
    exact = ["-i", str(issued)] if issued is not None else []
    return ["check", *exact, disk, str(seed), str(acknowledged)]


async def check_image(
    image: Path, seed: int, acknowledged: int, *, form: str = "qcow2", issued: int | None = None
) -> Verdict:
    """
    Check on the host what an image, with all that is below it, shows to a guest; nobody may be writing to it.

    `issued` is the last operation that was sent at all, known after `Writer.stop`: the check is then exact.
    """
    with tempfile.TemporaryDirectory(prefix="view-") as folder:
        view = f"{folder}/raw"
        await _output("qemu-img", "convert", "-f", form, "-O", "raw", image, view)
        words = _check_words(view, seed, acknowledged, issued)
        return Verdict.parse(await _output(built() / "writer", *words, good=(0, 1)))


async def _output(*command: str | Path, good: Sequence[int] = (0,)) -> str:
    pipe, both = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=both)
    output, _ = await process.communicate()
    if process.returncode not in good:
        raise GuestFailed(f"{command}: exit status {process.returncode}", output.decode())
    return output.decode()


class Writer:
    """
    A writer in the guest. `acknowledged` is the last operation known to be on the disk, with all before it; it stays
    right when QEMU is killed. `times` has the `time.monotonic` of each acknowledgement, and `slowest` the seconds, by
    the guest's clock, of the slowest operation since the one before.
    """

    def __init__(self, guest: "Guest", disk: str, seed: int, first: int) -> None:
        self.disk = disk
        self.seed = seed
        self.acknowledged = first - 1
        self.times = [time.monotonic()]
        self.slowest = [0.0]
        self.pid = 0
        self._guest = guest
        self._stopped = False
        self._failure = ""
        self._news = asyncio.Event()

    @property
    def longest_gap(self) -> float:
        """The longest time without an acknowledgement, in seconds; about 0.05 where nothing disturbs it."""
        return max((later - earlier for earlier, later in itertools.pairwise(self.times)), default=0.0)

    @property
    def ended(self) -> bool:
        """It was stopped, or it failed, or the guest is gone."""
        return self._stopped or bool(self._failure)

    async def reach(self, operation: int) -> None:
        """Wait until this operation is acknowledged."""
        await self._until(lambda: self.acknowledged >= operation)

    async def advance(self, operations: int) -> None:
        """Wait until so many more are acknowledged than now."""
        await self.reach(self.acknowledged + operations)

    async def stop(self) -> int:
        """End it; returns its last operation, which is acknowledged then and the last one that was sent."""
        await self._guest.ask(f"kill {self.pid}")  # it may have failed before: then we say so
        await self._until(lambda: self._stopped)
        return self.acknowledged

    async def _until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not reached():
            self._news.clear()
            if self.ended or time.monotonic() > deadline:
                raise GuestFailed(f"the writer of {self.disk} is at operation {self.acknowledged}", self._failure)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), deadline - time.monotonic())

    def hear(self, words: list[str]) -> None:
        """Take in a line of the writer's."""
        match words:
            case [number, microseconds] if number.isdigit():
                self.acknowledged = int(number)
                self.times.append(time.monotonic())
                self.slowest.append(int(microseconds) / 1e6)
            case ["stopped", number]:
                self.acknowledged = int(number)
                self._stopped = True
            case _:
                self._failure = " ".join(words)
        self._news.set()


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Ports:
    """Our ends of the socket pairs."""

    qmp: Stream
    writers: Stream
    control: Stream

    async def close(self) -> None:
        """Close them all; QEMU may be gone."""
        for _, writer in (self.qmp, self.writers, self.control):
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


class Guest:
    """
    A running guest. Made by `guest`.

    `monitor` and `agent_socket` are the UNIX sockets for the product; the bench's own monitor is another one.
    """

    def __init__(self, process: asyncio.subprocess.Process, folder: Path, ports: Ports) -> None:
        self.process = process
        self.monitor = folder / "monitor"
        self.agent_socket = folder / "agent"
        self._folder = folder
        self._ports = ports
        self._qmp_lock = asyncio.Lock()
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[tuple[int, str]]] = {}
        self._writers: dict[str, Writer] = {}
        self._ready = asyncio.Event()
        self._ended = False
        self._listeners = asyncio.gather(self._hear_answers(), self._hear_writers())

    async def boot(self) -> None:
        """Let it run and wait until it takes commands."""
        await self._receive()  # the greeting
        await self.qmp("qmp_capabilities")
        await self.qmp("cont")
        await self._ready.wait()
        if self._ended:
            raise GuestFailed("QEMU ended")

    def said(self) -> str:
        """The last lines of QEMU and of the guest's console."""
        paths = [self._folder / name for name in ("stderr", "console")]
        texts = [path.read_text(errors="replace") for path in paths if path.exists()]
        return "\n".join("\n".join(texts).splitlines()[-30:])

    async def run(self, command: str, *, timeout: float = SECONDS) -> str:
        """Run a shell command in the guest and return its output; raises GuestFailed unless it exits with 0."""
        status, output = await self.ask(command, timeout=timeout)
        if status != 0:
            raise GuestFailed(f"{command}: exit status {status}", output)
        return output

    async def ask(self, command: str, *, timeout: float = SECONDS) -> tuple[int, str]:
        """Run a shell command in the guest; returns its exit status and output. Commands may overlap."""
        if self._ended:
            raise GuestFailed(f"{command}: the guest has ended")
        number = next(self._ids)
        answer: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._ports.control[1].write(b"%d %s\n" % (number, base64.b64encode(command.encode())))
        try:
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            raise GuestFailed(f"{command}: no answer for {timeout} s", self.said()) from None

    async def start_writer(
        self, disk: str, seed: int, *, rate: float | None = None, first: int = 1, rhythm: float = 0.05
    ) -> Writer:
        """
        Start to write to a disk such as ``/dev/vda``, or to an existing file, and wait for the first acknowledgement.

        `rate` limits the operations per second. `first` is more than 1 to go on where a stopped writer ended. `rhythm`
        is the pause between acknowledgements, in seconds.
        """
        if disk in self._writers and not self._writers[disk].ended:
            raise GuestFailed(f"{disk} has a writer already")
        writer = self._writers[disk] = Writer(self, disk, seed, first)
        limit = f"-r {rate}" if rate is not None else ""
        command = f"writer run {limit} -p {round(rhythm * 1000)} -f {first} {disk} {seed} >&4 2>&4 & echo $!"
        writer.pid = int(await self.run(f"{_exists(disk)} {command}"))
        await writer.advance(1)
        return writer

    async def check(self, disk: str, seed: int, acknowledged: int, *, issued: int | None = None) -> Verdict:
        """Check a disk from inside; see `check_image`."""
        words = " ".join(_check_words(disk, seed, acknowledged, issued))
        _, said = await self.ask(f"{_exists(disk)} writer {words}")
        return Verdict.parse(said)

    async def qmp(self, command: str, **arguments: object) -> Any:
        """Run a QMP command on the bench's own monitor; underscores in argument names become hyphens."""
        sent = {key.replace("_", "-"): value for key, value in arguments.items()}
        async with self._qmp_lock, asyncio.timeout(SECONDS):
            self._ports.qmp[1].write(json.dumps({"execute": command, "arguments": sent}).encode())
            while "event" in (reply := await self._receive()):
                pass
        return _value(command, reply)

    async def _receive(self) -> Any:
        line = await self._ports.qmp[0].readline()
        if not line:
            raise GuestFailed("QEMU ended")
        return json.loads(line)

    async def agent(self, command: str, **arguments: object) -> Any:
        """Run a guest agent command over a connection of its own; the socket serves one at a time."""
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_unix_connection(self.agent_socket)
            try:
                writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                return _value(command, json.loads(await reader.readline()))
            finally:
                writer.close()
                await writer.wait_closed()

    async def kill(self) -> None:
        """End QEMU as a crash does. What the writers acknowledged before is final then."""
        with contextlib.suppress(ProcessLookupError):  # it may have crashed on its own
            self.process.kill()
        await self.process.wait()
        await self._listeners

    async def end(self) -> None:
        """End QEMU, however it is."""
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            self.process.terminate()
            await asyncio.wait_for(self.process.wait(), 10)
        await self.kill()

    async def _hear_answers(self) -> None:
        reader = self._ports.control[0]
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                if line == b"ready\n":
                    self._ready.set()
                    continue
                number, status, length = map(int, line.split())
                output = (await reader.readexactly(length)).decode(errors="replace")
                answer = self._answers.pop(number)
                if not answer.done():  # or nobody waits for it any more
                    answer.set_result((status, output))
        self._ended = True
        self._ready.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(GuestFailed("the guest ended during a command"))

    async def _hear_writers(self) -> None:
        with contextlib.suppress(ConnectionError):
            while (line := await self._ports.writers[0].readline()).endswith(b"\n"):  # not one that a kill cut off
                disk, *words = line.decode().split()
                self._writers[disk].hear(words)
        for writer in self._writers.values():
            writer.hear(["the", "guest", "ended"])


def _exists(path: str) -> str:
    # NVMe and SCSI disks appear some time after their drivers.
    return f"until [ -e {path} ]; do usleep 5000; done;"


def _value(command: str, reply: Any) -> Any:
    if "error" in reply:
        raise GuestFailed(command, reply["error"]["desc"])
    return reply["return"]


def _command(folder: Path, descriptors: Sequence[int], agent: bool) -> list[str]:
    qmp, writers, control = descriptors
    kernel = ["-kernel", str(built() / "vmlinux"), "-initrd", str(built() / "initramfs"), "-append", KERNEL_OPTIONS]
    chardevs = [
        f"file,id=console,path={folder}/console",
        f"socket,id=product,path={folder}/monitor,server=on,wait=off",
        f"socket,id=bench,fd={qmp}",
        f"socket,id=writers,fd={writers}",
        f"socket,id=control,fd={control}",
    ]
    devices = ["virtio-serial-pci"]
    if agent:
        chardevs.append(f"socket,id=agent,path={folder}/agent,server=on,wait=off")
        devices.append("virtserialport,chardev=agent,name=org.qemu.guest_agent.0")
    # The guest takes the control port for the last one to come.
    devices += [f"virtserialport,chardev={name},name=qmpmerge.{name}" for name in ("writers", "control")]
    monitors = ["-serial", "chardev:console", "-mon", "product,mode=control", "-mon", "bench,mode=control"]
    pairs = [("-chardev", words) for words in chardevs] + [("-device", words) for words in devices]
    return ["qemu-system-x86_64", *MACHINE, *kernel, *itertools.chain(*pairs), *monitors]


@contextlib.asynccontextmanager
async def _started(folder: Path, agent: bool, arguments: Sequence[str]) -> AsyncIterator[Guest]:
    """Start QEMU with the other ends of our ports, and end it."""
    with contextlib.ExitStack() as sockets:
        pairs = [socket.socketpair() for _ in range(3)]
        for end in itertools.chain(*pairs):
            sockets.enter_context(end)
        ports = Ports(*[await asyncio.open_connection(sock=ours, limit=REPLY_LIMIT) for ours, _ in pairs])
        descriptors = [theirs.fileno() for _, theirs in pairs]
        command = [*_command(folder, descriptors, agent), *arguments]
        try:
            with (folder / "stderr").open("wb") as log:
                process = await asyncio.create_subprocess_exec(*command, pass_fds=descriptors, stdout=log, stderr=log)
            for _, theirs in pairs:
                theirs.close()
            vm = Guest(process, folder, ports)
            try:
                yield vm
            finally:
                await vm.end()
        finally:
            await ports.close()


@contextlib.asynccontextmanager
async def guest(
    disks: Iterable[Sequence[str]] = (), *, agent: bool = True, extra: Sequence[str] = ()
) -> AsyncIterator[Guest]:
    """
    Boot a guest with these disks, each given as QEMU's arguments for it, and end it however the block ends.

    The first virtio-blk disk is ``/dev/vda`` in the guest, and so on; NVMe and virtio-scsi work too, IDE does not.
    """
    arguments = [*itertools.chain(*disks), *extra]
    with tempfile.TemporaryDirectory(prefix="guest-") as folder:
        async with _started(Path(folder), agent, arguments) as vm:
            try:
                async with asyncio.timeout(BOOT_SECONDS):
                    await vm.boot()
            except (GuestFailed, TimeoutError, OSError) as error:
                raise GuestFailed("the guest does not boot", f"{error}\n{vm.said()}") from error
            yield vm
