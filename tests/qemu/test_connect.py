"""
Every way in which a session can fail, on real sockets: real QEMUs where QEMU itself is at fault, a fake server where only
something else could be.
"""

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from qemu.qmp import Message
from rig import server
from rig.machines import TCP, Machine, have, machine, make_chain, port
from rig.server import CLIENT
from rig.wire import heard

from qmpmerge.errors import (
    AmbiguousName,
    CannotConnect,
    MonitorSilent,
    NobodyListens,
    NoMonitor,
    NoReply,
    NoSuchTarget,
    NotASocket,
    NotQmp,
    QemuRefused,
    SessionLost,
    Unreachable,
)
from qmpmerge.processes import holders
from qmpmerge.qemu import connect, monitor
from qmpmerge.qemu.monitor import Doorbell, Monitor
from qmpmerge.sockets import Address
from qmpmerge.targets import live
from qmpmerge.targets.open import is_image

SOON = 0.3
"""A time that has to pass in full: for peers that never say anything."""

PATIENCE = 30.0
"""A time that must not pass: it ends a test that would hang."""


async def refusal(address: Address, timeout: float = PATIENCE) -> Unreachable:
    """The reason why there is no session."""
    with pytest.raises(Unreachable) as error:
        async with connect.connected(address, timeout=timeout):
            pytest.fail("there is a session")
    assert error.value.exit_code == 4 and error.value.hint
    assert "\n" not in str(error.value)
    return error.value


# --- no socket that we could connect to ---------------------------------------------------------------------------


async def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    error = await refusal(str(tmp_path / "missing"))
    assert isinstance(error, NoSuchTarget) and error.target == str(tmp_path / "missing")


async def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("missing")
    assert isinstance(await refusal(str(tmp_path / "link")), NoSuchTarget)


async def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    error = await refusal(str(tmp_path / "loop"))
    assert isinstance(error, CannotConnect) and error.reason == os.strerror(errno.ELOOP)


async def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = await refusal(str(tmp_path / "file" / "monitor"))
    assert isinstance(error, CannotConnect) and error.reason == os.strerror(errno.ENOTDIR)


async def test_a_name_that_no_file_system_takes() -> None:
    error = await refusal("/" + "x" * 300)
    assert isinstance(error, CannotConnect) and error.reason == os.strerror(errno.ENAMETOOLONG)


async def test_what_is_no_socket_is_called_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "folder"), (tmp_path / "file", "file"), (tmp_path / "pipe", "special file")):
        error = await refusal(str(path))
        assert isinstance(error, NotASocket) and error.facts == {"path": str(path), "kind": kind}
        assert ("name an image in it" in error.hint) == (kind == "folder")


async def test_a_socket_whose_qemu_is_gone(tmp_path: Path) -> None:
    path = str(tmp_path / "monitor")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    error = await refusal(path)
    assert isinstance(error, NobodyListens) and error.address == path


async def test_a_port_where_nobody_listens() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        error = await refusal(("127.0.0.1", port))
    assert isinstance(error, NobodyListens) and error.address == f"tcp:127.0.0.1:{port}"


async def test_a_host_that_has_no_address() -> None:
    error = await refusal(("no-such-host.invalid", 4444))
    assert isinstance(error, CannotConnect) and error.address == "tcp:no-such-host.invalid:4444" and error.reason


# --- no permission ------------------------------------------------------------------------------------------------

UNPRIVILEGED = """
import asyncio, json, os, sys
from qmpmerge.errors import Error
from qmpmerge.qemu import connect, monitor
from qmpmerge.targets import live, open
async def main():
    async with open.open(sys.argv[1]):
        pass
if os.getuid() == 0:
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
try:
    asyncio.run(main())
except Error as error:
    print(json.dumps([error.name, error.facts]))
"""


def refusal_of_another_user(path: str) -> object:
    """What a user who may not connect is told: nobody where we are root, else ourselves."""
    nobody = str(pwd.getpwnam("nobody").pw_uid)
    command = [sys.executable, "-c", UNPRIVILEGED, path, nobody]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users may look into, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def me() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def test_a_socket_that_we_may_not_write_to_names_its_owner(public: Path, me: str) -> None:
    path = str(public / "monitor")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        os.chmod(path, 0o444)
        assert refusal_of_another_user(path) == ["no-permission", {"address": path, "owner": me}]


def test_a_socket_in_a_folder_that_we_may_not_search(public: Path, me: str) -> None:
    """It is no image that a merge has left without its name; whose the folder is tells who may."""
    (public / "private" / "deeper").mkdir(parents=True)
    (public / "private").chmod(0o000)
    for path in (str(public / "private" / "monitor"), str(public / "private" / "deeper" / "monitor")):
        assert refusal_of_another_user(path) == ["no-permission", {"address": path, "owner": me}]
    (public / "private").chmod(0o700)


# --- long paths ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening_at(folder: Path, name: str = "monitor") -> Iterator[str]:
    """A QEMU that made its monitor socket by a short name, in a folder of any length; yields the whole path."""
    folder.mkdir(parents=True, exist_ok=True)
    bench = folder / "bench"
    bench.mkdir()
    arguments = ["-chardev", f"socket,id=short,path={name},server=on,wait=off", "-mon", "short,mode=control"]
    here = os.getcwd()
    os.chdir(bench)  # the rig's own monitor is at a relative path as well
    try:
        with machine(Path(), *arguments, cwd=Path("..")):
            os.chdir(here)
            yield str(folder / name)
    finally:
        os.chdir(here)


async def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    with listening_at(tmp_path / ("d" * 100) / ("e" * 100)) as path:
        assert len(path) > 200
        async with connect.connected(path) as session:
            assert await session.execute("query-name") == {}
            assert session.pid is not None and session.name == path


async def test_a_long_name_in_a_long_path_works(tmp_path: Path) -> None:
    with listening_at(tmp_path / ("d" * 100), "m" * 107) as path:
        async with connect.connected(path) as session:
            assert await session.execute("query-name") == {}


async def test_a_long_link_in_the_folder_we_are_in_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(tmp_path) as vm:
        monkeypatch.chdir(tmp_path)
        os.symlink(vm.target, "m" * 120)
        async with connect.connected("m" * 120) as session:
            assert await session.execute("query-name") == {}


async def test_a_long_path_where_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind("monitor")
    error = await refusal(str(folder / "monitor"))
    assert isinstance(error, NobodyListens) and error.address == str(folder / "monitor")


# --- something else answers ---------------------------------------------------------------------------------------

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def peer(folder: Path, serve: Serve) -> AsyncIterator[str]:
    """A server that treats its client as `serve` does, and stays until the client has gone; yields its path."""
    served: list[asyncio.Task[None]] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.append(task)
        try:
            await serve(reader, writer)
            await writer.drain()
            await reader.read()
        except ConnectionError:
            pass  # it closed on us
        finally:
            writer.close()

    path = str(folder / "peer")
    server = await asyncio.start_unix_server(accept, path)
    try:
        yield path
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*served)
    finally:
        server.close()


def saying(text: bytes, then_close: bool = False) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        if then_close:
            writer.close()

    return serve


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
        b"RFB 003.008\n",
        b"220 mail.example.org ESMTP\r\n",
        b"\n",
        b"\xff\xfe\x00\x1b[2J\x07 binary junk\n",
        b"\x80" * 4096 + b"\n",
        b"[" * 100_000 + b"\n",
        b"[]\n",
        b'"QMP"\n',
        b"{}\n",
        b'{"QMP": 7}\n',
        b'{"QMP": {}}\n',
        b'{"QMP": {"version": [], "capabilities": []}}\n',
        b'{"event": "SHUTDOWN"}\n',
        b'{"return": {}}\n',
    ],
    ids=lambda greeting: repr(greeting[:24]),
)
async def test_what_is_no_greeting_is_not_qmp(tmp_path: Path, greeting: bytes) -> None:
    async with peer(tmp_path, saying(greeting)) as path:
        error = await refusal(path)
    assert isinstance(error, NotQmp) and error.address == path
    assert error.got and error.got.isprintable() and len(error.got) <= 200


async def test_a_peer_that_says_no_more_after_half_a_greeting(tmp_path: Path) -> None:
    async with peer(tmp_path, saying(b'{"QMP": {"version"')) as path:
        assert isinstance(await refusal(path, SOON), MonitorSilent)


@pytest.mark.parametrize("before", [b"", b'{"QMP": {"version"'])
async def test_a_peer_that_closes_at_once(tmp_path: Path, before: bytes) -> None:
    async with peer(tmp_path, saying(before, then_close=True)) as path:
        error = await refusal(path)
    assert isinstance(error, NotQmp) and error.got
    assert before or error.got == "it closed the connection at once"


async def test_the_human_monitor_of_a_qemu(tmp_path: Path) -> None:
    human = tmp_path / "human"
    with machine(tmp_path, "-monitor", f"unix:{human},server=on,wait=off"):
        error = await refusal(str(human))
    assert isinstance(error, NotQmp) and "human monitor" in error.hint


@pytest.mark.parametrize(
    "answer",
    [
        b'{"error": {"class": "GenericError", "desc": "no"}}\n',
        b'{"neither": 1}\n',
        b"junk\n",
    ],
)
async def test_a_peer_that_greets_and_then_refuses_to_negotiate(tmp_path: Path, answer: bytes) -> None:
    async with peer(tmp_path, greeting_then(saying(answer))) as path:
        error = await refusal(path)
    assert isinstance(error, NotQmp) and error.got.isprintable()


async def test_a_peer_that_greets_and_closes(tmp_path: Path) -> None:
    async with peer(tmp_path, greeting_then(saying(b"", then_close=True))) as path:
        assert isinstance(await refusal(path), NotQmp)


@pytest.mark.parametrize("version", [{}, {"qemu": {}}, {"qemu": {"major": "x", "minor": 0, "micro": 0}}, {"qemu": 7}])
async def test_a_peer_that_greets_without_qemus_version(tmp_path: Path, version: dict[str, object]) -> None:
    async with peer(tmp_path, greeting_then(fake([]), version)) as path:
        error = await refusal(path)
    assert isinstance(error, NotQmp)


# --- nothing answers ----------------------------------------------------------------------------------------------


async def test_a_peer_that_never_greets(tmp_path: Path) -> None:
    async with peer(tmp_path, saying(b"")) as path:
        error = await refusal(path, SOON)
    assert isinstance(error, MonitorSilent) and (error.address, error.seconds) == (path, SOON)


async def test_a_peer_that_never_answers_the_negotiation(tmp_path: Path) -> None:
    async with peer(tmp_path, greeting_then(saying(b""))) as path:
        assert isinstance(await refusal(path, SOON), MonitorSilent)


@contextlib.contextmanager
def another_client(path: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the monitor, until the end of the block or of its stdin."""
    command = [sys.executable, "-c", CLIENT, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"greeted\n"
        yield process


@pytest.mark.skipif(not have("ss"), reason="no ss (iproute2) here")
async def test_a_monitor_that_another_client_holds_names_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holders, "_SS_SECONDS", PATIENCE)  # on a busy host
    with machine(tmp_path) as vm, another_client(vm.target) as client:
        with pytest.raises(MonitorSilent) as error:
            async with live.live(vm.target, timeout=SOON):
                pytest.fail("there is a session")
        assert f"(pid {client.pid})" in error.value.holder and "python" in error.value.holder
        assert error.value.address == vm.target and "second monitor" in error.value.hint


async def test_a_monitor_is_ours_as_soon_as_its_holder_has_gone(tmp_path: Path) -> None:
    with machine(tmp_path) as vm:
        with another_client(vm.target) as client:
            assert isinstance(await refusal(vm.target, SOON), MonitorSilent)
            client.kill()
        async with connect.connected(vm.target, timeout=PATIENCE) as session:
            assert await session.execute("query-name") == {}


async def test_a_monitor_where_too_many_wait_already(tmp_path: Path) -> None:
    path = str(tmp_path / "monitor")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(path)
        error = await refusal(path)
    assert isinstance(error, MonitorSilent) and "waiting" in error.holder
    assert "0 s" not in str(error) and "--polite" in error.hint


@pytest.mark.parametrize("through_host", [False, True])
async def test_a_stopped_qemu_is_said_to_be_stopped(tmp_path: Path, through_host: bool) -> None:
    with machine(tmp_path) as vm:
        server.stop(vm)
        with pytest.raises(MonitorSilent) as error:
            async with (
                live.live(vm.target, timeout=SOON) if through_host else connect.connected(vm.target, timeout=SOON)
            ):
                pytest.fail("there is a session")
        assert error.value.holder == f"QEMU (pid {vm.process.pid}) is stopped"
        (command,) = error.value.hint.split("`")[1::2]
        assert command == f"kill -CONT {vm.process.pid}"
        vm.process.send_signal(signal.SIGCONT)
        async with connect.connected(vm.target) as session:
            assert await session.execute("query-name") == {}


# --- a session that ends too early --------------------------------------------------------------------------------

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}


def greeting_then(serve: Serve, version: dict[str, object] | None = None) -> Serve:
    """Greet as QEMU does and wait for the client to negotiate."""
    told: dict[str, object] = {"version": VERSION if version is None else version, "capabilities": []}

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps({"QMP": told}).encode() + b"\n")
        assert (await message(reader))["execute"] == "qmp_capabilities"
        await serve(reader, writer)

    return greet


async def message(reader: asyncio.StreamReader) -> dict[str, object]:
    """The client's next message; it ends where its JSON does."""
    received = b""
    while True:
        received += await reader.readuntil(b"}")
        with contextlib.suppress(json.JSONDecodeError):
            decoded: dict[str, object] = json.loads(received)
            return decoded


def fake(answers: list[bytes], then_close: bool = False) -> Serve:
    """Accept the negotiation, then answer one command after the other; ``ID`` becomes the command's id."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"return": {}}\n')
        for answer in answers:
            command = await message(reader)
            writer.write(answer.replace(b"ID", json.dumps(command["id"]).encode()))
        if then_close:
            writer.close()

    return serve


@contextlib.asynccontextmanager
async def session_with(folder: Path, *answers: bytes, then_close: bool = False) -> AsyncIterator[Monitor]:
    """A session with a peer that accepts the negotiation and then answers like this."""
    async with (
        peer(folder, greeting_then(fake(list(answers), then_close))) as path,
        connect.connected(path, timeout=PATIENCE) as session,
    ):
        yield session


async def test_a_fake_that_answers_properly_is_believed(tmp_path: Path) -> None:
    async with session_with(tmp_path, b'{"return": [1, 2], "id": ID}\n', b'{"return": {}, "id": ID}\n') as session:
        assert await session.execute("query-name") == [1, 2]
        assert await session.execute("stop") == {}
        assert session.version == (7, 2, 22) and session.pid is None


@pytest.mark.parametrize(
    "answer",
    [
        b"junk\n",
        b"\xff\xfe binary\n",
        b"[1, 2]\n",
        b"{",
        b'{"error": {}, "id": ID}\n',
        b'{"error": "no", "id": ID}\n',
        b'{"error": {"class": "GenericError", "desc": 7}, "id": ID}\n',
        b'{"id": ID}\n',
        b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n',
        b'{"return": ' + b"9" * 5000 + b', "id": ID}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=lambda answer: repr(answer[:40]),
)
async def test_an_answer_that_makes_no_sense_leaves_the_outcome_unknown(tmp_path: Path, answer: bytes) -> None:
    async with session_with(tmp_path, answer, then_close=answer == b"{") as session:
        with pytest.raises(SessionLost) as error:
            await session.execute("job-finalize", id="j")
    assert error.value.command == "job-finalize" and error.value.target == session.name
    assert error.value.exit_code == 6 and error.value.reason and "\n" not in str(error.value)


@pytest.mark.parametrize("before", [b"", b'{"return": {}'])
async def test_a_peer_that_closes_in_the_middle_of_a_reply(tmp_path: Path, before: bytes) -> None:
    async with session_with(tmp_path, before, then_close=True) as session:
        with pytest.raises(SessionLost) as error:
            await session.execute("query-jobs")
        assert error.value.command == "query-jobs"
        with pytest.raises(SessionLost) as error:
            await session.execute("query-block")  # there is no session any more
        assert error.value.command == "query-block" and error.value.reason == "it had ended already"


async def test_a_reply_to_something_else_is_no_reply(tmp_path: Path) -> None:
    async with session_with(tmp_path, b'{"return": {}, "id": "another"}\n', b'{"return": 7, "id": ID}\n') as session:
        with pytest.raises(NoReply):
            await session.execute("query-name", timeout=SOON)
        assert await session.execute("query-name") == 7


async def test_a_reply_larger_than_qmp_libraries_allow_is_read(tmp_path: Path) -> None:
    large = b'{"return": "' + b"x" * (11 * 1024 * 1024) + b'", "id": ID}\n'
    async with session_with(tmp_path, large) as session:
        assert len(await session.execute("query-name")) == 11 * 1024 * 1024


async def test_leaving_a_session_that_has_died_is_quiet(tmp_path: Path) -> None:
    with machine(tmp_path) as vm:
        async with connect.connected(vm.target):
            vm.kill()


async def test_a_qemu_that_is_killed_during_a_command(tmp_path: Path) -> None:
    with machine(tmp_path) as vm:
        async with connect.connected(vm.target) as session:
            server.stop(vm)
            command = asyncio.ensure_future(session.execute("query-block"))
            await asyncio.sleep(0)
            vm.kill()
            with pytest.raises(SessionLost) as error:
                await command
    assert (error.value.target, error.value.command, error.value.image) == (vm.target, "query-block", "")
    assert error.value.reason


async def test_a_qemu_that_quits_is_a_session_lost_afterwards(tmp_path: Path) -> None:
    with machine(tmp_path) as vm:
        async with connect.connected(vm.target) as session:
            vm.stop()
            with pytest.raises(SessionLost):
                await session.execute("query-block")


async def test_a_qemu_that_stops_answering_may_still_run_the_command_later(tmp_path: Path) -> None:
    with machine(tmp_path) as vm:
        async with connect.connected(vm.target) as session:
            server.stop(vm)
            with pytest.raises(NoReply) as error:
                await session.execute("object-add", timeout=SOON, qom_type="throttle-group", id="late")
            assert error.value.facts == {"target": vm.target, "command": "object-add", "seconds": SOON}
            vm.process.send_signal(signal.SIGCONT)
            # The reply that comes too late is not taken for that of the next command.
            objects = await session.execute("qom-list", path="/objects")
            assert "late" in [entry["name"] for entry in objects]


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Machine]:
    """A QEMU with one disk, ``base.raw <-- a.qcow2``."""
    images = make_chain(tmp_path, ["base.raw", "a.qcow2"])
    with machine(tmp_path, "-drive", f"file={images[-1]},format=qcow2,if=none,id=vda") as running:
        yield running


@pytest.fixture
async def session(vm: Machine) -> AsyncIterator[Monitor]:
    async with connect.connected(vm.target) as connected:
        yield connected


async def test_a_session_knows_its_qemu(vm: Machine, session: Monitor) -> None:
    told = vm.session.greeting["QMP"]["version"]["qemu"]
    assert session.pid == vm.process.pid and session.name == vm.target
    assert session.version == (told["major"], told["minor"], told["micro"])


async def test_a_command_error_has_qemus_words(session: Monitor) -> None:
    with pytest.raises(QemuRefused) as error:
        await session.execute("job-cancel", id="nope")
    assert (error.value.command, error.value.reason) == ("job-cancel", "Job not found")
    assert isinstance(await session.execute("query-block"), list)  # the session lives on


async def test_underscores_in_arguments_become_hyphens(session: Monitor) -> None:
    await session.execute("object-add", qom_type="throttle-group", id="g")
    assert "g" in [entry["name"] for entry in await session.execute("qom-list", path="/objects")]


@pytest.mark.parametrize("name", ["ü", "a b", "new\nline", "\x1b[31m", "{}", '"', "\\", "虚"])
async def test_an_odd_name_reaches_qemu_as_it_is(session: Monitor, name: str) -> None:
    with pytest.raises(QemuRefused) as error:
        await session.execute("blockdev-add", driver="file", node_name="n", filename=f"/nowhere/{name}")
    assert f"/nowhere/{name}" in error.value.reason


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff"), "\ud800"])
async def test_a_name_that_is_no_utf8_is_an_error_of_the_command_and_not_of_the_session(
    session: Monitor, name: str
) -> None:
    with pytest.raises(QemuRefused) as error:
        await session.execute("blockdev-add", driver="file", node_name="n", filename=f"/nowhere/{name}")
    assert error.value.command == "blockdev-add"
    assert isinstance(await session.execute("query-block"), list)


async def test_a_qemu_tells_the_truth_about_what_it_accepts(session: Monitor) -> None:
    assert await session.accepts("block-commit", "backing-file")
    assert await session.accepts("block-commit", "on-error")
    assert not await session.accepts("block-commit", "nonsense")
    assert not await session.accepts("no-such-command", "backing-file")
    assert not await session.accepts("BLOCK_JOB_READY", "nonsense")
    for argument in ("backing-mask-protocol", "auto-finalize"):
        assert await session.accepts("block-commit", argument) == await is_known(session, argument)


async def is_known(session: Monitor, argument: str) -> bool:
    """Ask by trying: QEMU names an argument that it does not know before it looks at the others."""
    with pytest.raises(QemuRefused) as error:
        await session.execute("block-commit", device="vda", top_node="nope", **{argument: True})
    return "unexpected" not in error.value.reason


async def test_the_conversation_can_be_listened_to(vm: Machine) -> None:
    said: list[tuple[str, str]] = []
    async with heard(lambda direction, text: said.append((direction, text))), connect.connected(vm.target) as session:
        await session.execute("query-name")
        with pytest.raises(QemuRefused):
            await session.execute("job-cancel", id="nope")
    assert [(direction, json.loads(text)) for direction, text in said] == [
        ("->", {"execute": "query-name"}),
        ("<-", {"return": {}}),
        ("->", {"execute": "job-cancel", "arguments": {"id": "nope"}}),
        ("<-", {"error": {"class": "GenericError", "desc": "Job not found"}}),
    ]


# --- the doorbell -------------------------------------------------------------------------------------------------


class Rings:
    """A trace that notes what rang."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __call__(self, direction: str, text: str) -> None:
        if direction == "<!":
            self.events.append(text)


async def until_it_rings(doorbell: Doorbell) -> None:
    """Fails where it does not ring."""
    async with asyncio.timeout(PATIENCE):
        await doorbell.wait(10 * PATIENCE)


async def test_the_doorbell_rings_for_a_job(vm: Machine) -> None:
    rings = Rings()
    async with heard(rings), connect.connected(vm.target) as session, session.listening() as doorbell:
        vm.session.execute("block-commit", job_id="j", device="vda", auto_dismiss=False)
        await until_it_rings(doorbell)
        while not any("concluded" in event or "ready" in event for event in rings.events):
            await until_it_rings(doorbell)
    assert any("JOB_STATUS_CHANGE" in event and "'created'" in event.replace('"', "'") for event in rings.events)


async def test_what_rang_before_anybody_waited_is_not_lost(vm: Machine) -> None:
    rings = Rings()
    async with heard(rings), connect.connected(vm.target) as session, session.listening() as doorbell:
        vm.session.execute("block-commit", job_id="j", device="vda", auto_dismiss=False)
        await session.execute("query-jobs")  # its reply comes after the events
        assert rings.events
        await until_it_rings(doorbell)


async def test_the_doorbell_does_not_ring_for_anything_else(vm: Machine) -> None:
    rings = Rings()
    async with heard(rings), connect.connected(vm.target) as session, session.listening() as doorbell:
        vm.session.execute("system_reset")
        await session.execute("query-status")
        assert any('"RESET"' in event for event in rings.events)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await doorbell.wait(PATIENCE)


# --- memory -------------------------------------------------------------------------------------------------------

MANY, FEW = 2000, 50


def kept() -> int:
    """How many messages of QMP are in our memory."""
    gc.collect()
    return sum(isinstance(thing, Message) for thing in gc.get_objects())


def shout(vm: Machine) -> None:
    """Somebody else pauses a job and lets it go on, again and again: two events each time."""
    for number in range(MANY):
        vm.session.execute("job-resume" if number % 2 else "job-pause", id="j")
        vm.session.events.clear()


@pytest.mark.parametrize("traced", [False, True])
async def test_the_events_of_a_qemu_are_not_kept(vm: Machine, traced: bool) -> None:
    vm.session.execute("block-commit", job_id="j", device="vda", auto_dismiss=False)
    vm.wait_for_job("ready")
    rings = Rings()
    async with heard(rings) if traced else contextlib.nullcontext(), connect.connected(vm.target) as session:
        before = kept()
        shout(vm)
        await session.execute("query-status")
        assert kept() - before < FEW
        async with session.listening() as doorbell:
            shout(vm)
            await session.execute("query-status")
            await until_it_rings(doorbell)
            shout(vm)
            await session.execute("query-status")
            assert kept() - before < FEW
            await until_it_rings(doorbell)
    assert len(rings.events) >= (3 * MANY if traced else 0)


@pytest.mark.parametrize(
    "message",
    [
        b'{"event": "JOB_STATUS_CHANGE", "data": {"status": "running", "id": "j"}, "timestamp": {}}\n',
        b'{"event": "RESET", "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}}\n',
        b'{"return": {"status": "running"}, "id": "another"}\n',
        b'{"error": {"class": "GenericError", "desc": "no"}, "id": "another"}\n',
        b'{"event": "JOB_STATUS_CHANGE", "data": "' + b"x" * 10_000 + b'"}\n',
        b'{"return": {}, "id": ID}\n',
    ],
    ids=lambda message: repr(message[:60]),
)
async def test_what_a_server_sends_unasked_is_not_kept(tmp_path: Path, message: bytes) -> None:
    flood = message * MANY + b'{"return": 7, "id": ID}\n'
    async with (
        peer(tmp_path, greeting_then(fake([flood, b'{"return": 8, "id": ID}\n']))) as path,
        connect.connected(path, timeout=PATIENCE) as session,
        session.listening() as doorbell,
    ):
        before = kept()
        assert await session.execute("query-name") in (7, {})
        assert await session.execute("query-name") == 8
        assert kept() - before < FEW
        await doorbell.wait(0)


async def test_a_line_without_an_end_is_the_end_of_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "LARGEST_REPLY", 1024 * 1024)
    async with session_with(tmp_path, b'{"return": "' + b"x" * (8 * 1024 * 1024)) as session:
        with pytest.raises(SessionLost):
            await session.execute("query-named-block-nodes", timeout=PATIENCE)


async def test_without_an_event_the_doorbell_returns_after_the_time_given(session: Monitor) -> None:
    async with session.listening() as doorbell, asyncio.timeout(PATIENCE):
        await doorbell.wait(0.01)


async def test_the_doorbell_of_a_dead_session_returns_after_the_time_given(vm: Machine, session: Monitor) -> None:
    async with session.listening() as doorbell:
        vm.kill()
        async with asyncio.timeout(PATIENCE):
            await doorbell.wait(0.01)
        with pytest.raises(SessionLost):
            await session.execute("query-jobs")


# --- over TCP -----------------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "target"),
    [
        ("127.0.0.1", "tcp:127.0.0.1:{}"),
        ("127.0.0.1", "tcp:localhost:{}"),
        ("127.0.0.1", "tcp::{}"),
        pytest.param("::1", "tcp:[::1]:{}", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
    ],
)
async def test_a_monitor_on_a_port(tmp_path: Path, host: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Whatever comes is acknowledged at once: cont, stop and three questions took 48 ms, since QEMU keeps a reply back until the
    event before it is acknowledged, and take 2.
    """
    options: list[int] = []
    set_option = socket.socket.setsockopt

    def noted(connection: socket.socket, level: int, option: int, value: int) -> None:
        options.append(option)
        set_option(connection, level, option, value)

    with machine(tmp_path, *(argument.format(host) for argument in TCP)) as vm:
        async with live.live(target.format(port(vm)), timeout=PATIENCE) as host_there:
            monkeypatch.setattr(socket.socket, "setsockopt", noted)
            assert await host_there.monitor.execute("query-name") == {}
            assert host_there.pid is None  # the kernel tells it for sockets of this host only
    assert options.count(socket.TCP_QUICKACK) >= 2  # with what is sent, and with what comes


# --- what a target means ------------------------------------------------------------------------------------------


def meant(target: str) -> tuple[Address, int]:
    (address,), vm = live.find(target)
    assert vm is not None
    return address, vm.pid


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("unix:/run/vm.sock", "/run/vm.sock"),
        ("unix:vm.sock", "vm.sock"),
        ("tcp:localhost:4444", ("localhost", 4444)),
        ("tcp:10.0.0.7:4444", ("10.0.0.7", 4444)),
        ("tcp:[::1]:4444", ("::1", 4444)),
        ("tcp::4444", ("localhost", 4444)),
    ],
)
def test_an_address_is_taken_at_its_word(target: str, address: Address) -> None:
    assert live.find(target) == ([address], None)


@pytest.mark.parametrize("target", ["tcp:localhost", "tcp:localhost:", "tcp:localhost:qmp", "tcp:", "tcp:localhost:-1"])
def test_a_tcp_address_needs_a_port(target: str) -> None:
    with pytest.raises(NoSuchTarget) as error:
        live.find(target)
    assert error.value.target == target


@pytest.mark.parametrize("target", ["/no/such/socket", "./missing", "no-such-vm", "pid:0", "pid:x", "pid:", ""])
def test_what_is_neither_a_path_nor_a_running_qemu_is_refused(target: str) -> None:
    with pytest.raises(NoSuchTarget) as error:
        live.find(target)
    assert error.value.target == target


async def test_an_image_is_the_other_door_and_no_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (image,) = make_chain(tmp_path, ["base.raw"])
    (tmp_path / "link").symlink_to(image)
    monkeypatch.chdir(tmp_path)
    for target in (str(image), "base.raw", "./link"):
        assert is_image(target)
        with pytest.raises(NotASocket) as error:
            async with live.live(target):
                pytest.fail("there is a session")
        assert error.value.facts == {"path": target, "kind": "file"}


def test_a_socket_a_folder_and_a_name_are_no_images(tmp_path: Path) -> None:
    path = str(tmp_path / "monitor")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        assert not is_image(path) and not is_image(f"unix:{path}")
    for target in (str(tmp_path), str(tmp_path / "missing"), "no-such-vm", "pid:1", "tcp:localhost:4444", "nul\0", ""):
        assert not is_image(target)


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A VM's name that no other QEMU here has."""
    return f"vm-{os.getpid()}-{tmp_path.name}"


async def test_a_running_qemu_is_found_by_its_name_and_by_its_pid(tmp_path: Path, name: str) -> None:
    with machine(tmp_path, "-name", name) as vm:
        for word in (name, f"pid:{vm.process.pid}"):
            assert meant(word) == (vm.target, vm.process.pid)
            async with live.live(word) as target:
                assert target.pid == vm.process.pid and target.name == word


def test_a_path_that_exists_is_never_taken_for_a_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with machine(tmp_path, "-name", name) as vm:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(name)
        assert live.find(name) == ([name], None)
        assert not is_image(name)
        os.unlink(name)
        (tmp_path / name).touch()
        assert live.find(name) == ([name], None)
        assert is_image(name)
        os.unlink(name)
        assert meant(name) == (vm.target, vm.process.pid)


def test_two_qemus_of_one_name_are_both_listed(tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    with machine(tmp_path, "-name", name) as one, machine(tmp_path / "other", "-name", name) as two:
        with pytest.raises(AmbiguousName) as error:
            live.find(name)
        assert error.value.pids == sorted([one.process.pid, two.process.pid])
        assert f"pid:{error.value.pids[0]}" in error.value.hint


def test_a_qemu_without_a_monitor_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    with machine(tmp_path, "-name", name) as vm:
        os.unlink(vm.target)
        with pytest.raises(NoMonitor) as error:
            live.find(name)
        assert error.value.facts == {"target": name, "pid": vm.process.pid}


async def test_messages_are_written_out_for_a_log_only_where_somebody_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """qemu.qmp does it for each of them, at some ten milliseconds a merge."""
    written: list[object] = []

    def text(message: Message) -> str:
        written.append(message)
        return "seen"

    monkeypatch.setattr(Message, "__str__", text)
    with machine(tmp_path) as vm:
        for level, is_read in ((logging.INFO, False), (logging.DEBUG, True)):
            caplog.set_level(level)
            async with live.live(vm.target) as target:
                await target.monitor.execute("query-status")
            assert bool(written) == is_read and ("--> seen" in caplog.messages) == is_read
