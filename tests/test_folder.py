"""Names are not files: what is done to a name is done in one module, and only while it leads to the file that is meant."""

import ast
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmpmerge
from qmpmerge import folder
from qmpmerge.folder import Folder

PACKAGE = Path(qmpmerge.__file__).parent

BY_NAME = {
    *(
        "open",
        "rename",
        "renames",
        "replace",
        "unlink",
        "remove",
        "removedirs",
        "rmdir",
        "mkdir",
        "makedirs",
        "mkfifo",
        "mknod",
    ),
    *("link", "symlink", "chmod", "lchmod", "chown", "lchown", "setxattr", "removexattr", "truncate", "utime"),
}
"""Of `os`; those that take a descriptor as well are done by one in `folder` only."""
OF_PATHS = {
    *("write_text", "write_bytes", "touch", "unlink", "rmdir", "mkdir", "chmod", "lchmod", "symlink_to", "hardlink_to"),
    *("read_text", "read_bytes"),
}
"""Methods of pathlib's paths, which is not imported at all: some of its words are those of others too."""
MODULES = {"tempfile", "shutil", "pathlib"}
KERNEL = ("/proc/", "/sys/")

ALLOWED = {
    ("sockets.py", "os.open(path, os.O_PATH)"): "a socket, which is not opened, but connected to",
    ("processes/proc.py", "os.open(path, os.O_RDONLY | os.O_CLOEXEC)"): "a file of /proc or /sys",
    ("cli/streams.py", "open(0, encoding='utf-8', closefd=False)"): "what we were given",
    (
        "recording/writer_child.py",
        "os.open(path, flags, 384)",
    ): "named by the user, and added to where it is a recording",
    (
        "recording/reading.py",
        "os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)",
    ): "read, and named by the user",
    ("recording/private.py", "import tempfile"): "a folder that is private to a replay",
    ("recording/private.py", "import shutil"): "the same, at its end",
    (
        "recording/private.py",
        "os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)",
    ): "the same, to lock it",
    (
        "recording/stand_ins.py",
        "os.makedirs(folder, exist_ok=True)",
    ): "in the replay's own folder, where nobody else writes",
    ("cli/ask.py", "os.open('/dev/tty', os.O_RDWR)"): "the terminal, which the kernel finds",
    ("cli/run.py", "open(file, encoding='utf-8')"): "read, and named by the user",
    ("cli/commands/grouped.py", "super().write_text(text.replace('-', _HYPHEN))"): "click's, into the help",
}
"""Calls by name, and why they may stay."""


def calls(file: Path) -> Iterator[str]:
    """What works by a name in a file, but for the files of the kernel."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (f"import {name}" for name in names if name in MODULES)
            yield from (f"from os import {name.name}" for name in node.names if names == ["os"] and name.name != "os")
        elif isinstance(node, ast.Call) and is_by_name(node.func) and not is_of_kernel(node):
            yield ast.unparse(node)


def is_by_name(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id == "open"
    if not isinstance(function, ast.Attribute):
        return False
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    return owner != "proc" and function.attr in (BY_NAME if owner == "os" else OF_PATHS)


def is_of_kernel(call: ast.Call) -> bool:
    first = call.args[0] if call.args else None
    if isinstance(first, ast.JoinedStr):
        first = first.values[0]
    is_null = first is not None and ast.unparse(first) == "os.devnull"
    return is_null or (isinstance(first, ast.Constant) and str(first.value).startswith(KERNEL))


def test_nothing_is_done_by_name_anywhere_else() -> None:
    found = {
        (str(file.relative_to(PACKAGE)), call)
        for file in PACKAGE.rglob("*.py")
        if file.name != "folder.py" and file.parent.name != "testing"
        for call in calls(file)
    }
    assert found == set(ALLOWED)


# --- which file has a name ------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    (tmp_path / "vm").mkdir()
    return Folder(str(tmp_path / "vm"))


@pytest.mark.parametrize("operation", ["rename", "remove", "put"])
def test_a_name_that_is_given_to_another_file_is_left_alone(
    place: Folder, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right before it would be renamed or removed."""
    file = place.create("image")
    file.write(b"ours")

    def swap(what: str, path: str) -> None:
        if what in ("rename", "remove"):
            os.rename(path, f"{path}.was")
            Path(path).write_text("theirs")

    monkeypatch.setattr(folder, "before", swap)
    with pytest.raises(FileNotFoundError, match="is another file now"):
        if operation == "rename":
            place.rename("image", "other", file.inode)
        elif operation == "remove":
            file.remove()
        else:
            place.put("image", b"new")
    monkeypatch.undo()
    theirs, ours = ("image.new", "image") if operation == "put" else ("image", "image.was")
    assert Path(place.path, theirs).read_text() == "theirs"
    assert Path(place.path, ours).read_text() == "ours"


def test_nothing_is_overwritten(place: Folder) -> None:
    one, two = place.create("one"), place.create("two")
    with pytest.raises(FileExistsError):
        place.rename("one", "two", one.inode)
    with pytest.raises(FileExistsError):
        place.create("one")
    assert (place.inode_of("one"), place.inode_of("two")) == (one.inode, two.inode)


def test_a_folder_stays_what_it_is(place: Folder, tmp_path: Path) -> None:
    """Whatever has its name."""
    os.rename(place.path, tmp_path / "moved")
    (tmp_path / "other").mkdir()
    os.symlink(tmp_path / "other", place.path)
    place.put("name", b"content")
    assert (os.listdir(tmp_path / "moved"), os.listdir(tmp_path / "other")) == (["name"], [])


def test_without_renameat2(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "renaming", lambda: lambda *names: errno.EINVAL)
    one, two = place.create("one"), place.create("two")
    with pytest.raises(FileExistsError):
        place.rename("one", "two", one.inode)
    place.rename("two", "three", two.inode)
    assert (place.inode_of("one"), place.inode_of("two"), place.inode_of("three")) == (one.inode, None, two.inode)

    def refuse(*names: object, **options: object) -> None:
        raise OSError(errno.EPERM, "as on vfat")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(FileExistsError):
        place.rename("one", "three", one.inode)
    place.rename("one", "four", one.inode)
    assert place.names() == ["four", "three"]


# --- what is planted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "character", "socket", "folder"])
def test_what_is_no_file_is_neither_waited_for_nor_opened(place: Folder, kind: str) -> None:
    path = Path(place.path, "planted")
    if kind == "character" and os.geteuid() != 0:
        pytest.skip("only root can make a device")
    if kind == "folder":
        path.mkdir()
    else:
        kinds = {"fifo": stat.S_IFIFO, "character": stat.S_IFCHR, "socket": stat.S_IFSOCK}
        os.mknod(path, 0o600 | kinds[kind], os.makedev(10, 130))  # a watchdog, which is set off by being opened
    with pytest.raises(OSError, match="no regular file"):
        place.open("planted")
    with pytest.raises(OSError, match="neither a regular file nor a block device|Is a directory"):
        folder.reading(str(path))


def test_a_symlink_is_not_followed_within_a_folder(place: Folder, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    os.symlink(tmp_path / "victim", f"{place.path}/link")
    with pytest.raises(OSError, match="it is a symlink"):
        place.open("link", write=True)
    with folder.reading(f"{place.path}/link") as file:
        assert file.read(100) == b"precious"


def test_what_was_looked_at_is_what_is_opened(place: Folder, tmp_path: Path) -> None:
    place.create("image").write(b"ours")
    with folder.looked_at(f"{place.path}/image") as seen:
        os.rename(f"{place.path}/image", tmp_path / "moved")
        os.mkfifo(f"{place.path}/image")
        with folder.opened(seen) as file:
            assert (file.read(4), seen.real) == (b"ours", str(tmp_path / "moved"))
