"""
What is built on an image, and on that, up to the image that nothing is built on: by the headers of all images around, and by
the notes about overlays in other folders. Headers and notes are read, nothing else; both must say the same.
"""

import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from qmpmerge import users
from qmpmerge.chain.chain import Inode
from qmpmerge.images import dependents, files, formats, notes, qcow2, stashed
from qmpmerge.images.formats import Found, format_of
from qmpmerge.value import Value

LIKE_RAW = (".raw", ".img")
"""How a file without a header is called that may be an image."""

OWNER = "run it as a user who may read the images"


class Odd(Value):
    """Something for which nobody can say what is built on an image: about which file, a clause, and what to do about it."""

    file: str
    reason: str
    cure: str


@dataclass
class Above:
    """All that is built on some images, these included."""

    images: dict[Inode, Found] = field(default_factory=dict)
    """Those put aside are left out."""
    leaves: dict[str, str] = field(default_factory=dict)
    """Those on which nothing is built, and their formats; empty where nobody can say."""
    folders: list[str] = field(default_factory=list)
    odd: list[Odd] = field(default_factory=list)


def above(image: str, beside: str, around: "Around | None" = None) -> Above:
    """
    What is built on the image at `image`, in its folder, in the folder `beside`, in those to which notes lead, and so on.

    `around` is that folder, where it was read already. Raises OSError where `image` cannot be looked at.
    """
    search = Around(beside) if around is None else around.copy()
    start = formats.read(image)
    while True:
        known = search.climb(start)
        if not search.look_around(known.images.values()):
            return search.told(known)


def in_folder(folder: str) -> list[str]:
    """
    The images that lie in a folder: those with a header, those that are called like raw images and hold no other image's
    data, and what an image that was put aside was built on, a device too. Raises OSError where the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        paths = sorted(entry.path for entry in entries if _is_file(entry))
    images: dict[str, None] = {}
    data: set[str] = set()
    for path in paths:
        try:
            image = formats.read(path)
            header = qcow2.read(path) if format_of(image) == "qcow2" else None
        except OSError:
            continue
        if header is not None and header.data_file is not None:
            data.add(os.path.realpath(os.path.join(folder, header.data_file)))
        if image.is_aside:
            images |= dict.fromkeys(path for path in paths if files.inode(path) in image.below)
            images |= dict.fromkeys(path for path in [image.leads_to] if files.is_device(path))
        elif image.like != "raw" or path.endswith(LIKE_RAW):
            images[path] = None
    return [path for path in images if os.path.realpath(path) not in data]


def below(image: str, form: str) -> Odd | None:
    """Why a start from `image`, of this format, fails as far as the headers tell: one names a file that is not there."""
    seen: set[Inode] = set()
    while form != "raw":
        try:
            there = formats.read(image)
        except OSError as error:
            return None if error.errno is None else Odd(image, f"cannot be read ({error.strerror})", OWNER)
        if there.dangling:
            return Odd(
                image,
                f"names {there.dangling} in its header, which is not there",
                f"put back what it names, or where a merge was left unfinished, `qmpmerge recover {shlex.quote(image)}`",
            )
        if not there.below or there.inode in seen:
            return None
        seen.add(there.inode)
        image, form = there.leads_to, there.recorded
    return None


class Around:
    """The images of a folder, and of others that were looked at since, by what they are built on."""

    def __init__(self, beside: str) -> None:
        self._folders: dict[str, None] = {}
        self._devices: set[str] = set()
        self._built_on: dict[Inode, list[Found]] = {}
        self._dangling: dict[str, list[Found]] = {}
        self._odd: dict[Odd, None] = {}
        self._pulled: dict[Inode, list[Found]] = {}
        self._read(beside)

    def copy(self) -> "Around":
        """The same; what is looked at later is known to one of them."""
        other = Around.__new__(Around)
        other._folders, other._devices, other._odd = dict(self._folders), set(self._devices), dict(self._odd)
        other._pulled = dict(self._pulled)
        other._built_on = {inode: list(images) for inode, images in self._built_on.items()}
        other._dangling = {name: list(images) for name, images in self._dangling.items()}
        return other

    def look_around(self, images: Iterable[Found]) -> bool:
        """Read all that lies around these images, and where their notes lead; whether any of it was not known before."""
        before = len(self._folders), len(self._devices), len(self._pulled)
        for image in list(images):
            for place in dict.fromkeys((image.file, os.path.realpath(image.file))):
                self._read(os.path.dirname(place))
            right, wrong = noted(image.file)
            self._odd |= dict.fromkeys(wrong)
            self._follow_pulls(image)
            for note in right:
                if not files.is_device(note.file):
                    self._read(os.path.dirname(note.file))
                elif note.file not in self._devices:
                    self._devices.add(note.file)
                    self._add(note.file)
        return (len(self._folders), len(self._devices), len(self._pulled)) != before

    def _follow_pulls(self, image: Found) -> None:
        """What was built on an image before a pull goes on from it still: a pull changes nothing of what a VM starts from."""
        if image.inode in self._pulled:
            return
        found = []
        for note in notes.pulled_into(image.file):
            try:
                into = formats.read(note.file) if not note.reason else None
                reason = note.reason
            except OSError as error:
                into, reason = None, f"{note.file} cannot be read ({error.strerror or error})"
            if into is None:
                what = f"was left by a pull, says {note.path}, but {reason}"
                self._odd[Odd(image.file, what, _cure(note, image))] = None
            else:
                found.append(into)
        if found:
            self._pulled[image.inode] = found
        for into in found:
            self._read(os.path.dirname(into.file))

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
            image = formats.read(path)
        except OSError as error:
            # Without an errno its header is broken: QEMU could not open it either.
            if error.errno is not None and os.path.exists(path):
                self._odd[Odd(path, f"cannot be read ({error.strerror})", OWNER)] = None
            return
        for inode in image.below:
            self._built_on.setdefault(inode, []).append(image)
        if image.dangling:
            self._dangling.setdefault(image.dangling, []).append(image)

    def format(self, image: Found, seen: frozenset[Inode] = frozenset()) -> str:
        """The format of an image, by all that is known of what is built on it (see `format_of`)."""
        seen |= {image.inode}
        built = self._built_on.get(image.inode, [])
        above = [child for child in built if child.recorded and child.inode not in seen]
        return format_of(image, {child.recorded for child in above if self.format(child, seen) == child.like})

    def climb(self, start: Found) -> Above:
        """All that is built on `start`, of what is known so far."""
        known = Above({start.inode: replace(start, below=frozenset())}, odd=list(_doubtful(start)))
        seen, waiting = {start.inode}, [start]
        while waiting:
            image = waiting.pop()
            children = [*self._built_on.get(image.inode, ()), *self._pulled.get(image.inode, ())]
            if image.inode not in known.images:  # put aside
                children = children + self._dangling.get(stashed.original_of(image.file) or "", [])
                children = [child for child in children if self.format(child) != "raw"]
                whole = [child for child in children if not child.is_aside and notes.of_this(child.file) is None]
                known.odd += [_stranded(child, image) for child in whole]
            for child in children:
                if child.inode not in seen and (form := self.format(child)) != "raw":
                    seen.add(child.inode)
                    waiting.append(child)
                    if not child.is_aside:
                        known.images[child.inode] = child
                        known.odd += [*_doubtful(child), *([] if form else [_guest_like(child, image)])]
        return known

    def told(self, known: Above) -> Above:
        """What was found when there was nothing more to look at."""
        parents = {inode for image in known.images.values() for inode in image.below} | self._pulled.keys()
        leaves = [image for inode, image in known.images.items() if inode not in parents]
        known.leaves = {image.file: self.format(image) for image in sorted(leaves, key=lambda image: image.file)}
        known.folders = list(self._folders)
        known.odd += [*self._odd, *_strangers(known), *self._broken()]
        return known

    def _broken(self) -> Iterator[Odd]:
        """Images that name a file which should lie in one of these folders: what they were built on may be any image of it."""
        for missing, children in self._dangling.items():
            if os.path.dirname(missing) in self._folders and stashed.of(missing) is None:
                for child in children:
                    if not child.is_aside and self.format(child) not in ("", "raw"):
                        file = shlex.quote(child.file)
                        cure = (
                            f"`qmpmerge recover {file}`, or put back what it names, or move it to a folder of its own"
                        )
                        yield Odd(child.file, f"names {missing} in its header, which is not there", cure)


def _guest_like(image: Found, below: Found) -> Odd:
    reason = f"begins like a {image.like} image on {below.file}, which the guest of a raw image can have written"
    name = shlex.quote(f"{os.path.splitext(image.file)[0]}.{image.like}")
    move = f"`mv -n {shlex.quote(image.file)} {name}` while no VM runs from it"
    return Odd(image.file, reason, f"if it is one, {move}; if it is a raw image, move it to a folder of its own")


_NOTE = "find out which image holds the last writes, then `rm -f -- {}`"


def _cure(note: notes.Note, left: Found) -> str:
    """Without the note an image that a pull has left looks like one to start from."""
    if note.own != left.inode[1]:
        return _NOTE.format(shlex.quote(note.path))
    if "written to since" in note.reason:
        name, gone = shlex.quote(note.path), note.file
        return f"name the image that the VM goes on from; once no start script names {left.file} for {gone}, `rm -f -- {name}`"
    return (
        f"find out which image holds the last writes, and name that: {left.file} holds older data. Once nobody needs it, move "
        "it out of its folder"
    )


def noted(image: str) -> tuple[list[notes.Note], list[Odd]]:
    """The notes about overlays of `image` that their headers confirm, and what is wrong about the others."""
    right: list[notes.Note] = []
    wrong: list[Odd] = []
    if files.is_device(image):
        return [], []  # no note of ours lies beside one
    try:
        there, told = formats.read(image), notes.above(image)
    except OSError:
        return [], []  # its folder is odd already
    for note in told:
        reason = note.reason or _wrong(note, there)
        if reason:
            wrong.append(Odd(note.path, f"is not believed: {reason}", _NOTE.format(shlex.quote(note.path))))
        else:
            right.append(note)
    return right, wrong


def _wrong(note: notes.Note, image: Found) -> str:
    """
    What is wrong about a note that it was put on `image`; empty where its header says so too, whichever file it is: what was
    restored from a backup has the names that it had.
    """
    try:
        overlay = formats.read(note.file)
    except OSError as error:
        return f"{note.file}, which was put on {image.file}, is not there ({error.strerror or error})"
    return "" if image.inode in overlay.below else f"the header of {note.file} does not name {image.file}"


def _stranded(child: Found, aside: Found) -> Odd:
    file, folder = shlex.quote(child.file), shlex.quote(os.path.dirname(child.file))
    cure = f"`qmpmerge recover {file}`, or `qmpmerge doctor {folder}`"
    return Odd(child.file, f"is built on {aside.file}, which was put aside", cure)


def _doubtful(image: Found) -> Iterator[Odd]:
    """Whether it was merged away is not sure."""
    note = notes.doubt(image.file)
    if note is not None:
        yield Odd(image.file, f"was merged, says {note.path}, but {note.reason}", _settled(image, note))
    if stashed.original_of(image.file):
        cure = "find out what it holds, then give it another name, or remove it"
        yield Odd(image.file, "is called like an image that a merge has put aside, and nothing says that one has", cure)


def _settled(image: Found, note: notes.Note) -> str:
    """What to do about an image that may have been merged; removing its note makes it the active one."""
    away = f"`{dependents.out_of_reach(image.file)}`"
    if note.own == image.inode[1]:
        return f"copy what you miss out of it, for it shows older data under what was written since, then {away}"
    rm = f"`rm -f -- {shlex.quote(note.path)}`"
    return f"find out which image holds the last writes: {rm} if it is this one, else, once no VM runs from it, {away}"


def _strangers(known: Above) -> Iterator[Odd]:
    """Anybody can put an overlay into a folder that anybody may write to."""
    for image in known.images.values():
        owners = {known.images[inode].owner for inode in image.below if inode in known.images}
        if owners and image.owner not in {*owners, os.geteuid(), 0}:
            cure = f"name {image.file} itself if you trust it, or `chown` it"
            yield Odd(image.file, f"belongs to another user ({users.name(image.owner)}) than what it is built on", cure)


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False
