"""
A file that may be an image, and which format it is of.

The first bytes of a raw image are its guest's, who can make them a header that names any file. So they say only what a file may
be; `format_of` alone decides, by what no guest can write.
"""

import errno
import os
import stat
from collections.abc import Collection

from qmpmerge import folder
from qmpmerge.chain import backing
from qmpmerge.chain.chain import Inode
from qmpmerge.images import backing_names, files, magic, notes, qcow2, stashed
from qmpmerge.value import Value

RAW = (".raw", ".iso")
"""How a file is called whose first bytes belong to a guest, whatever they look like."""

SAYS = {".qcow2": "qcow2", ".qed": "qed", ".vmdk": "vmdk", ".vhdx": "vhdx", ".vhd": "vpc", ".vpc": "vpc"}
"""How a file is called that is no raw image."""


class Found(Value):
    """
    An image on disk, and what its header, if it is one, leads to: files that are there (`below`), or a name that nobody has.

    `like` is the format that its first bytes look like, `recorded` the one that they record of what is below.
    """

    file: str
    inode: Inode
    owner: int
    like: str = "raw"
    recorded: str = ""
    below: frozenset[Inode] = frozenset()
    leads_to: str = ""
    """The path of `below`."""
    dangling: str = ""

    @property
    def is_aside(self) -> bool:
        """Whether a merge has put it aside: no VM starts from it any more."""
        return stashed.is_stashed(self.file) or notes.base_of(self.file) is not None


def format_of(found: Found, recorded: Collection[str] = ()) -> str:
    """
    The format of an image: the one that is `recorded` in the headers of what is built on it, as far as those are headers; else
    what it looks like, where a note of ours or its name says the same. Empty where nobody can say.
    """
    if recorded:
        told = next(iter(recorded)) if len(set(recorded)) == 1 else ""
    elif found.is_aside or (found.leads_to and notes.tells(found.leads_to, found.file)):
        told = found.like
    else:
        told = _called(found) or ("raw" if found.like == "raw" else "")
    return told if told in ("raw", found.like) else ""


def _called(found: Found) -> str:
    """The format that its name tells; of a symlink its own or that of the file."""
    names = (os.path.realpath(found.file), found.file)
    ends = [os.path.splitext(stashed.original_of(name) or name)[1].lower() for name in names]
    return next((SAYS[end] for end in ends if end in SAYS), "")


def read(path: str) -> Found:
    """
    The file at `path`. Raises OSError; without an errno where it begins like a header that makes no sense, or is no file.
    """
    status = os.stat(path)
    inode = (status.st_dev, status.st_ino)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise OSError("it is neither a regular file nor a block device")
    like, written, recorded = _header(path)
    name = backing.named_path(written) if written is not None else None
    if name is None or "\0" in name:
        return Found(path, inode, status.st_uid, like)
    folders = dict.fromkeys((os.path.dirname(path), os.path.dirname(os.path.realpath(path))))
    places = [os.path.join(folder, name) for folder in folders]
    there = {place: found for place in places if (found := files.inode(place)) is not None}
    dangling = "" if there else files.real(os.path.normpath(places[0]))
    below, leads_to = frozenset(there.values()), next(iter(there), "")
    return Found(path, inode, status.st_uid, like, recorded, below, leads_to, dangling)


def _header(path: str) -> tuple[str, str | None, str]:
    """What a file looks like; the backing name in its header, and the format that it records of that."""
    try:
        header = qcow2.read(path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # which no VM could be started from
            raise OSError(error.strerror) from None
        raise
    if header is not None:
        return "qcow2", header.backing, header.backing_format or ""
    like = magic.of(folder.reading(path))
    return like or "raw", backing_names.read(path) if like else None, ""
