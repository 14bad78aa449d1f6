"""The bench's NBD server: what a client writes is there and in the log, and what is to fail fails with its errno."""

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.log import Fault, Log
from faults.nbdserver import ROOM, NbdServer

SIZE = 65536


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "image").write_bytes(bytes(SIZE))
    return folder


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def server(folder: Path, tmp_path: Path, log: Log) -> Iterator[NbdServer]:
    with NbdServer(folder, tmp_path / "socket", log) as server:
        yield server


def io(server: NbdServer, *commands: str, export: str = "image") -> "subprocess.CompletedProcess[str]":
    words = [word for command in commands for word in ("-c", command)]
    url = f"nbd+unix:///{export}?socket={server.path}"
    return subprocess.run(["qemu-io", "-t", "writeback", "-f", "raw", *words, url], capture_output=True, text=True)


def test_what_is_written_is_there_and_in_the_log(server: NbdServer, folder: Path, log: Log) -> None:
    done = io(
        server,
        "write -P 7 512 1k",
        "flush",
        "write -z 1k 512",
        "read -P 7 512 512",
        "read -P 0 1k 512",
        "discard 0 512",
    )
    assert (done.returncode, "failed" in done.stdout) == (0, False)
    kinds = [(one.kind, one.offset, one.length) for one in log.operations]
    expected = [("write", 512, 1024), ("flush", 0, 0), ("zero", 1024, 512), ("discard", 0, 512)]
    assert kinds[:4] == expected
    assert log.operations[0].data == b"\7" * 1024
    assert (folder / "image").read_bytes()[:2048] == bytes(512) + b"\7" * 512 + bytes(1024)


def test_forced_unit_access_is_a_write_and_a_flush(server: NbdServer, log: Log) -> None:
    io(server, "write -f -P 1 0 512")
    assert [one.kind for one in log.operations[:2]] == ["write", "flush"]


def test_an_image_has_room_to_grow(server: NbdServer) -> None:
    assert f"{SIZE + ROOM}" in io(server, "length").stdout or "MiB" in io(server, "length").stdout
    assert "failed" not in io(server, f"write {SIZE + ROOM - 512} 512").stdout


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_operation_fails_as_it_is_told(number: int, server: NbdServer, log: Log) -> None:
    log.arm(Fault(1, errno=number))
    words = {errno.EIO: "Input/output error", errno.ENOSPC: "No space left on device"}
    done = io(server, "write 0 512")
    assert words[number] in done.stdout + done.stderr


def test_the_client_is_killed_after_the_operation(server: NbdServer, folder: Path, log: Log) -> None:
    log.arm(Fault(2))
    assert io(server, "write -P 1 0 512", "write -P 2 0 512", "write -P 3 0 512").returncode == -9
    assert (folder / "image").read_bytes()[:512] == b"\2" * 512


def test_an_export_that_is_not_there(server: NbdServer) -> None:
    assert io(server, "read 0 512", export="other").returncode != 0
