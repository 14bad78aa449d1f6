"""What /proc tells of a process."""

import os
import re
import stat

from qmpmerge.chain.chain import Inode
from qmpmerge.value import Value

_MOST_LINKS = 40  # MAXSYMLINKS in include/linux/namei.h
# As unix_seq_show in net/unix/af_unix.c writes it: flags, inode, name.
_UNIX_ROW = r"(?s)[0-9a-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) [0-9A-F]{4} [0-9A-F]{2} +(\d+) (.+)"
_ACCEPTS = 0x10000  # __SO_ACCEPTCON in include/linux/net.h

_AT_ONCE = 64 * 1024

Identity = tuple[str, int, int]
"""Which file or device it is, whatever it is called."""


class Process(Value):
    """A process that cannot be taken for a later one of the same number: `started` is in the kernel's ticks since `boot`."""

    pid: int
    started: int
    boot: str

    @property
    def is_alive(self) -> bool:
        """Whether it still runs, as far as this host can tell."""
        return process(self.pid) == self


def descriptors(pid: int) -> list[str] | None:
    """The numbers of what a process has open, None when we may not look or the process is gone."""
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return None


def open_files(pid: int) -> dict[Identity, int] | None:
    """All that a process has open, each with one of its descriptors; None when we may not look or the process is gone."""
    found = _statuses(pid)
    return None if found is None else {_identity(status): number for number, status in found}


def open_inodes(pid: int) -> set[Inode]:
    """Those of the regular files and block devices that a process has open and that have a name; none when we may not look."""
    return {
        (status.st_dev, status.st_ino)
        for _number, status in _statuses(pid) or ()
        if status.st_nlink and (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode))
    }


def _statuses(pid: int) -> list[tuple[int, os.stat_result]] | None:
    """Of each descriptor, by names in a folder that is opened once: every process of the host is looked at before a merge."""
    found = []
    try:
        folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for number in os.listdir(folder):
            try:
                found.append((int(number), os.stat(number, dir_fd=folder)))
            except OSError:  # closed meanwhile
                continue
    except OSError:  # the process has ended
        return None
    finally:
        os.close(folder)
    return found


def open_links(pid: int) -> dict[Identity, str]:
    """The same, and what each is called now."""
    return {found: read_link(f"/proc/{pid}/fd/{number}") for found, number in (open_files(pid) or {}).items()}


def written(pid: int) -> set[Identity]:
    """Those that it has open for writing, so that it need not open them again to write (proc(5), fdinfo)."""
    written = [number for number in descriptors(pid) or () if _is_written(read_text(f"/proc/{pid}/fdinfo/{number}"))]
    return {found for number in written if (found := identity(f"/proc/{pid}/fd/{number}")) is not None}


def _is_written(fdinfo: str) -> bool:
    flags = re.search(r"^flags:\t(\d+)", fdinfo, re.MULTILINE)
    return flags is not None and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY


def sees_our_files(pid: int) -> bool | None:
    """Whether a name leads the process where it leads us: one mount namespace and one root; None where we may not know."""
    try:
        if os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
            return False
        return os.path.samestat(os.stat(f"/proc/{pid}/root"), os.stat("/"))
    except OSError:
        return None


def as_seen_by(pid: int, name: str) -> str:
    """A path of ours to what `name` leads the process to now, from its own working folder, mount namespace and root."""
    if not name.startswith("/"):
        return f"/proc/{pid}/cwd/{name}"
    return name if sees_our_files(pid) is not False else _within(f"/proc/{pid}/root", name)


def _within(root: str, name: str) -> str:
    """A path with its symlinks followed: the kernel would follow those with absolute names from our root."""
    done, rest, links = "", name.split("/"), 0
    while rest:
        part = rest.pop(0)
        if part == "..":
            done = done.rpartition("/")[0]
        elif (link := read_link(f"{root}{done}/{part}") if part else "") and links < _MOST_LINKS:
            links += 1
            done = "" if link.startswith("/") else done
            rest = [*link.split("/"), *rest]
        elif part not in ("", "."):
            done = f"{done}/{part}"
    return f"{root}{done}"


def identity(path: str) -> Identity | None:
    """The inode of a file, the device number of a block device: several device nodes can lead to one device."""
    try:
        return _identity(os.stat(path))
    except (OSError, ValueError):
        return None


def _identity(status: os.stat_result) -> Identity:
    if stat.S_ISBLK(status.st_mode):
        return "device", status.st_rdev, 0
    return "file", status.st_dev, status.st_ino


def pids() -> list[int]:
    """All processes that /proc shows us."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def start_folder(pid: int) -> str | None:
    """Where relative paths start. A daemon moves to /, its environment may remember where it was started."""
    if not has_moved(pid):
        return cwd(pid)
    environment = read_text(f"/proc/{pid}/environ").split("\0")
    return next((word[4:] for word in environment if word.startswith("PWD=/")), None)


def has_moved(pid: int) -> bool:
    """Whether its working folder is not the one it was started in: a QEMU that makes itself a daemon moves to /."""
    words = read_text(f"/proc/{pid}/cmdline").split("\0")
    return cwd(pid) == "/" and not {"-daemonize", "--daemonize"}.isdisjoint(words)


def cwd(pid: int) -> str | None:
    """The process's working folder, None when we may not know."""
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return None


def inode_of(path: str) -> Inode | None:
    """Which file a path leads to, symlinks followed; None where it leads nowhere."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def command_name(pid: int) -> str:
    """The process's name, of 15 bytes at the most (proc(5), comm)."""
    return read_text(f"/proc/{pid}/comm").removesuffix("\n")


def read_text(path: str) -> str:
    """A file of /proc, with names as they are (a carriage return is no line end); empty where it cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.fsdecode(b"".join(iter(lambda: os.read(file, _AT_ONCE), b"")))
    except OSError:
        return ""
    finally:
        os.close(file)


def executable(pid: int) -> str:
    """The program that a process runs."""
    return read_link(f"/proc/{pid}/exe")


def bound_path(pid: int, socket: str) -> str:
    """
    Where the listening UNIX socket ``socket:[INODE]`` of a process is bound in the filesystem; "" where that is not certain.

    /proc/net/unix has names as they are, and a name may hold a line end and all of a row: so anybody can write rows. A row is
    believed where its path is a socket that belongs to root, to us or to the process's user, and no other one is like it.
    """
    owners = {0, os.geteuid(), user_id(pid)}
    rows = map(re.compile(_UNIX_ROW).fullmatch, read_text(f"/proc/{pid}/net/unix").split("\n"))
    named = [
        row[3] for row in rows if row is not None and int(row[1], 16) & _ACCEPTS and f"socket:[{row[2]}]" == socket
    ]
    paths = [os.path.join(cwd(pid) or "", name) for name in named if not name.startswith("@")]
    found = {path for path in paths if path.startswith("/") and _socket_owner(path) in owners}
    return found.pop() if len(found) == 1 else ""


def _socket_owner(path: str) -> int | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_uid if stat.S_ISSOCK(status.st_mode) else None


def user_id(pid: int) -> int | None:
    """
    Who started the process, its real user id; None when it is gone.

    A program that is set-uid runs as root for anybody, and the owner of its folder in /proc is root too.
    """
    found = re.search(r"^Uid:\t(\d+)", read_text(f"/proc/{pid}/status"), re.MULTILINE)
    return int(found[1]) if found is not None else None


def read_link(path: str) -> str:
    """Where a link of /proc leads; empty where it cannot be read."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def process(pid: int) -> Process | None:
    """The process of this number now."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in ("Z", "X"):  # it has ended, its parent has not looked yet
        return None
    return Process(pid, int(fields[19]), boot_id())


def boot_id() -> str:
    """The id of the present boot; empty where the kernel does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
