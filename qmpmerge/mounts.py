"""What is mounted where, as our own mount namespace shows it."""

import os
import re

from qmpmerge.value import Value

_ESCAPED = re.compile(r"\\([0-7]{3})")


class Mount(Value):
    """
    A line of /proc/self/mountinfo (proc(5)).

    `device` is ``MAJOR:MINOR`` as st_dev shows it, of the block device where the filesystem has one alone; `source` is what
    was mounted, as whoever mounted it has called it.
    """

    device: str
    place: str
    source: str


def mounts() -> list[Mount]:
    """All mounts, in the order in which they were made; raises OSError."""
    with open("/proc/self/mountinfo", "rb") as file:  # as text it would have lines that end with a carriage return
        return [_mount(os.fsdecode(line)) for line in file]


def _mount(line: str) -> Mount:
    words, _, rest = line.partition(" - ")
    _number, _parent, device, _root, place, *_options = words.split(" ")
    return Mount(device, plain(place), plain(rest.split(" ")[1]))


def plain(name: str) -> str:
    """A name of /proc without the octal escapes of spaces, tabs, newlines and backslashes."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), name)
