"""What a job that ran out of space waits for."""

import os
from dataclasses import dataclass

from qmpmerge.chain import Image

CLUSTER = 64 * 1024


@dataclass(frozen=True)
class Shortage:
    """
    `filesystem` is the mount point under the base, or the base itself where it is no file of this host. `needed` bytes
    more, at most, make room for what is still to be copied.
    """

    filesystem: str
    needed: int


def of(base: Image, left: int) -> Shortage:
    """The shortage of a job that has `left` bytes to copy into `base`."""
    try:
        space = os.statvfs(os.path.dirname(base.file)) if base.has_path else None
    except OSError:
        space = None
    if space is None:
        return Shortage(base.file, max(left, CLUSTER))
    # QEMU has just been told that there is no room, whatever the count of free blocks says: never less than a cluster.
    return Shortage(mount_point(base.file), max(left - space.f_bavail * space.f_frsize, CLUSTER))


def mount_point(path: str) -> str:
    """The folder on which the filesystem of `path` is mounted."""
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path
