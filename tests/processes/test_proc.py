"""What anybody can write into /proc harms nobody: names of sockets, mounts and processes, and command lines."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import command
from rig.impostors import NOBODY, impostor
from rig.machines import machine
from rig.nobody import public

from qmpmerge.errors import AmbiguousName, NoMonitor
from qmpmerge.processes import permissions, proc, vms

ROW = "0000000000000000: 00000002 00000000 00010000 0001 01 {} {}"
"""As /proc/net/unix shows a socket that listens."""

ODD = ["new\nline", "cr\rlf", "\x85\x0b\x1c", "a\n0: 2 0 00010000 1 1 zz /x", "a\n0 0 0 zz 0 0 0 /x", "\n", "a b\t"]


@pytest.fixture
def shown() -> Iterator[Path]:
    """A folder into which everybody may look."""
    with public() as folder:
        yield folder


# --- sockets --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(path: Path | str) -> Iterator[str]:
    """A socket that is bound to the path, or name, and listens; yields what /proc calls it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield f"socket:[{os.fstat(listener.fileno()).st_ino}]"


def inode(link: str) -> str:
    return link.removeprefix("socket:[").removesuffix("]")


@pytest.mark.parametrize("name", ODD, ids=repr)
def test_no_name_of_a_socket_keeps_the_others_from_being_read(tmp_path: Path, name: str) -> None:
    with listening(tmp_path / "ours") as ours, listening(tmp_path / name.replace("/", "")), listening(f"\0{name}"):
        assert proc.bound_path(os.getpid(), ours) == str(tmp_path / "ours")


def test_a_row_that_leads_to_a_socket_of_somebody_else_is_not_believed(tmp_path: Path, shown: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a socket away")
    theirs = shown / "evil"
    with listening(theirs), listening(tmp_path / "ours") as ours:
        os.chown(theirs, NOBODY, NOBODY)
        with listening("\0x\n" + ROW.format(inode(ours), theirs)):
            assert proc.bound_path(os.getpid(), ours) == str(tmp_path / "ours")
        (tmp_path / "ours").unlink()
        with listening("\0x\n" + ROW.format(inode(ours), theirs)):
            assert proc.bound_path(os.getpid(), ours) == ""


def test_of_two_rows_that_can_both_be_true_none_is_believed(shown: Path) -> None:
    with listening(shown / "a") as ours, listening(shown / "b"):
        assert proc.bound_path(os.getpid(), ours) == str(shown / "a")
        with listening("\0x\n" + ROW.format(inode(ours), shown / "b")):
            assert proc.bound_path(os.getpid(), ours) == ""
        with listening("\0x\n" + ROW.format(inode(ours), shown / "no-socket")):
            assert proc.bound_path(os.getpid(), ours) == str(shown / "a")


def test_a_socket_of_which_there_is_no_row(tmp_path: Path) -> None:
    with listening(tmp_path / "ours"):
        assert proc.bound_path(os.getpid(), "socket:[1]") == proc.bound_path(os.getpid(), "") == ""


# --- processes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A VM's name that no other QEMU here has."""
    return f"vm-{os.getpid()}-{tmp_path.name}"


def monitor(path: Path) -> list[str]:
    return ["-qmp", f"unix:{path},server=on,wait=off"]


def test_of_namesakes_the_one_that_we_have_started_is_meant(tmp_path: Path, shown: Path, name: str) -> None:
    with machine(tmp_path, "-name", name) as vm, listening(shown / "evil"):
        arguments = ["-name", name, *monitor(shown / "evil")]
        with impostor(shown, *arguments, user=NOBODY) as other:
            found = vms.find(name)
            assert (found.pid, found.monitor, found.namesakes) == (vm.process.pid, vm.target, (other,))
            assert [seen.is_foreign for seen in vms.vms() if seen.pid in (vm.process.pid, other)].count(True) == 1
            for options in ([], ["--json"]):
                run = command.invoke("disks", name, *options)
                assert run.code == 0 and f"pid {vm.process.pid}" in run.err and str(other) in run.err
            assert str(other) not in command.invoke("disks", f"pid:{vm.process.pid}").err
            with impostor(tmp_path, *arguments), pytest.raises(AmbiguousName) as error:
                vms.find(name)
            assert other in error.value.pids and len(error.value.pids) == 3
        assert vms.find(name).namesakes == ()


def test_of_namesakes_that_others_have_started_none_is_meant(shown: Path, name: str) -> None:
    arguments = ["-name", name, *monitor(shown / "evil")]
    with listening(shown / "evil"), impostor(shown, *arguments, user=NOBODY) as one:
        assert vms.find(name).pid == one  # QEMU often runs as a user of its own
        with impostor(shown, *arguments[:2], user=NOBODY), pytest.raises(AmbiguousName):
            vms.find(name)


ODD_MONITORS = [
    json.dumps({"id": "m", "backend": "socket", "server": "on", "path": path})
    for path in ("/a\0b", "\ud800", "/" + "x" * 5000, "/\n")
] + [
    "socket,id=m,server=on,path=/" + "../" * 3000,
    "[" * 50_000,
    '{"id": ["m"]}',
    "id=m,fd=" + "9" * 400 + ",server=on",
]


@pytest.mark.parametrize("chardev", ODD_MONITORS, ids=lambda chardev: repr(chardev[:60]))
def test_no_command_line_keeps_the_others_from_being_read(tmp_path: Path, name: str, chardev: str) -> None:
    arguments = ["-name", name, "-chardev", chardev, "-mon", "m,mode=control"]
    with impostor(tmp_path, *arguments) as pid:
        assert pid in [vm.pid for vm in vms.vms()]
        with pytest.raises(NoMonitor):
            vms.find(name)
        assert command.invoke("vms").code == 0


@pytest.mark.parametrize("odd", [b"qemu-\n) R 1 1", b"qemu-\r\xff", b"qemu- (x) Z 1", b'qemu-",pid=1,fd'], ids=repr)
def test_a_process_may_be_called_anything(odd: bytes) -> None:
    script = "import sys; open('/proc/self/comm', 'wb').write(bytes.fromhex(sys.argv[1])); print(); sys.stdin.read()"
    arguments = [sys.executable, "-c", script, odd.hex()]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        assert os.fsencode(proc.command_name(process.pid)) == odd[:15]
        seen = proc.process(process.pid)
        assert seen is not None and seen.is_alive
        assert proc.user_id(process.pid) == os.getuid()
        credentials = permissions._credentials(process.pid)
        assert credentials is not None and credentials.user == os.geteuid()
        assert process.pid not in [vm.pid for vm in vms.vms()]
        process.kill()


def test_the_folder_of_a_daemon_is_read_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "a\rb\nc"
    folder.mkdir()
    arguments = ["/bin/sh", "-c", "cd /; echo; read end", "-daemonize"]
    with subprocess.Popen(
        arguments, cwd=folder, env={"PWD": str(folder)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        assert proc.start_folder(process.pid) == str(folder)
        process.kill()


# --- mounts ---------------------------------------------------------------------------------------------------------------

MOUNTED = """
import os, subprocess, sys
from qmpmerge.mounts import mounts
from qmpmerge.processes import kernel
if subprocess.run(["mount", "-t", "tmpfs", sys.argv[2], sys.argv[1]], capture_output=True).returncode:
    sys.exit("no leave to mount")
(found,) = [mount for mount in mounts() if mount.place == sys.argv[1]]
assert found.source == sys.argv[2], found
assert kernel.look([sys.argv[1]]).unseen == ()
print("seen")
"""


@pytest.mark.parametrize("odd", ["a\rb", "a\nb", "a b\t\\", "\x85\x0b\x1c", "a - b", "\\040#"], ids=repr)
def test_a_mount_may_be_called_anything(tmp_path: Path, odd: str) -> None:
    """In a mount namespace of its own, since it would be seen by all the others."""
    place = tmp_path / odd
    place.mkdir()
    arguments = ["unshare", "--mount", sys.executable, "-c", MOUNTED, str(place), odd]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if run.returncode and "Traceback" not in run.stderr:
        pytest.skip(f"no leave to mount: {run.stderr}")
    assert run.stdout == "seen\n", run.stderr
