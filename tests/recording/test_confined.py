"""A client that was told that it speaks to a replay changes no file outside of that one's folder, whatever it is told then."""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.command import invoke
from rig.disks import Setup

from qmpmerge import folder
from qmpmerge.folder import Folder


@contextlib.contextmanager
def lying(monitor: str, path: str, place: str) -> Iterator[None]:
    """A real QEMU, which greets as a replay in `place` does."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as qemu:
        listener.bind(path)
        listener.listen()
        qemu.connect(monitor)

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

        def serve() -> None:
            try:
                client, _ = listener.accept()
            except OSError:  # nobody came
                return
            with client, qemu.makefile("rb", 0) as lines:
                greeting = json.loads(lines.readline())
                greeting["QMP"]["version"]["qmpmerge-replay"] = place
                client.sendall(json.dumps(greeting).encode() + b"\r\n")
                back = threading.Thread(target=pump, args=(qemu, client), daemon=True)
                back.start()
                pump(client, qemu)
                back.join(60)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        yield
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        server.join(60)


@pytest.mark.parametrize(
    "words", [("commit", "vda", "--yes"), ("commit", "vda", "--top", "2"), ("snapshot", "vda=new.qcow2")]
)
def test_nothing_is_changed_for_a_replay(
    words: tuple[str, ...], setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    before = {file: file.read_bytes() for file in images}
    away = tmp_path / "away"
    away.mkdir()
    names = sorted(os.listdir(images[0].parent))
    with lying(setup.machine.target, str(away / "s"), str(away)):
        done = invoke(words[0], str(away / "s"), *words[1:], "--json")
    assert done.code == 3 and "speaks to a replay" in done.out, done
    assert {file: file.read_bytes() for file in images} == before
    assert sorted(os.listdir(images[0].parent)) == names


def test_each_change_is_refused_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("inside", "inside-not"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("a")
    monkeypatch.setattr(folder, "_allowed", set())
    folder.change_only_below(str(tmp_path / "inside"))
    with Folder(str(tmp_path / "inside-not")) as place, place.open("a") as file:
        for change in (
            lambda: place.create("b"),
            lambda: place.put("a", b"b"),
            lambda: place.rename("a", "b", file.inode),
            lambda: place.open("a", write=True),
            lambda: folder.reading(file.path, os.O_RDWR),
            lambda: file.overwrite(b"b"),
            lambda: file.mark("user.a", b"b"),
            lambda: file.allow(0o777),
            lambda: file.write(b"b"),
            file.remove,
        ):
            with pytest.raises(folder.NotReplayed, match="speaks to a replay"):
                change()
    assert [file.name for file in (tmp_path / "inside-not").iterdir()] == ["a"]
    with Folder(str(tmp_path / "inside")) as place:
        place.put("a", b"b")
        place.create("b").remove()
        folder.in_memory().write(b"x")
