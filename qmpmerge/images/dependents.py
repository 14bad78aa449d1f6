"""
Who else is built on an image: the headers of all images in some folders, and of those that processes have open, read once.

QEMU knows nothing about it: an overlay that nobody has open at the moment is ruined without a word when an image below
it is merged away or written to.
"""

import contextlib
import os
import re
import shlex
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image, Inode
from qmpmerge.images import backing_names, notes, stashed
from qmpmerge.images import files as files_
from qmpmerge.mounts import mounts
from qmpmerge.value import Value

MOST = 100_000
"""Files and folders that are looked at before a search is given up."""

LONGEST = 30.0
"""Seconds that a search takes before it is given up."""

AWAY = "stale"
"""The folder into which images go that are put out of reach."""

_OURS = re.compile(r"\..+\.qmpmerge-[a-z]+(\.new)?", re.DOTALL)
"""Locks, records and notes of ours, which nobody counts as files of his."""

A_STEP = 100
"""Files that are looked at until others have their turn, and a signal is heeded."""


class Dependent(Value):
    """`file` is an image outside the chain whose header names `image` as its backing file."""

    file: str
    image: str


class Doubt(Value):
    """A file on disk that does not let us see which image something is built on: why, and what to do about it."""

    file: str
    reason: str
    cure: str


RIDDLE = (
    "its header names its backing file in a way that we cannot read, and QEMU may be led to one of these images by it",
    "`qemu-img rebase -u -F FORMAT -b PATH FILE` has it name a path instead",
)
"""The reason and the cure for an image that is built on we cannot tell what."""


def doubt(note: notes.Note, image: str) -> tuple[str, str]:
    """The same of a note about an overlay of `image`, which does not lead to that."""
    reason = note.reason or f"{note.file} is not there, or another file is"
    cure = f"`rm -f -- {shlex.quote(note.path)}` once you know that no VM is started from that overlay"
    return f"it says that an overlay in another folder was put on {image}, but {reason}", cure


class Look:
    """
    A look for images outside of a chain that are built directly on one of `images`; afterwards, what was seen.

    Looked through are the folders of the chain's files, under their names and their real ones, and `search` with all that is
    below: not other filesystems that are mounted there, and no symlinks to folders. Files that were stashed are passed over
    (`stashed`), since no VM starts from them any more. Also looked at is what notes beside `images` tell of (`notes.above`).
    `opened` are more files to look at, those too.
    """

    def __init__(
        self, images: Sequence[Image], chain: Chain, search: Collection[str] = (), opened: Iterable[str] = ()
    ) -> None:
        self._wanted = {image.inode: image.file for image in images if image.inode is not None}
        self._noted = [image.file for image in images if image.has_path and not image.is_renamed]
        self._members = {image.inode for image in chain}
        self._chain = chain
        self._search = [os.path.realpath(folder) for folder in search]
        self._opened = opened
        self._found: dict[str, Dependent] = {}
        self._missed: dict[str, dict[str, None]] = {}
        self._searched: set[str] = set()
        self.unlisted: list[str] = []
        """Folders of the chain, or that the search was to begin with, that are there and may not be listed."""
        self.doubts: dict[Doubt, None] = {}
        """What may be built on one of the images, and does not let us see whether it is."""
        self._deadline: float | None = None
        self.is_cut = False
        """Whether the search came to one of its bounds."""
        self.files = 0
        """Those that were looked at, without ours."""
        self.folders: dict[str, None] = {}
        """All that were looked through, by their real paths."""

    @property
    def dependents(self) -> tuple[Dependent, ...]:
        """Those that were found, by their names."""
        return tuple(sorted(self._found.values(), key=lambda dependent: dependent.file))

    @property
    def told(self) -> str:
        """How much was looked at, and where."""
        below = [f"all below {folder}" for folder in dict.fromkeys(self._search)]
        named = ", ".join([*folders(self._chain), *below])
        count = len(self.folders)
        return f"{self.files} files in {count} folder{'s' if count != 1 else ''}: {named}"

    @property
    def unseen(self) -> tuple[str, ...]:
        """What was not looked at, and why: a clause for each reason."""
        return tuple(
            f"{next(iter(paths))}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} {reason}"
            for reason, paths in self._missed.items()
        )

    def covers(self, folder: str) -> bool:
        """Whether `folder` was looked through because it lies in one that was searched to its end."""
        return not self.is_cut and os.path.realpath(folder) in self._searched

    def steps(self) -> Iterator[None]:
        """Look, a little at each step; where nothing is to be harmed, nowhere."""
        if not self._noted and not self._wanted:
            return
        for folder in folders(self._chain):
            yield from self._look_through(folder)
        yield from self._below()
        for image in self._noted:
            with contextlib.suppress(OSError):  # its folder cannot be listed, which was told already
                self._look_where_noted(image)
        for path in self._opened:
            self._look_at(path)

    def _below(self) -> Iterator[None]:
        """The folders of the search, the nearer ones first."""
        borders = {mount.place for mount in mounts()} if self._search else set()
        self._deadline = time.monotonic() + LONGEST
        links: dict[str, str] = {}
        waiting = dict.fromkeys(self._search)
        while waiting and not self._is_over(next(iter(waiting))):
            folder = next(iter(waiting))
            del waiting[folder]
            self._searched.add(folder)
            for entry in (yield from self._look_through(folder)):
                if entry.is_symlink():
                    links[entry.path] = os.path.realpath(entry.path)
                elif entry.path in borders and entry.path not in self._search:
                    self._miss(entry.path, "is another filesystem: name it by `--search` too")
                elif entry.path not in self._searched:
                    waiting[entry.path] = None
        for link, folder in links.items():
            if folder not in self._searched and folder not in waiting:
                self._miss(link, "is a link to another folder: name that by `--search` too")

    def _is_over(self, folder: str) -> bool:
        """Of the search; the folders of the chain are looked through whatever they hold."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if self._deadline is not None and (late or self.files + len(self.folders) >= MOST):
            reason = f"it takes longer than {LONGEST:.0f} s" if late else f"more than {MOST} files are too many"
            self._miss(folder, f"was not looked through to its end: {reason}")
            self.is_cut = True
        return self.is_cut

    def _look_through(self, folder: str) -> Generator[None, None, list["os.DirEntry[str]"]]:
        """The files of a folder, once; returns the folders in it."""
        yield
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError as error:
            self._miss(folder, f"cannot be listed ({error.strerror})")
            if isinstance(error, PermissionError) and folder in folders(self._chain, self._search):
                self.unlisted.append(folder)
            return []
        if folder not in self.folders:
            self.folders[folder] = None
            for entry in filter(_is_file, entries):
                if self._is_over(folder):
                    break
                if stashed.is_stashed(entry.path):
                    continue
                self._look_at(entry.path)
                if not _OURS.fullmatch(entry.name):
                    self.files += 1
                if self.files % A_STEP == 0:
                    yield
        return [entry for entry in entries if _is_folder(entry)]

    def _look_where_noted(self, image: str) -> None:
        """At the overlays in other folders; those of the chain itself are known. Raises OSError."""
        known = {member[1] for member in self._members if member is not None}
        for note in notes.above(image):
            if files_.is_device(note.file):
                is_right = self._is_device_on(note)
            else:
                is_right = note.is_true or note.overlay in known
                self._look_at(note.file) if note.is_true else None
            if not is_right:
                self._doubt(note.path, *doubt(note, image))

    def _is_device_on(self, note: notes.Note) -> bool:
        """A device is made anew at each boot, and can hold anything: by its header it is the overlay still."""
        status = _status(note.file)
        if status is None or (status.st_dev, status.st_ino) in self._members:
            return status is not None
        self._look_at(note.file, noted=True)
        return os.path.realpath(note.file) in self._found

    def _look_at(self, path: str, *, noted: bool = False) -> None:
        status = _status(path)
        if status is None or (status.st_dev, status.st_ino) in self._members:
            return
        try:
            written = backing_names.read(path, device=noted)
        except OSError as error:
            # Without an errno its header is broken: QEMU could not open it either.
            if error.errno is not None and os.path.exists(path):
                self._miss(path, f"cannot be read ({error.strerror})")
            return
        if written is not None and backing.is_riddle(written):
            self._doubt(path, *RIDDLE)
            return
        for inode in _leads(path, written) & self._wanted.keys():
            self._found.setdefault(os.path.realpath(path), Dependent(path, self._wanted[inode]))

    def _doubt(self, path: str, reason: str, cure: str) -> None:
        self._miss(path, f"is not understood ({reason})")
        self.doubts[Doubt(path, reason, cure)] = None

    def _miss(self, path: str, reason: str) -> None:
        self._missed.setdefault(reason, {})[path] = None


async def look(images: Sequence[Image], chain: Chain, search: Collection[str] = (), opened: Iterable[str] = ()) -> Look:
    """Look for images that are built on `images`; others have their turn meanwhile."""
    import asyncio  # `active` asks nobody, and looks without

    looking = Look(images, chain, search, opened)
    for _step in looking.steps():
        await asyncio.sleep(0)
    return looking


def look_now(images: Sequence[Image], chain: Chain, search: Collection[str] = (), opened: Iterable[str] = ()) -> Look:
    """The same, for those who have nobody to wait for."""
    looking = Look(images, chain, search, opened)
    for _step in looking.steps():
        pass
    return looking


def folders(chain: Chain, search: Collection[str] = ()) -> list[str]:
    """The folders in which the chain's files are, under their names and their real ones, and those of `search`."""
    files = [image.file for image in chain if image.has_path]
    linked = [os.path.realpath(file) for file in files if os.path.islink(file)]
    names = dict.fromkeys(
        map(os.path.dirname, (*files, *linked))
    )  # most lie in one folder, and realpath looks at each part
    return list(dict.fromkeys(map(os.path.realpath, (*names, *search))))


def is_outside(base: Image, active: Image) -> bool:
    """
    Whether `base` lies outside the active image's folder, so that what else is built on it may lie anywhere.

    Of a chain that lies on the network altogether nothing is known.
    """
    if not (base.has_path and active.has_path):
        return base.has_path or active.has_path
    return os.path.dirname(os.path.realpath(base.file)) not in _homes(active)


def folders_above(base: Image, active: Image) -> list[str]:
    """The active image's folders, where `base` lies somewhere below: then what else is built on it lies there too."""
    if not (base.has_path and active.has_path and is_outside(base, active)):
        return []
    place = os.path.realpath(base.file)
    return [home for home in dict.fromkeys(_homes(active)) if os.path.commonpath((place, home)) == home]


def _homes(active: Image) -> tuple[str, str]:
    return os.path.realpath(os.path.dirname(active.file)), os.path.dirname(os.path.realpath(active.file))


def files(folder: str) -> list["os.DirEntry[str]"]:
    """The regular files of a folder, symlinks to some included; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if _is_file(entry)]
    except OSError:
        return []


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def _leads(path: str, written: str | None) -> set[Inode]:
    """The inodes that the backing name in a file's header leads to: QEMU resolves it from the name that it was given."""
    names = backing.named_paths(written) if written is not None else ()
    folders = {os.path.dirname(path)} if names else set()
    if names and os.path.islink(path):
        folders.add(os.path.dirname(os.path.realpath(path)))
    places = [os.path.join(folder, name) for folder in folders for name in names]
    found = [status for place in places if (status := _status(place)) is not None]
    return {(status.st_dev, status.st_ino) for status in found}


def out_of_reach(file: str) -> str:
    """The command, for a shell, after which no start finds an image by its name, and none is built on what it was."""
    away = os.path.join(os.path.dirname(file), AWAY)
    return f"{shlex.join(['mkdir', '-p', away])} && {shlex.join(['mv', '--backup=numbered', '--', file, away])}"


def image_at(file: str) -> Image:
    """A file by its identity alone."""
    try:
        status = os.stat(file)
    except OSError:
        return Image(file, "qcow2", 0)
    return Image(file, "qcow2", 0, inode=(status.st_dev, status.st_ino))
