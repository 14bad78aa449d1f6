"""
What is built on an image, and on that, up to the image that nothing is built on: by the headers of all images around, and by
the notes about overlays in other folders. Headers and notes are read, nothing else; both must say the same.
"""

import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Inode
from qmpmerge.images import backing_names, files, notes, qcow2, stashed

RAW = (".raw", ".iso")
"""How a file is called whose first bytes belong to a guest, whatever they look like."""

LIKE_RAW = (".raw", ".img")
"""How a file without a header is called that may be an image."""


OWNER = "run it as a user who may read the images"


@dataclass(frozen=True)
class Found:
    """An image on disk, and what its header leads to: files that are there (`below`), or a name that nobody has."""

    file: str
    inode: Inode
    owner: int
    below: frozenset[Inode] = frozenset()
    dangling: str = ""

    @property
    def is_aside(self) -> bool:
        """Whether a merge has put it aside: no VM starts from it any more."""
        return stashed.is_stashed(self.file) or notes.base_of(self.file) is not None


@dataclass(frozen=True)
class Odd:
    """Something for which nobody can say what is built on an image: about which file, a clause, and what to do about it."""

    file: str
    reason: str
    cure: str


@dataclass
class Above:
    """All that is built on some images, these included."""

    images: dict[Inode, Found] = field(default_factory=dict)
    """Those put aside are left out."""
    leaves: list[str] = field(default_factory=list)
    """Those on which nothing is built."""
    folders: list[str] = field(default_factory=list)
    odd: list[Odd] = field(default_factory=list)


def above(image: str) -> Above:
    """
    What is built on the image at `image`, in its folder, in those to which notes lead, and so on.

    Raises OSError where `image` cannot be looked at.
    """
    search = _Search()
    start = read(image)
    while True:
        found = search.climb(start)
        if not search.look_around(found.images.values()):
            return search.told(found)


def read(path: str) -> Found:
    """The file at `path`, of whatever format. Raises OSError; without an errno where its header is broken."""
    status = os.stat(path)
    inode = (status.st_dev, status.st_ino)
    has_header = stat.S_ISREG(status.st_mode) and not path.endswith(RAW)
    written = backing_names.read(path) if has_header else None
    name = backing.named_path(written) if written is not None else None
    if name is None or "\0" in name:
        return Found(path, inode, status.st_uid)
    folders = dict.fromkeys((os.path.dirname(path), os.path.dirname(os.path.realpath(path))))
    places = [os.path.join(folder, name) for folder in folders]
    below = frozenset(found for place in places if (found := files.inode(place)) is not None)
    return Found(path, inode, status.st_uid, below, "" if below else files.real(os.path.normpath(places[0])))


def in_folder(folder: str) -> list[str]:
    """
    The images that lie in a folder: those with a header, those that are called like raw images and hold no other image's
    data, and what an image that was put aside was built on. Raises OSError where the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        paths = sorted(entry.path for entry in entries if _is_file(entry))
    images: dict[str, None] = {}
    data: set[str] = set()
    for path in paths:
        try:
            found = read(path)
            header = qcow2.read(path) if not path.endswith(RAW) else None
        except OSError:
            continue
        if header is not None and header.data_file is not None:
            data.add(os.path.realpath(os.path.join(folder, header.data_file)))
        if found.is_aside:
            images |= dict.fromkeys(path for path in paths if files.inode(path) in found.below)
        elif header is not None or found.below or path.endswith(LIKE_RAW):
            images[path] = None
    return [path for path in images if os.path.realpath(path) not in data]


def below(image: str) -> Odd | None:
    """Why a start from `image` fails, as far as the headers below it tell: one names a file that is not there."""
    seen: set[Inode] = set()
    while True:
        try:
            found = read(image)
        except OSError as error:
            return None if error.errno is None else Odd(image, f"cannot be read ({error.strerror})", OWNER)
        if found.dangling:
            return Odd(
                image,
                f"names {found.dangling} in its header, which is not there",
                f"`qmpmerge recover {shlex.quote(image)}`",
            )
        if not found.below or found.inode in seen:
            return None
        seen.add(found.inode)
        image = _backing_of(found)


def _backing_of(found: Found) -> str:
    """The path by which the header leads to what is below."""
    name = backing.named_path(backing_names.read(found.file) or "") or ""
    folders = (os.path.dirname(found.file), os.path.dirname(os.path.realpath(found.file)))
    return next((path for folder in folders if files.inode(path := os.path.join(folder, name))), found.file)


class _Search:
    """The images of all folders that were looked at, by what they are built on."""

    def __init__(self) -> None:
        self._folders: dict[str, None] = {}
        self._built_on: dict[Inode, list[Found]] = {}
        self._dangling: dict[str, list[Found]] = {}
        self._odd: dict[Odd, None] = {}

    def look_around(self, images: Iterable[Found]) -> bool:
        """Read all that lies around these images, and where their notes lead; whether any of it was not known before."""
        before = len(self._folders)
        for image in list(images):
            for place in dict.fromkeys((image.file, os.path.realpath(image.file))):
                self._read(os.path.dirname(place))
            right, wrong = noted(image.file)
            self._odd |= dict.fromkeys(wrong)
            for note in right:
                self._read(os.path.dirname(note.file))
        return len(self._folders) > before

    def _read(self, folder: str) -> None:
        if folder in self._folders:
            return
        self._folders[folder] = None
        try:
            with os.scandir(folder) as entries:
                paths = [entry.path for entry in entries if _is_file(entry)]
        except OSError as error:
            self._odd[Odd(folder, f"cannot be listed ({error.strerror})", OWNER)] = None
            return
        for path in sorted(paths, key=lambda path: (os.path.islink(path), path)):  # a file is called by its own name
            self._add(path)

    def _add(self, path: str) -> None:
        try:
            found = read(path)
        except OSError as error:
            # Without an errno its header is broken: QEMU could not open it either.
            if error.errno is not None and os.path.exists(path):
                self._odd[Odd(path, f"cannot be read ({error.strerror})", OWNER)] = None
            return
        for inode in found.below:
            self._built_on.setdefault(inode, []).append(found)
        if found.dangling:
            self._dangling.setdefault(found.dangling, []).append(found)

    def climb(self, start: Found) -> Above:
        """All that is built on `start`, of what is known so far."""
        found = Above({start.inode: start}, odd=list(_doubtful(start)))
        seen, waiting = {start.inode}, [start]
        while waiting:
            image = waiting.pop()
            children = self._built_on.get(image.inode, [])
            if image.inode not in found.images:  # put aside
                children = children + self._dangling.get(stashed.original_of(image.file) or "", [])
                found.odd += [_stranded(child, image) for child in children if not child.is_aside]
            for child in children:
                if child.inode not in seen:
                    seen.add(child.inode)
                    waiting.append(child)
                    if not child.is_aside:
                        found.images[child.inode] = child
                        found.odd += _doubtful(child)
        return found

    def told(self, found: Above) -> Above:
        """What was found when there was nothing more to look at."""
        parents = {inode for image in found.images.values() for inode in image.below}
        found.leaves = sorted(image.file for inode, image in found.images.items() if inode not in parents)
        found.folders = list(self._folders)
        found.odd += [*self._odd, *_strangers(found)]
        return found


_NOTE = "find out which image holds the last writes, then `rm -f -- {}`"


def noted(image: str) -> tuple[list[notes.Note], list[Odd]]:
    """The notes about overlays of `image` that their headers confirm, and what is wrong about the others."""
    right: list[notes.Note] = []
    wrong: list[Odd] = []
    try:
        found, told = read(image), notes.above(image)
    except OSError:
        return [], []  # its folder is odd already
    for note in told:
        reason = note.reason or _wrong(note, found)
        if reason:
            wrong.append(Odd(note.path, f"is not believed: {reason}", _NOTE.format(shlex.quote(note.path))))
        else:
            right.append(note)
    return right, wrong


def _wrong(note: notes.Note, image: Found) -> str:
    """What is wrong about a note that it was put on `image`; empty where its header says so too."""
    if not note.is_true:
        return f"{note.file}, which was put on {image.file}, is not there, or another file is"
    with_header = read(note.file)
    return "" if image.inode in with_header.below else f"the header of {note.file} does not name {image.file}"


def _stranded(child: Found, aside: Found) -> Odd:
    file, folder = shlex.quote(child.file), shlex.quote(os.path.dirname(child.file))
    cure = f"`qmpmerge recover {file}`, or `qmpmerge doctor {folder}`"
    return Odd(child.file, f"is built on {aside.file}, which was merged away", cure)


def _doubtful(image: Found) -> Iterator[Odd]:
    """Whether it was merged away is not sure."""
    note = notes.doubt(image.file)
    if note is not None:
        yield Odd(image.file, f"was merged, says {note.path}, but {note.reason}", _NOTE.format(shlex.quote(note.path)))
    if stashed.original_of(image.file):
        cure = "find out what it holds, then give it another name, or remove it"
        yield Odd(image.file, "is called like an image that a merge has put aside, and nothing says that one has", cure)


def _strangers(found: Above) -> Iterator[Odd]:
    """Anybody can put an overlay into a folder that anybody may write to."""
    for image in found.images.values():
        owners = {found.images[inode].owner for inode in image.below if inode in found.images}
        if owners and image.owner not in {*owners, os.geteuid(), 0}:
            cure = f"name {image.file} itself if you trust it, or `chown` it"
            yield Odd(image.file, f"belongs to another user (uid {image.owner}) than what it is built on", cure)


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False
