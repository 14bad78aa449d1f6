"""
Notes beside images, about what no header says: which overlay in another folder, or whose name does not say that it is one, was
put on an image, that an image which has kept its name was merged away, and which image was pulled into that was built on one.

Whoever looks at an image sees only what lies in its folder. A note is a claim: it counts only where nobody but us and root
can have written it, and as long as the files that it names are those that it was written about. Inode numbers tell that;
device numbers change with a reboot.
"""

import errno
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from qmpmerge import folder
from qmpmerge.chain.chain import Inode
from qmpmerge.images import files, stashed
from qmpmerge.images.files import Seen
from qmpmerge.value import Value

ABOVE, MERGED, PULLED = ".qmpmerge-overlay", ".qmpmerge-merged", ".qmpmerge-pulled"
QCOW2 = ".qcow2"
_LEFT = re.compile(rf"\.(?P<image>.+)\.[0-9a-f]+{re.escape(PULLED)}", re.DOTALL)
_LARGEST = 65536
_NEVER = Seen(-1, -1)
"""As no file looks."""


class Note(Value):
    """What a note at `path` says: the other image's path and inode number; `reason` is why it is not believed."""

    path: str
    file: str = ""
    inode: int = 0
    own: int = 0
    seen: Seen | None = None
    """The inode number of the image beside which it lies, and what that looked like; of one merged, or left by a pull."""
    reason: str = ""

    @property
    def is_true(self) -> bool:
        """Whether the file that it names is the one that it was written about."""
        found = files.inode(self.file) if not self.reason else None
        return found is not None and found[1] == self.inode

    @property
    def overlay(self) -> int | None:
        """The overlay's inode number as the name of a note about one tells it, believed or not."""
        try:
            return int(self.path.removesuffix(ABOVE).rpartition(".")[2], 16)
        except ValueError:
            return None


def put_on(image: str, meant: Inode | None, overlay: str) -> str:
    """
    Note beside `image` that `overlay` was put on it, durably, and return the note's path. An image can have several.

    Raises OSError, also where `image` does not lead to the file that is `meant`: nothing is noted then.
    """
    number = os.stat(overlay).st_ino
    told = {"overlay": _name_of(overlay), "inode": number}
    return _write(image, meant, f".{number:x}{ABOVE}", told)


def merged(image: str, meant: Inode | None, base: str) -> str:
    """Note beside `image`, which keeps its name, that all it holds is in `base` now. As `put_on`."""
    told = {
        "base": os.path.realpath(base),
        "inode": os.stat(base).st_ino,
        **_looks(os.stat(image).st_ino, files.seen(image)),
    }
    return _write(image, meant, MERGED, told)


def pulled(image: str, meant: Inode | None, into: str) -> str:
    """
    Note beside `image`, which shows what it always did, that `into` was built on it until that was pulled into. As `put_on`.
    """
    return _pulled(image, meant, os.path.realpath(into), os.stat(into).st_ino)


def _pulled(image: str, meant: Inode | None, into: str, inode: int) -> str:
    told = {"into": into, "inode": inode, **_looks(os.stat(image).st_ino, files.seen(image))}
    return _write(image, meant, _left_for(inode), told)


def _left_for(inode: int) -> str:
    """How the name of a note ends about what was pulled into the file of this inode number."""
    return f".{inode:x}{PULLED}"


def _looks(own: int, seen: Seen) -> dict[str, int]:
    return {"own": own, "size": seen.size, "changed": seen.changed}


def is_needed(image: str, overlay: str) -> bool:
    """
    Whether only a note can tell who looks at `image` that this overlay is built on it: it lies elsewhere, or its name does not
    say that its header is no guest's. A device can have none: its folder is empty after the next boot.
    """
    image, overlay = os.path.realpath(image), os.path.realpath(overlay)
    is_elsewhere = os.path.dirname(image) != os.path.dirname(overlay)
    return (is_elsewhere or not overlay.endswith(QCOW2)) and not files.is_device(image)


def _name_of(overlay: str) -> str:
    """A device is called as it was named, for /dev/vg/snap leads to another one after the next boot."""
    return os.path.abspath(overlay) if files.is_device(overlay) else os.path.realpath(overlay)


def tells(image: str, overlay: str) -> bool:
    """Whether a note says that this very overlay was put on `image`; a device, which is made anew at each boot, by its name."""
    if files.is_device(overlay):
        return any(note.file == _name_of(overlay) for note in above(image))
    path = _path(image, f".{os.stat(overlay).st_ino:x}{ABOVE}")
    note = _read(path, "overlay") if os.path.lexists(path) else None
    return note is not None and note.is_true and note.file == _name_of(overlay)


def above(image: str) -> list[Note]:
    """The notes about overlays of `image`. Raises OSError where the folder cannot be listed."""
    return [_read(path, "overlay") for path in _numbered(image, ABOVE)]


def _numbered(image: str, end: str) -> list[str]:
    """The notes of a kind of which an image can have several, whose names have the other file's inode number."""
    place, name = os.path.split(os.path.realpath(image))
    start = f".{name}."
    found = sorted(one for one in os.listdir(place) if one.startswith(start) and one.endswith(end))
    return [os.path.join(place, one) for one in found if "." not in one[len(start) : -len(end)]]


def base_of(image: str) -> str | None:
    """The base into which `image` was merged, which has kept its name since; None where no note says so, or is believed."""
    note = _merged(image)
    return note.file if note is not None and not note.reason else None


def pulled_into(image: str) -> list[Note]:
    """
    The notes that what was built on `image` was pulled out of it, each leading to where that has gone since; with a `reason`
    where one is not believed. Raises OSError where the folder cannot be listed.
    """
    left = map(_left, _numbered(image, PULLED)) if os.path.exists(image) else ()
    return [end for note in left for end in _ends(_held_against(image, note))]


def _left(path: str) -> Note:
    return _read(path, "into")


def _held_against(image: str, note: Note) -> Note:
    if note.reason:
        return note
    if note.own != os.stat(image).st_ino:
        return replace(note, reason=f"{image} is another file than that: a copy, or a newer image")
    if note.seen != files.seen(image):
        return replace(note, reason=f"{image} was written to since")
    return note


def _ends(note: Note, before: frozenset[tuple[str, int]] = frozenset()) -> list[Note]:
    """The same for the images to which what `note` tells of was merged or pulled, and so on."""
    here = (note.file, note.inode)
    further = _further(note) if not note.reason and here not in before else []
    if further:
        return [end for one in further for end in _ends(one, before | {here})]
    is_lost = not note.reason and not note.is_true
    return [replace(note, reason=f"{note.file} is not there, or another file is") if is_lost else note]


def _further(note: Note) -> list[Note]:
    """Where the image has gone to which a note leads, if it has."""
    if note.is_true:
        merged = _merged(note.file)
        return [replace(note, file=merged.file, inode=merged.inode)] if merged is not None and not merged.reason else []
    aside = (found for found in map(stashed.look, stashed.names_of(note.file)) if isinstance(found, stashed.Note))
    bases = [
        (one.base, one.base_inode[1]) for one in aside if one.inode[1] == note.inode and one.base_inode is not None
    ]
    left = [(one.file, one.inode) for one in _left_of_this(note.file, note.inode)]
    return [replace(note, file=file, inode=inode) for file, inode in dict.fromkeys([*bases, *left])]


def _left_of_this(image: str, inode: int) -> list[Note]:
    """The notes that pulls have left beside this very image, which may be gone itself."""
    is_there = os.path.isdir(os.path.dirname(os.path.realpath(image)))
    left = map(_left, _numbered(image, PULLED)) if is_there else ()
    return [one for one in left if not one.reason and one.own == inode]


def pulled_before(aside: stashed.Note) -> list[str]:
    """The images that were pulled off one that is stashed now, where they have gone since. Raises OSError."""
    return [end.file for note in _left_of_this(aside.original, aside.inode[1]) for end in _ends(note)]


def lead_on(place: str, gone: str, inode: int, into: Collection[tuple[str, int]]) -> None:
    """
    Have the notes in a folder that lead to the image `gone`, which a pull has left or a merge takes away, lead to those that
    have its data, by path and inode number. Raises OSError.
    """
    for path, image in files.matching(place, _LEFT):
        note = _left(path)
        if not note.reason and (note.file, note.inode) == (gone, inode):
            with folder.beside(path) as (beside, name):
                for file, number in into:
                    told = {"into": os.path.realpath(file), "inode": number, **_looks(note.own, note.seen or _NEVER)}
                    beside.put(f".{image}{_left_for(number)}", _encoded(told), folder.NOTE)
                if all(number != inode for _file, number in into):
                    beside.remove(name, beside.inode_of(name))
                beside.sync()


def forget_left(place: str) -> None:
    """Remove the notes beside images that a pull had left and that are gone; what led to them is led on. Raises OSError."""
    found: dict[tuple[str, int], list[Note]] = {}
    for path, image in files.matching(place, _LEFT):
        gone, note = os.path.join(os.path.realpath(place), image), _left(path)
        if not os.path.lexists(gone) and not note.reason:
            found.setdefault((gone, note.own), []).append(note)
    for (gone, own), left in found.items():
        lead_on(place, gone, own, [(note.file, note.inode) for note in left])
        for note in left:
            _remove(note.path)


def doubt(image: str) -> Note | None:
    """The note that `image` was merged, where it is not believed: for the `reason` that it tells."""
    note = _merged(image)
    return note if note is not None and note.reason else None


def of_this(image: str) -> Note | None:
    """The note that this very file was merged, which it has been written to since or not."""
    note = _merged(image)
    return note if note is not None and note.own == os.stat(image).st_ino else None


def _merged(image: str) -> Note | None:
    """The note that an image of this name was merged: another file may be a copy of it, or newer, so nobody knows."""
    path = _path(image, MERGED)
    if not os.path.lexists(path) or not os.path.exists(image):
        return None
    note = _read(path, "base")
    if note.reason:
        return note
    if note.own != os.stat(image).st_ino:
        return replace(note, reason="it is another file than that: a copy, or a newer image")
    if not (note.is_true or _was_merged_on(note)):
        return replace(note, reason=f"{note.file}, into which it was merged, is not there, or another file is")
    return note if note.seen == files.seen(image) else replace(note, reason="it was written to since it was merged")


def _was_merged_on(note: Note) -> bool:
    """Whether the base has been merged itself meanwhile, and is stashed."""
    places = map(files.inode, stashed.names_of(note.file))
    return any(found is not None and found[1] == note.inode for found in places)


def renew_left(image: str, meant: Inode | None, before: Seen | None) -> None:
    """
    A pull into `image` has changed nothing of what it shows: notes that earlier ones have left beside it, and that were true
    when it looked as it did `before`, stay so. Raises OSError.
    """
    for note in map(_left, _numbered(image, PULLED)):
        if not note.reason and meant is not None and note.own == meant[1] and note.seen == before:
            _pulled(image, meant, note.file, note.inode)


def end_left(image: str, meant: Inode | None) -> list[str]:
    """
    A merge has gone into `image`: from now on no note that a pull has left beside it is true, though the merge may have had
    nothing to write. Returns their paths. Raises OSError.
    """
    left = [note for note in map(_left, _numbered(image, PULLED)) if meant is not None and note.own == meant[1]]
    for note in left:
        _write(
            image, meant, _left_for(note.inode), {"into": note.file, "inode": note.inode, **_looks(note.own, _NEVER)}
        )
    return [note.path for note in left]


def forget(image: str) -> None:
    """A new file has this name: what was noted about an earlier one is no more. Raises OSError."""
    for path in (_path(image, MERGED), *_numbered(image, PULLED)):
        _remove(path)


def take_away(image: str, overlays: Collection[int]) -> None:
    """Remove the notes about these overlays, by their inode numbers, beside `image`, which may be gone. Raises OSError."""
    for number in overlays:
        _remove(_path(image, f".{number:x}{ABOVE}"))


def _path(image: str, end: str) -> str:
    place, name = os.path.split(os.path.realpath(image))
    return os.path.join(place, f".{name}{end}")


def _write(image: str, meant: Inode | None, end: str, told: Mapping[str, object]) -> str:
    real, path = os.path.realpath(image), _path(image, end)
    with folder.beside(path) as (place, name):
        if meant is None or place.inode_of(os.path.basename(real)) != meant:
            raise FileNotFoundError(errno.ENOENT, f"{image} is another file now", image)
        inode = place.put(name, _encoded(told), folder.NOTE).inode
        try:
            place.sync()
        except OSError:
            place.remove(name, inode)
            raise
    return path


def _encoded(told: Mapping[str, object]) -> bytes:
    import json

    return json.dumps(told).encode() + b"\n"


def _remove(path: str) -> None:
    if os.path.lexists(path):
        with folder.beside(path) as (place, name):
            place.remove(name, place.inode_of(name))
            place.sync()


def _read(path: str, key: str) -> Note:
    """One that cannot be read, or that others can have written, has a `reason`."""
    try:
        return _decode(path, files.read_own(path, _LARGEST), key)
    except (OSError, files.Untrusted) as error:
        return Note(path, reason=getattr(error, "strerror", None) or str(error))


def _decode(path: str, data: bytes, key: str) -> Note:
    import json

    try:
        told = json.loads(data)
        file, inode = told[key], told["inode"]
        own = int(told.get("own", 0))
        seen = Seen(int(told["size"]), int(told["changed"])) if "size" in told else None
        if not (isinstance(file, str) and file.startswith("/") and "\0" not in file and type(inode) is int):
            raise ValueError(file)
    except (ValueError, KeyError, TypeError, RecursionError):
        return Note(path, reason="it is no note of ours")
    return Note(path, file, inode, own, seen)
