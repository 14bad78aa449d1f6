import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from qmpmerge.errors import AmbiguousName, NoMonitor, NoSuchTarget
from qmpmerge.processes import holders, proc, vms
from qmpmerge.processes.holders import Holder
from qmpmerge.processes.vms import Vm, _Process, _without_forks

QEMU = "qemu-system-x86_64"
STORAGE_DAEMON = "qemu-storage-daemon"
MACHINE = ["-M", "none", "-S", "-display", "none", "-nodefaults", "-accel", "tcg"]


@contextlib.contextmanager
def running(folder: Path, *options: str, program: Sequence[str] = (QEMU,), fds: Sequence[int] = ()) -> Iterator[int]:
    """A QEMU; it is ready when it greets on a socket pair, which is no monitor that anyone could connect to."""
    ours, theirs = socket.socketpair()
    ready = ["--chardev", f"socket,id=ready,fd={theirs.fileno()}"]
    if STORAGE_DAEMON in program[-1]:
        ready += ["--monitor", "ready"]
    else:
        ready += ["-mon", "ready,mode=control", *MACHINE]
    with ours, subprocess.Popen([*program, *options, *ready], cwd=folder, pass_fds=[theirs.fileno(), *fds]) as process:
        theirs.close()
        try:
            assert b"QMP" in ours.recv(4096)
            yield process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def client(path: Path) -> Iterator[int]:
    """A process that is connected to a monitor and was greeted."""
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1);"
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A VM's name that no other QEMU here has."""
    return f"vm-{os.getpid()}-{tmp_path.name}"


def pids_of(name: str) -> list[int]:
    return [vm.pid for vm in vms.vms() if vm.name == name]


def test_relative_socket(tmp_path: Path, name: str) -> None:
    with running(tmp_path, "-name", f"{name},process=renamed", "-qmp", "unix:q,server=on,wait=off") as pid:
        vm = vms.find(name)
        assert vm == vms.find_pid(pid) == vms.vm_of(pid)
        assert vm in vms.vms()
        assert (vm.pid, vm.name, vm.program, vm.libvirt) == (pid, name, QEMU, False)
        assert vm.monitor == str(tmp_path / "q")
        assert vm.started > 0 and vm.user
    assert vms.vm_of(pid) is None


def test_socket_of_a_chardev(tmp_path: Path, name: str) -> None:
    chardev = "socket,path=a,,b,id=m,server=on,wait=off"
    with running(tmp_path, "-name", f"guest={name}", "-chardev", chardev, "-mon", "m,mode=control"):
        assert vms.find(name).monitors == (str(tmp_path / "a,b"),)


def test_socket_that_was_passed_in(tmp_path: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as odd:
        odd.bind("\0x\na b c no-number d e f /g")  # as anybody can
        listener.bind(str(tmp_path / "q"))
        listener.listen()
        number = listener.fileno()
        chardev = f"socket,id=m,fd={number},server=on,wait=off"
        with running(tmp_path, "-name", name, "-chardev", chardev, "-mon", "m,mode=control", fds=(number,)):
            assert vms.find(name).monitors == (str(tmp_path / "q"),)


def test_tcp(tmp_path: Path, name: str) -> None:
    with socket.socket() as reserved:
        # QEMU can take a port that is bound but not listened on, when both allow it; nobody else will be given it.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        address = f"tcp:127.0.0.1:{reserved.getsockname()[1]}"
        with running(tmp_path, "-name", name, "-qmp", f"{address},server=on,wait=off"):
            assert vms.find(name).monitors == (address,)


def test_storage_daemon(tmp_path: Path) -> None:
    options = ["--chardev", "socket,id=m,path=q,server=on,wait=off", "--monitor", "m"]
    with running(tmp_path, *options, program=[STORAGE_DAEMON]) as pid:
        vm = vms.find_pid(pid)
        assert (vm.name, vm.program, vm.monitors) == (None, STORAGE_DAEMON, (str(tmp_path / "q"),))
        assert vm in vms.vms()


def test_no_monitor(tmp_path: Path, name: str) -> None:
    with running(tmp_path, "-name", name, "-monitor", "unix:hmp,server=on,wait=off") as pid:
        with pytest.raises(NoMonitor) as error:
            vms.find(name)
        assert error.value.facts == {"target": name, "pid": pid}
        with pytest.raises(NoMonitor) as error:
            vms.find_pid(pid)
        assert error.value.target == f"pid:{pid}"
        vm = vms.vm_of(pid)
        assert vm is not None and vm.monitor == ""


def test_socket_whose_name_is_gone(tmp_path: Path, name: str) -> None:
    with running(tmp_path, "-name", name, "-qmp", "unix:q,server=on,wait=off"):
        (tmp_path / "q").unlink()
        with pytest.raises(NoMonitor):
            vms.find(name)


def test_two_of_one_name(tmp_path: Path, name: str) -> None:
    with running(tmp_path, "-name", name) as one, running(tmp_path, "-name", name) as two:
        with pytest.raises(AmbiguousName) as error:
            vms.find(name)
        assert error.value.pids == sorted([one, two]) == pids_of(name)


@pytest.mark.parametrize("name", ["no-such-vm", ""])
def test_no_such_name(name: str) -> None:
    with pytest.raises(NoSuchTarget):
        vms.find(name)


@pytest.mark.parametrize("pid", [pytest.param(os.getpid(), id="ours"), 0, -1, 2**40])
def test_no_such_pid(pid: int) -> None:
    with pytest.raises(NoSuchTarget) as error:
        vms.find_pid(pid)
    assert error.value.target == f"pid:{pid}"


def test_behind_a_loader(tmp_path: Path) -> None:
    loader = next(Path("/lib64").glob("ld-linux*.so*"), None)
    daemon = shutil.which(STORAGE_DAEMON)
    if loader is None or daemon is None or Path(daemon).read_bytes()[:4] != b"\x7fELF":
        pytest.skip("no dynamic loader where one is expected, or a QEMU that is started by a script")
    with running(tmp_path, program=[str(loader), daemon]) as pid:
        assert [vm.program for vm in vms.vms() if vm.pid == pid] == [STORAGE_DAEMON]


def test_libvirts_monitor_comes_last(tmp_path: Path, name: str) -> None:
    folder = tmp_path / ".config/libvirt/qemu/lib"
    folder.mkdir(parents=True)
    sockets = [f"unix:{folder}/m,server=on,wait=off", "unix:q,server=on,wait=off"]
    with running(tmp_path, "-name", f"guest={name}", "-qmp", sockets[0], "-qmp", sockets[1]):
        vm = vms.find(name)
        assert vm.libvirt
        assert vm.monitors == (str(tmp_path / "q"), str(folder / "m"))


def test_child_of_libvirt(tmp_path: Path, name: str) -> None:
    ours = Path("/proc/self/comm")
    comm = ours.read_text().strip()
    with running(tmp_path, "-name", name, "-qmp", "unix:q,server=on,wait=off"):
        assert not vms.find(name).libvirt
        ours.write_text("virtqemud")
        try:
            assert vms.find(name).libvirt
        finally:
            ours.write_text(comm)


def test_daemon_that_is_starting(tmp_path: Path, name: str) -> None:
    """QEMU waits for a client of its monitor here, and its parent waits for QEMU."""
    dialled = ["-chardev", "socket,id=first,path=dial"]
    waits = ["-chardev", "socket,id=m,path=q,server=on,wait=on", "-mon", "m,mode=control"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "dial"))
        listener.listen()
        command = [QEMU, "-name", name, *MACHINE, "-daemonize", *dialled, *waits]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
            connection, _ = listener.accept()
            with connection:
                daemon = peer_pid(connection)
                wait_for_the_end_of(os.getsid(daemon))
                found = pids_of(name)
                os.kill(daemon, signal.SIGKILL)
    assert daemon != parent.pid
    assert found == [daemon]


def wait_for_the_end_of(leader: int) -> None:
    """The process between the two, which made the session: its parent does not reap it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(leader).status() != psutil.STATUS_ZOMBIE:
            pass


def test_daemons_of_one_command_line(tmp_path: Path, name: str) -> None:
    command = [QEMU, "-name", name, *MACHINE, "-daemonize", "-qmp", "unix:q,server=on,wait=off"]
    folders = [tmp_path / "a", tmp_path / "b"]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
            subprocess.run(command, cwd=folder, env={**os.environ, "PWD": str(folder)}, check=True)
            stack.enter_context(ending(folder / "q"))
        monitors = {vm.monitor for vm in vms.vms() if vm.name == name}
    assert monitors == {str(folder / "q") for folder in folders}


@contextlib.contextmanager
def ending(path: Path) -> Iterator[None]:
    """Kill the process that listens, at the end of the block, and wait for that."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        try:
            yield
        finally:
            os.kill(peer_pid(connection), signal.SIGKILL)
            # A connection that was never accepted is reset, one that was is closed.
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass


def peer_pid(connection: socket.socket) -> int:
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def test_child_that_was_forked() -> None:
    vm = vms.Vm(1, "a", (), False, "me", QEMU, 1.0)
    child = vms.Vm(2, "a", (), False, "me", QEMU, 2.0)
    found = [vms._Process(child, 1, (QEMU,)), vms._Process(vm, 0, (QEMU,))]
    assert [process.vm for process in vms._without_forks(found)] == [vm]


def test_twins_are_two() -> None:
    vms = [Vm(pid, "a", (), False, "me", QEMU, 1.0) for pid in (1, 2)]
    found = [_Process(vm, 0, (QEMU, "-S")) for vm in vms]
    assert [process.vm for process in _without_forks(found)] == vms


# --- files and holders --------------------------------------------------------------------------------------------


def test_holder(tmp_path: Path) -> None:
    monitor = tmp_path / "q"
    with running(tmp_path, "-qmp", "unix:q,server=on,wait=off"):
        assert holders.holder(str(monitor)) is None
        with client(monitor) as pid:
            found = holders.holder(str(monitor))
            assert found is not None and found.pid == pid and found.name.startswith("py")
            assert holders.holder(str(monitor), excluding={pid}) is None
            assert holders.holder(str(tmp_path / "other")) is None


def test_we_are_no_holder(tmp_path: Path) -> None:
    monitor = str(tmp_path / "a name")
    with running(tmp_path, "-qmp", f"unix:{monitor},server=on,wait=off"), socket.socket(socket.AF_UNIX) as ours:
        ours.connect(monitor)
        assert ours.recv(1)
        assert holders.holder(monitor) is None


def test_holder_where_names_have_spaces(tmp_path: Path) -> None:
    monitor = tmp_path / "a 12 name"
    with running(tmp_path, "-qmp", f"unix:{monitor},server=on,wait=off"), client(monitor) as pid:
        found = holders.holder(str(monitor))
        assert found is not None and found.pid == pid


def test_holder_without_ss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert holders.holder("/run/q") is None


SS_ROWS = """\
u_str ESTAB 0      0           * 41131 * 0     users:(("python3",pid=19409,fd=4)) <->
u_str ESTAB 0      0      /run/q 42004 * 41130 users:(("qemu-system-x86",pid=7,fd=8)) <-> ino:22 dev:0/65024
u_str ESTAB 142    0           * 41130 * 42004 users:(("a b",pid=8,fd=3),("a b",pid=9,fd=3)) <->
u_str ESTAB 0      0      /run/r 5 * 6
u_str LISTEN 0 0 /run/q
nonsense
"""


@pytest.mark.parametrize(
    ("path", "excluding", "holder"),
    [
        ("/run/q", [], Holder(8, "a b")),
        ("/run/q", [8], Holder(9, "a b")),
        ("/run/q", [8, 9], None),
        ("/run/r", [], None),
        ("/run", [], None),
        ("", [], None),
    ],
)
def test_rows_of_ss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, excluding: list[int], holder: Holder | None
) -> None:
    (tmp_path / "ss").write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{SS_ROWS}END\n")
    (tmp_path / "ss").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert holders.holder(path, excluding=excluding) == holder


def test_open_files(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 512)
    status = image.stat()
    with running(tmp_path, "--blockdev", "file,node-name=f,filename=image", program=[STORAGE_DAEMON]) as pid:
        image.rename(tmp_path / "moved")
        assert proc.cwd(pid) == str(tmp_path)
        files = proc.open_files(pid)
        assert files is not None
        descriptor = files["file", status.st_dev, status.st_ino]
        assert proc.read_link(f"/proc/{pid}/fd/{descriptor}") == f"{tmp_path}/moved"
    assert proc.open_files(pid) is None
    assert proc.cwd(pid) is None
