"""The private storage daemon: which program it is, and that nothing is left of it, whatever ends us."""

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rig.command import Begun, invoke
from rig.forks import forks
from rig.machines import Content

import qmpmerge
from qmpmerge.errors import ImageUnreadable, SessionLost
from qmpmerge.processes import proc
from qmpmerge.qemu import storagedaemon

SYSTEM = "qemu-system-x86_64"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a process or a descriptor of ours; the process of which commands are forked stays for all of them."""
    with forks():
        children = set(psutil.Process().children())
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(psutil.Process().children()) <= children
    assert set(os.listdir("/proc/self/fd")) <= before


def programs(folder: Path, *names: str) -> str:
    """A PATH on which there are just these."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name) or name)
    return str(folder)


def program_of(pid: int | None) -> str:
    return os.path.basename(os.readlink(f"/proc/{pid}/exe"))


def daemon_of(pid: int) -> psutil.Process:
    """That of a command, which has a qemu-img at work besides, to count what is to be copied."""
    children = psutil.Process(pid).children()
    (daemon,) = [child for child in children if proc.command_name(child.pid).startswith("qemu-storage")]
    return daemon


# --- which program it is ---------------------------------------------------------------------------------------------------


async def test_a_session_with_a_daemon_of_our_own() -> None:
    async with storagedaemon.started() as daemon, daemon.session() as session:
        assert program_of(session.pid) == "qemu-storage-daemon"
        assert await session.execute("query-named-block-nodes") == []
        pid = session.pid
    assert pid is not None and not psutil.pid_exists(pid)


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_qemu_without_a_machine_does_the_same(
    top: str, images: list[Path], content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", SYSTEM, "qemu-img"))
    async with qmpmerge.offline(images[3]) as target:
        assert program_of(target.pid) == SYSTEM
        outcome = await qmpmerge.commit(target, top=top, verify=True)
    assert outcome.verified
    monkeypatch.undo()
    content.check(outcome.after.active.file)


def test_without_either_the_package_is_named(images: list[Path], tmp_path: Path) -> None:
    for word, *has in (["commit", "qemu-img"], ["chain"]):
        path = programs(tmp_path / word, *has)
        run = invoke(word, str(images[3]), env={"PATH": path})
        assert (run.code, run.out) == (3, "")
        assert "qemu-storage-daemon is not installed" in run.err
        assert "apt-get install qemu-system-common" in run.err
    assert invoke("chain", str(images[3]), env={"PATH": str(tmp_path / "commit")}).code == 0


async def test_the_program_is_not_looked_for_among_the_images(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is started: a PATH may have folders that are meant from our own."""
    here, planted = tmp_path / "here", images[0].parent / "bin"
    planted.mkdir()
    for name in (storagedaemon.DAEMON, SYSTEM):
        (planted / name).symlink_to("/bin/false")
    here.mkdir()
    programs(here / "bin", storagedaemon.DAEMON, "qemu-img")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", "bin")
    async with storagedaemon.started(str(images[0].parent)) as daemon, daemon.session() as session:
        assert program_of(session.pid) == storagedaemon.DAEMON
        assert os.readlink(f"/proc/{session.pid}/cwd") == str(images[0].parent)
    with pytest.raises(ImageUnreadable) as refused:
        async with storagedaemon.started(f"{images[0].parent}/none"):
            pass
    assert (refused.value.file, refused.value.reason) == (f"{images[0].parent}/none", "No such file or directory")


def test_without_either_nothing_is_left_open(images: list[Path], tmp_path: Path) -> None:
    program = f"""
import asyncio, qmpmerge
async def work():
    async with qmpmerge.offline({str(images[3])!r}):
        pass
try:
    asyncio.run(work())
except qmpmerge.errors.ToolMissing:
    print("missing")
"""
    environment = {**os.environ, "PATH": programs(tmp_path / "bin"), "PYTHONWARNINGS": "always::ResourceWarning"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (run.stdout, run.stderr) == ("missing\n", "")


async def test_a_program_that_is_no_daemon_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qemu-storage-daemon").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(qmpmerge.Error) as refused:
        async with storagedaemon.started() as daemon, daemon.session():
            pass
    assert refused.value.exit_code == 4


def test_nobody_else_can_reach_it(images: list[Path], content: Content) -> None:
    """No socket in the filesystem, no port; what it listens on while it flushes lies in a private folder."""
    begun = Begun("commit", str(images[3]), "--top", "[3]", "--speed", "1")
    daemon = daemon_of(begun.process.pid)
    ours = f"qmpmerge-{begun.process.pid}-"  # others may be at work on this host
    listening = [line for line in Path(f"/proc/{daemon.pid}/net/unix").read_text().splitlines() if ours in line]
    assert not daemon.net_connections("inet")
    assert not listening
    begun.process.send_signal(signal.SIGINT)
    assert begun.end().code == 130


# --- how it ends -----------------------------------------------------------------------------------------------------------


async def test_it_ends_with_the_block_an_exception_and_a_cancellation(images: list[Path]) -> None:
    async def held(begun: "asyncio.Future[int]") -> None:
        async with qmpmerge.offline(images[3]) as target:
            begun.set_result(target.pid or 0)
            await asyncio.Event().wait()

    async with qmpmerge.offline(images[3]) as target:
        first = target.pid or 0
    with pytest.raises(ZeroDivisionError):
        async with qmpmerge.offline(images[3]) as target:
            second = target.pid or 0
            raise ZeroDivisionError
    begun = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(held(begun))
    third = await begun
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for pid in (first, second, third):
        assert pid and not psutil.pid_exists(pid)


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_a_cancelled_merge_puts_the_old_chain_back(top: str, images: list[Path], content: Content) -> None:
    begun = asyncio.Event()
    async with qmpmerge.offline(images[3]) as target:
        work = qmpmerge.commit(target, top=top, speed=1, report=lambda told: begun.set())
        merge = asyncio.ensure_future(work)
        await begun.wait()
        merge.cancel()
        with pytest.raises(asyncio.CancelledError):
            await merge
        assert not await target.jobs()
        assert (await target.chain()).chain.files == [str(image) for image in images]
        assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
    content.check(images[3])


async def test_an_exception_in_the_middle_of_a_merge(images: list[Path], content: Content) -> None:
    def report(told: qmpmerge.Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with qmpmerge.offline(images[3]) as target:
            await qmpmerge.commit(target, top="[3]", speed=1, report=report)
    content.check(images[3])


async def test_a_daemon_that_dies_is_a_lost_session(images: list[Path], content: Content) -> None:
    with pytest.raises(SessionLost) as lost:
        async with qmpmerge.offline(images[3]) as target:
            assert target.pid is not None
            os.kill(target.pid, signal.SIGKILL)
            await qmpmerge.commit(target)
    assert (lost.value.verdict, lost.value.image) == ("unknown", str(images[3])), "nobody else can ask that daemon"
    content.check(images[3])


@pytest.mark.parametrize("top", ["[3]", "[4]"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_cancel(number: signal.Signals, top: str, images: list[Path], content: Content) -> None:
    with Watched("commit", str(images[3]), "--top", top, "--speed", "1") as tool:
        tool.begun.process.send_signal(number)
        run = tool.begun.end()
        assert (run.code, run.document["verdict"]) == (130, "cancelled")
        assert tool.daemon_is_gone(0)
    assert [file.name for file in images[0].parent.iterdir() if file.name.startswith(".")] == []
    content.check(images[3])


@pytest.mark.parametrize("top", ["[3]", "[4]"])
def test_sigkill_of_the_tool_ends_the_daemon(top: str, images: list[Path], content: Content) -> None:
    with Watched("commit", str(images[3]), "--top", top, "--speed", "1") as tool:
        tool.begun.process.kill()
        tool.begun.process.communicate()
        assert tool.daemon_is_gone(30_000)
    content.check(images[3])
    assert invoke("commit", str(images[3]), "--top", top).code == 0


class Watched:
    """A command under way and a descriptor of its daemon, which tells when that has ended."""

    def __init__(self, *arguments: str) -> None:
        self.begun = Begun(*arguments)
        daemon = daemon_of(self.begun.process.pid)
        self._descriptor = os.pidfd_open(daemon.pid)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.daemon_is_gone(0):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        if self.begun.process.poll() is None:
            self.begun.process.kill()
            self.begun.process.communicate()
        os.close(self._descriptor)

    def daemon_is_gone(self, milliseconds: int) -> bool:
        watch = select.poll()
        watch.register(self._descriptor, select.POLLIN)
        return bool(watch.poll(milliseconds))


def test_two_of_us_do_not_meet(images: list[Path], content: Content) -> None:
    """The second one is refused, by the first one's daemon."""
    with Watched("commit", str(images[3]), "--top", "[3]", "--speed", "1") as tool:
        second = invoke("commit", str(images[3]), "--json")
        error = second.document["error"]
        assert (second.code, error["name"]) == (3, "in-use")
        assert "qemu-storage" in error["message"]
        tool.begun.process.send_signal(signal.SIGINT)
        assert tool.begun.end().code == 130
    content.check(images[3])


def test_a_chain_is_shown_while_it_is_merged(images: list[Path], content: Content) -> None:
    with Watched("commit", str(images[3]), "--top", "[3]", "--speed", "1") as tool:
        shown = invoke("chain", str(images[3]))
        tool.begun.process.send_signal(signal.SIGINT)
        tool.begun.end()
    assert shown.code == 0, shown.err
    assert "in use by qemu-storage" in shown.out, shown.out + shown.err


def test_the_library_may_be_used_outside_the_main_thread(images: list[Path], content: Content) -> None:
    """The parent-death signal is sent when the *thread* that started the daemon ends: prctl(2)."""
    program = f"""
import asyncio, threading, qmpmerge
async def work():
    async with qmpmerge.offline({str(images[3])!r}) as host:
        print((await qmpmerge.commit(host, top="[3]")).verdict)
thread = threading.Thread(target=lambda: asyncio.run(work()))
thread.start()
thread.join()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("merged\n", "")
    content.check(images[3])
