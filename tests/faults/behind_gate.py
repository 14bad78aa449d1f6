"""
``python behind_gate.py NAME WHAT COMMAND...``: run a command whose writing system calls are held for the gate NAME.

WHAT is ``storage`` for a QEMU, or ``names`` for a program whose files come and go and are written by plain write() too.
Started for every run, so it imports little.
"""

import ctypes
import errno
import os
import socket
import struct
import sys

NUMBERS = {
    "write": 1, "pwrite64": 18, "writev": 20, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "rename": 82, "link": 86,
    "unlink": 87, "openat": 257, "unlinkat": 263, "renameat": 264, "linkat": 265, "fallocate": 285, "pwritev": 296,
    "renameat2": 316, "pwritev2": 328,
}  # fmt: skip
"""System calls of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl) by which files are changed."""

UNSEEN = {"io_setup": 206, "copy_file_range": 326, "io_uring_setup": 425}
"""Ways past the gate. The kernel says that it does not know them, and the programs take the ways that it watches."""

STORAGE = ("pwrite64", "pwritev", "pwritev2", "fallocate", "ftruncate", "fsync", "fdatasync")
SETS = {"storage": STORAGE, "names": tuple(NUMBERS)}

# linux/seccomp.h, linux/filter.h
_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _NOTIFY, _FAIL = 0x7FFF0000, 0x7FC00000, 0x00050000
_SECCOMP = 317
_NEW_LISTENER, _WAIT_KILLABLE = 1 << 3, 1 << 5
_NO_NEW_PRIVILEGES = 38


def program(what: str) -> bytes:
    """The filter: a system call's number is compared with each; of openat only those that may make a file are held."""
    numbers = [NUMBERS[name] for name in SETS[what] if name != "openat"]
    tests = [(number, "notify") for number in numbers] + [(number, "fail") for number in UNSEEN.values()]
    if what == "names":
        tests.append((NUMBERS["openat"], "open"))
    # Behind the tests: allow, [2 lines for openat], notify, fail
    places = {"open": 1, "notify": 3, "fail": 4}
    lines = [(_LOAD, 0, 0, 0)]
    for line, (number, then) in enumerate(tests):
        lines.append((_JUMP_EQUAL, len(tests) - line - 1 + places[then], 0, number))
    flags = 16 + 2 * 8  # seccomp_data.args[2]
    lines += [(_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, flags), (_JUMP_SET, 0, 2, os.O_CREAT)]
    lines += [(_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _FAIL | errno.ENOSYS), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def install(what: str) -> int:
    """Put the filter on this process and all that it starts; returns the listener. Raises OSError."""
    code = ctypes.create_string_buffer(program(what))
    header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program(what)) // 8, ctypes.addressof(code)))
    kernel = ctypes.CDLL(None, use_errno=True)
    kernel.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE, _NEW_LISTENER):  # the second for kernels before 5.19
        listener = int(kernel.syscall(_SECCOMP, 1, flags, header))
        if listener >= 0:
            return listener
    raise OSError(ctypes.get_errno(), "seccomp")


def main(name: str, what: str, *command: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{name}")
        socket.send_fds(connection, [b"."], [install(what)])
        connection.recv(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
