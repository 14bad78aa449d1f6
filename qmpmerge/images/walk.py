"""
A chain on disk, walked from its active image down without opening anything that has not passed the rule for names.

An image downloaded from somebody else may name a device, a URL or any file of ours as its backing file; a merge would
write into it. So each name is looked at before it is followed: it must be a plain path to a regular file in a folder that
the user has named, which the active image's own folder is; or a ``json:`` name that says no more than which part of it.
"""

import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import replace

from qmpmerge import folder
from qmpmerge.chain import backing
from qmpmerge.chain.backing import Described
from qmpmerge.chain.chain import Slice
from qmpmerge.errors import BackingLoop, Disguised, ForeignName, ImageUnreadable, NoFormat, TooDeep, UnsupportedFormat
from qmpmerge.folder import File, Inode
from qmpmerge.images import files, magic, qcow2, stashed
from qmpmerge.value import Value

DEEPEST = 800
"""Images in a chain. QEMU 10 crashes on the first read through 870 of them."""


class Layer(Value):
    """One image on disk: absolute path, format, and what its header says of others."""

    file: str
    format: str
    backing: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    """Its path, once it has passed the rule for names."""
    table_part: int = qcow2.SMALLEST_PART
    """So much of a table to read at a time: see `qcow2.TABLE_PART`."""
    encrypted: bool = False
    is_device: bool = False
    slice: Slice | None = None
    """The part of `file` that it is, None for the whole."""
    inodes: frozenset[Inode] = frozenset()
    """Which files it and its data are: those that were looked at, whatever has their names later."""


def walk(
    image: str,
    *,
    allow: Collection[str] = (),
    form: str | None = None,
    by_stashed_names: bool = False,
    deepest: int | None = DEEPEST,
) -> tuple[Layer, ...]:
    """
    The chain whose active image is `image`, base first, as the headers tell it.

    `allow` are folders, files and devices that backing names may lead to besides the folder of `image`. The format of
    `image` is `form`; without that it is qcow2 if it looks so, else raw; all others are what the header above records, and
    never probed: the first bytes of a raw image belong to the guest. With `by_stashed_names` an image that lost its name to
    a merge is found by its new one, where it has but one. A chain of more than `deepest` images is refused.

    Raises Disguised, ForeignName, NoFormat, BackingLoop, TooDeep, UnsupportedFormat, ImageUnreadable.
    """
    path = os.path.abspath(image)
    rule = _Rule(path, allow, by_stashed_names=by_stashed_names)
    layers: list[Layer] = []
    seen: set[object] = set()
    below: tuple[Described, File] | None = Described(path, form or ""), _looked_at(path)
    while below is not None:
        named, file = below
        layer, identity = _open(named, file)
        if identity in seen:
            raise BackingLoop(image=layers[-1].file, backing=named.path)
        if len(layers) == deepest:
            raise TooDeep(image=path, limit=deepest)
        seen.add(identity)
        if layer.format not in ("raw", "qcow2", "luks"):
            raise _unsupported(layer, layers)
        if layer.data_file is not None:
            with rule.followed(layer, layer.data_file) as data:
                layer = replace(layer, data_file=files.plain(data.path), inodes=layer.inodes | {data.inode})
        layers.append(layer)
        below = _below(layer, rule)
    return tuple(reversed(layers))


def refuse_deep(layers: Sequence[Layer]) -> None:
    """Of a chain that was walked to its end, and is to be opened. Raises TooDeep."""
    if len(layers) > DEEPEST:
        raise TooDeep(image=layers[-1].file, limit=DEEPEST)


def _unsupported(layer: Layer, above: Sequence[Layer]) -> UnsupportedFormat:
    active = above[0] if above else layer
    instead = "" if above else "; if it is raw, and its guest has written that, say so with `--format raw`"
    facts = {"active": active.file, "active_format": active.format, "instead": instead}
    return UnsupportedFormat(image=layer.file, format=layer.format, **facts)


def _looked_at(path: str, by: str = "") -> File:
    try:
        return folder.looked_at(path)
    except OSError as error:
        raise ImageUnreadable(file=path, reason=f"{error.strerror or error}{by}") from None


def _open(named: Described, seen: File) -> tuple[Layer, object]:
    """A layer and its identity; without a format it is the active image, whose own looks are all there is to go by."""
    path, form = named.path, named.format or None
    begin = named.slice.offset or 0 if named.slice is not None else 0
    try:
        with seen:
            status = seen.status
            wanted = form in (None, "qcow2") and not seen.is_special
            header = qcow2.read_from(folder.opened(seen), begin) if wanted else None
            likely = magic.of(folder.opened(seen)) if wanted and header is None else None
    except OSError as error:
        raise ImageUnreadable(file=path, reason=error.strerror or str(error)) from None
    if form == "qcow2" and header is None:
        reason = "it is said to be qcow2 (by the header above it, or by `--format`), and is none"
        raise ImageUnreadable(file=path, reason=reason)
    is_called_raw = path.endswith((".raw", ".iso"))
    if form is None and header is not None and (stat.S_ISBLK(status.st_mode) or is_called_raw):
        raise Disguised(image=path)
    form = form or ("qcow2" if header is not None else "raw" if is_called_raw else likely or "raw")
    layer = Layer(
        file=path,
        format=form,
        backing=header.backing if header else None,
        backing_format=header.backing_format if header else None,
        data_file=header.data_file if header else None,
        table_part=header.table_part if header else qcow2.SMALLEST_PART,
        encrypted=form == "luks" or (header is not None and header.encrypted),
        is_device=stat.S_ISBLK(status.st_mode),
        slice=named.slice,
        inodes=frozenset({folder.inode_in(status)}),
    )
    return layer, (*folder.inode_in(status), named.slice)


def _below(layer: Layer, rule: "_Rule") -> tuple[Described, File] | None:
    """What the header names, once that has passed the rule: by a path, or as a file or a part of one."""
    if layer.backing is None:
        return None
    told = backing.described(layer.backing) if layer.backing.startswith("json:") else None
    if told is not None and not told.path.startswith("/"):
        told = None  # from QEMU's own folder, whichever that was
    file = rule.followed(layer, told.path if told is not None else layer.backing)
    if layer.backing_format is None:
        raise NoFormat(image=layer.file, backing=layer.backing)
    if told is not None and told.format != layer.backing_format:
        reason = f"it says {told.format}, the header {layer.backing_format}"
        raise ForeignName(image=layer.file, backing=layer.backing, reason=reason)
    named = Described(files.plain(file.path), layer.backing_format, told.slice if told is not None else None)
    return named, file


def _as_stashed(path: str) -> str:
    """The path that the image has now, where it has lost this one to a merge, and there is but one."""
    aside = list(stashed.names_of(path)) if not os.path.lexists(path) else []
    return aside[0] if len(aside) == 1 else path


class _Rule:
    """
    The rule for names in headers: they may lead to the folders of the active image, and to what the user has named. With
    `by_stashed_names` a name that was taken away leads to where its file is now.
    """

    def __init__(self, image: str, allow: Collection[str], *, by_stashed_names: bool = False) -> None:
        self._named = {os.path.realpath(place) for place in allow}
        own = (os.path.dirname(image), os.path.dirname(os.path.realpath(image)))
        self._allowed = self._named | {os.path.realpath(place) for place in own}
        self._by_stashed_names = by_stashed_names

    def followed(self, layer: Layer, name: str) -> File:
        """What a name in the header of `layer` leads to, not opened yet. Raises ForeignName, ImageUnreadable."""
        # A relative name after `file:` starts in QEMU's own folder, whichever that was.
        plain = name.removeprefix("file:") if name.startswith("file:/") else name
        if ":" in plain.split("/", 1)[0]:
            raise ForeignName(image=layer.file, backing=name, reason="it is not a path")
        path = os.path.join(os.path.dirname(layer.file), plain)
        file = _looked_at(_as_stashed(path) if self._by_stashed_names else path, f", named by {layer.file}")
        reason = self._against(file)
        if reason is not None:
            raise ForeignName(image=layer.file, backing=name, reason=reason)
        return file

    def _against(self, file: File) -> str | None:
        """By the file itself and where the kernel says that it is: the name may lead elsewhere by now."""
        if file.is_special:
            return "it does not lead to a regular file"
        if stat.S_ISBLK(file.status.st_mode):
            return None if self._is_named_device(file) else "it leads to a device, which you have not named"
        return None if _is_in(file.real, self._allowed) else "it leads out of the image's folder"

    def _is_named_device(self, device: File) -> bool:
        """
        By its own name or that of a folder; also by that of a link, where only root makes links, as volume managers do
        (``/dev/VG/LV``).
        """
        path = files.plain(device.path)
        return _is_in(device.real, self._named) or (path.startswith("/dev/") and _is_in(path, self._named))


def _is_in(path: str, places: Collection[str]) -> bool:
    return any(os.path.commonpath((path, place)) == place for place in places)
