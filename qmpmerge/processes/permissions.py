"""
Whether a process may write to a file, told without trying: owner and mode, attributes of the file, the mount.

QEMU opens images again by name when a merge begins and ends. It may have given up its privileges since it opened them.
"""

import array
import fcntl
import os
import stat

from qmpmerge import folder, users
from qmpmerge.processes import proc
from qmpmerge.value import Value

_DAC_OVERRIDE = 1 << 1
_FS_IOC_GETFLAGS = 0x80086601
_ATTRIBUTES = {0x10: "it is immutable (`chattr +i`)", 0x20: "it is append-only (`chattr +a`)"}
_ACL = "system.posix_acl_access"


class _Credentials(Value):
    """As of /proc/PID/status: what the kernel judges access to files by."""

    user: int
    groups: frozenset[int]
    overrides: bool

    def may(self, status: os.stat_result, bit: int) -> bool:
        """Whether the mode of the file grants `bit` of ``rwx`` (4, 2, 1)."""
        shift = 6 if status.st_uid == self.user else 3 if status.st_gid in self.groups else 0
        return bool(status.st_mode >> shift & bit)


def obstacle(path: str, pid: int | None) -> str | None:
    """
    Why the process may not open `path` for writing, as a clause; None where it may, or where it is not known.

    Access lists and security modules are not asked: then only trying tells.
    """
    seen = _as_seen_by(path, pid)
    try:
        status = os.stat(seen)
        read_only = os.statvfs(seen).f_flag & os.ST_RDONLY
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if read_only and not stat.S_ISBLK(status.st_mode):
        return "its filesystem is mounted read-only"
    return _attribute(seen, status) or _mode(seen, status, pid)


def _as_seen_by(path: str, pid: int | None) -> str:
    """The path in the process's own mount namespace, where we may look there."""
    inside = f"/proc/{pid}/root{path}"
    return inside if pid is not None and os.path.exists(inside) else path


def _attribute(path: str, status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return None
    flags = array.array("i", [0])
    try:
        with folder.reading(path) as file:
            fcntl.ioctl(file.descriptor, _FS_IOC_GETFLAGS, flags)
    except OSError:  # a filesystem without attributes, or we may not look
        return None
    return next((words for flag, words in _ATTRIBUTES.items() if flags[0] & flag), None)


def _mode(path: str, status: os.stat_result, pid: int | None) -> str | None:
    credentials = _credentials(pid) if pid is not None else None
    if credentials is None or credentials.overrides or _has_access_list(path):
        return None
    user = users.name(credentials.user)
    if not credentials.may(status, 2):
        mode = stat.filemode(status.st_mode)
        return f"user {user}, as whom QEMU runs, may not write it ({mode}, owner {users.name(status.st_uid)})"
    folder = os.path.dirname(os.path.realpath(path))
    if not (credentials.may(os.stat(folder), 1) or _has_access_list(folder)):
        return f"user {user}, as whom QEMU runs, may not enter its folder"
    return None


def _has_access_list(path: str) -> bool:
    try:
        return _ACL in os.listxattr(path)
    except OSError:
        return False


def _credentials(pid: int) -> _Credentials | None:
    try:
        rows = proc.read_text(f"/proc/{pid}/status").split("\n")
        lines = dict(row.split(":\t", 1) for row in rows if ":\t" in row)
        return _Credentials(
            user=int(lines["Uid"].split()[3]),
            groups=frozenset(map(int, [lines["Gid"].split()[3], *lines["Groups"].split()])),
            overrides=bool(int(lines["CapEff"], 16) & _DAC_OVERRIDE),
        )
    except (KeyError, ValueError):
        return None
