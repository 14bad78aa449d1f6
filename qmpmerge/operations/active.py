"""
Which image a VM must be started from: told by headers and notes, as long as no merge was left unfinished.
"""

import os
import shlex
from collections.abc import Iterator

from qmpmerge.chain.chain import Image
from qmpmerge.errors import ActiveUnknown, Error, NoActive, SeveralActive
from qmpmerge.images import files, formats, notes, overlays, stashed
from qmpmerge.images.overlays import Above, Around
from qmpmerge.images.stashed import Note
from qmpmerge.journal import locks, store
from qmpmerge.journal.store import Disbelieved
from qmpmerge.value import Value

SECTOR = 512


class Active(Value):
    """The image that a VM must be started from, and its format, as QEMU's `format=` takes it."""

    file: str
    format: str

    @property
    def drive(self) -> str:
        """Both, as QEMU's `-drive` takes them."""
        return f"file={self.file.replace(',', ',,')},format={self.format}"


def active(path: "str | os.PathLike[str]", around: Around | None = None) -> Active:
    """
    The one image that a VM must be started from whose chain has the image at `path`, or all of whose images lie in the
    folder `path`.

    An image that was merged away and is stashed, or has kept its name, leads to the active image of the base that it was
    merged into. Nothing is opened but headers and notes, and no program is run. `around` is the folder, for those who ask about
    many images of it. Raises NoActive and SeveralActive; ActiveUnknown where a merge is not finished.
    """
    path = os.path.abspath(os.fspath(path))
    if files.is_device(path):
        raise NoActive(path=path, reason="what is built on a device cannot be told from there", cure=_DEVICE)
    try:
        starts = overlays.in_folder(path) if os.path.isdir(path) else [path]
    except OSError as error:
        raise NoActive(path=path, reason=f"cannot be listed: {error.strerror}", cure=overlays.OWNER) from None
    leaves: dict[str, str] = {}
    is_branched = False
    while starts:
        above = _above(starts[0], path, around)
        leaves |= above.leaves
        is_branched |= len(above.leaves) > 1
        seen = {image.inode for image in above.images.values()}
        starts = [start for start in starts[1:] if files.inode(start) not in seen]
    if not leaves:
        raise NoActive(path=path, reason="there is no image in this folder", cure="name an image of the chain")
    if len(leaves) > 1:
        raise SeveralActive(path=path, images=sorted(leaves), are_disks=os.path.isdir(path) and not is_branched)
    ((leaf, form),) = leaves.items()
    form = form or ("raw" if leaf.endswith(formats.RAW) else "")
    for reason, cure in _no_image(leaf, form):
        raise NoActive(path=path, reason=f"{leaf} {reason}", cure=cure)
    broken = overlays.below(leaf, form)
    if broken is not None:
        raise NoActive(path=path, reason=f"{broken.file} {broken.reason}", cure=broken.cure)
    return Active(leaf, form)


def refusal(path: str, around: Around | None = None) -> Error | None:
    """Why `active` tells no image, None where it does."""
    try:
        active(path, around)
    except Error as error:
        return error
    return None


_DEVICE = "name the overlay, or the folder of the overlays; where there never was one, start the VM from the device"
_FORMAT = "give it a name that says what it is: one that ends in .qcow2, or in .raw"


def _no_image(file: str, form: str) -> Iterator[tuple[str, str]]:
    """Why no VM can be started from a file of this format, as far as we know, and what to do about it."""
    name = shlex.quote(file)
    if not form:
        yield "may be a qcow2 image, or a raw one whose guest has written a header: its name does not say", _FORMAT
    elif form not in ("qcow2", "raw"):
        convert = f"`qemu-img convert -f {form} -O qcow2 {name} {name}.qcow2`"
        cure = f"start the VM from it without asking, or make a qcow2 image of it: {convert}"
        yield f"is a {form} image, which qmpmerge does not handle", cure
    elif form == "raw" and files.is_regular(file) and (size := os.stat(file).st_size) % SECTOR:
        cure = f"move it out of this folder if it is none; else `truncate -s %{SECTOR} {name}` fills up its last sector"
        yield f"is no disk image: its size, {size}, is no multiple of {SECTOR}", cure


def _above(image: str, path: str, around: Around | None) -> Above:
    """What is built on `image`, or on what it was merged into. Raises NoActive, ActiveUnknown."""
    _refuse_unfinished(path, image, [os.path.dirname(image), os.path.dirname(files.real(image))], None)
    start = _merged_into(image, path)
    try:
        above = overlays.above(start, path if os.path.isdir(path) else os.path.dirname(path), around)
    except OSError as error:
        reason = f"{start} cannot be read: {error.strerror or error}"
        raise NoActive(path=path, reason=reason, cure="name an image of the chain, or its folder") from None
    _refuse_unfinished(path, start, above.folders, above)
    for odd in above.odd:
        raise NoActive(path=path, reason=f"{odd.file} {odd.reason}", cure=odd.cure)
    return above


def _refuse_unfinished(path: str, image: str, folders: list[str], above: Above | None) -> None:
    """A merge of these images, or of one that is called so, whose record is there still, believed or not."""
    inodes = set(above.images) if above is not None else {inode for inode in [files.inode(image)] if inode is not None}
    names = [found.file for found in above.images.values()] if above is not None else [image, files.real(image)]
    beyond = locks.noted(Image(image, "raw", 0)).record  # of a base that lies far from what is built on it
    for folder in dict.fromkeys([*folders, *([os.path.dirname(beyond)] if beyond else [])]):
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            raise NoActive(path=path, reason=f"{folder} cannot be listed", cure=overlays.OWNER)
        for found in store.in_folder(folder):
            if isinstance(found, Disbelieved):
                if found.concerns(inodes):
                    reason = f"{found.path} is not believed ({found.reason})"
                    raise ActiveUnknown(path=path, reason=reason, cure=found.cure)
            elif found.direction == "pull":  # which image shows the newest data is the same before, meanwhile and after
                continue
            elif found.concerns(inodes) or any(map(found.is_called, names)):
                reason = f"a merge of {found.chain.active.file} was left or interrupted in state {found.state.value}"
                cure = f"run `qmpmerge recover {shlex.quote(found.chain.active.file)}`"
                raise ActiveUnknown(path=path, reason=reason, cure=cure)


def _merged_into(image: str, path: str) -> str:
    """
    The base into which an image was merged, that into which this was, and so on, as the notes say; any other image as it is.
    Raises NoActive where there is another file now, SeveralActive where others were pulled off it before.
    """
    seen: set[str] = set()
    while image not in seen:
        seen.add(image)
        note = _stash_note(image)
        base = note.base if note is not None else notes.base_of(image)
        if base is None:
            break
        others = notes.pulled_before(note) if note is not None else []
        if set(others) - {base}:
            raise SeveralActive(path=path, images=sorted({base, *others}), are_disks=False)
        found = files.inode(base)
        if note is not None and note.base_inode is not None and found is not None and found[1] != note.base_inode[1]:
            reason = f"what {image} held has gone into {base}, and another file is there now"
            raise NoActive(path=path, reason=reason, cure="name an image that is there, or the folder")
        image = base
    return image


def _stash_note(image: str) -> Note | None:
    """What the last merge has said that has put aside an image of this name, or this very file; None while one has the name."""
    places = [image] if os.path.lexists(image) else stashed.names_of(files.real(image))
    told = [note for place in places if isinstance(note := stashed.look(place), Note)]
    return max(told, key=lambda note: note.since, default=None)
