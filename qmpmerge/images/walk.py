"""
A chain on disk, walked from its active image down without opening anything that has not passed the rule for names.

An image downloaded from somebody else may name a device, a URL or any file of ours as its backing file; a merge would
write into it. So each name is looked at before it is followed: it must be a plain path to a regular file in a folder that
the user has named, which the active image's own folder is; or a ``json:`` name that says no more than which part of it.
"""

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, replace

from qmpmerge import folder
from qmpmerge.chain import backing
from qmpmerge.chain.backing import Described
from qmpmerge.chain.chain import Slice
from qmpmerge.errors import BackingLoop, Disguised, ForeignName, ImageUnreadable, NoFormat, TooDeep, UnsupportedFormat
from qmpmerge.folder import File, Inode
from qmpmerge.images import files, qcow2, stashed

DEEPEST = 800
"""Images in a chain. QEMU 10 crashes on the first read through 870 of them."""


@dataclass(frozen=True)
class Layer:
    """One image on disk: absolute path, format, and what its header says of others."""

    file: str
    format: str
    backing: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    """Its path, once it has passed the rule for names."""
    encrypted: bool = False
    is_device: bool = False
    slice: Slice | None = None
    """The part of `file` that it is, None for the whole."""
    inodes: frozenset[Inode] = frozenset()
    """Which files it and its data are: those that were looked at, whatever has their names later."""


def walk(image: str, *, allow: Collection[str] = (), by_stashed_names: bool = False) -> tuple[Layer, ...]:
    """
    The chain whose active image is `image`, base first, as the headers tell it.

    `allow` are folders and files that backing names may lead to besides the folder of `image`. The format of `image`
    is qcow2 if it looks so, else raw; all others are what the header above records, and never probed: the first bytes
    of a raw image belong to the guest. With `by_stashed_names` an image that lost its name to a merge is found by its new
    one, where it has but one.

    Raises Disguised, ForeignName, NoFormat, BackingLoop, TooDeep, UnsupportedFormat, ImageUnreadable.
    """
    path = os.path.abspath(image)
    homes = (os.path.dirname(path), os.path.dirname(os.path.realpath(path)))
    rule = _Rule({os.path.realpath(place) for place in (*homes, *allow)}, by_stashed_names=by_stashed_names)
    layers: list[Layer] = []
    seen: set[object] = set()
    below: tuple[Described, File] | None = Described(path, ""), _looked_at(path)
    while below is not None:
        named, file = below
        layer, identity = _open(named, file)
        if identity in seen:
            raise BackingLoop(image=layers[-1].file, backing=named.path)
        if len(layers) >= DEEPEST:
            raise TooDeep(image=path, limit=DEEPEST)
        seen.add(identity)
        if layer.data_file is not None:
            with rule.followed(layer, layer.data_file) as data:
                layer = replace(layer, data_file=files.plain(data.path), inodes=layer.inodes | {data.inode})
        layers.append(layer)
        below = _below(layer, rule)
    return tuple(reversed(layers))


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
    except OSError as error:
        raise ImageUnreadable(file=path, reason=error.strerror or str(error)) from None
    if form == "qcow2" and header is None:
        raise ImageUnreadable(file=path, reason="the header above says qcow2, the file is none")
    if form is None and header is not None and (stat.S_ISBLK(status.st_mode) or path.endswith((".raw", ".iso"))):
        raise Disguised(image=path)
    form = form or ("qcow2" if header is not None else "raw")
    if form not in ("raw", "qcow2", "luks"):
        raise UnsupportedFormat(image=path, format=form)
    layer = Layer(
        file=path,
        format=form,
        backing=header.backing if header else None,
        backing_format=header.backing_format if header else None,
        data_file=header.data_file if header else None,
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
    The rule for names in headers: `allowed` are the real paths of folders, and of files, that they may lead to. With
    `by_stashed_names` a name that was taken away leads to where its file is now.
    """

    def __init__(self, allowed: Collection[str], *, by_stashed_names: bool = False) -> None:
        self._allowed = allowed
        self._by_stashed_names = by_stashed_names

    def followed(self, layer: Layer, name: str) -> File:
        """What a name in the header of `layer` leads to, not opened yet. Raises ForeignName, ImageUnreadable."""
        if ":" in name.split("/", 1)[0]:
            raise ForeignName(image=layer.file, backing=name, reason="it is not a path")
        path = os.path.join(os.path.dirname(layer.file), name)
        file = _looked_at(_as_stashed(path) if self._by_stashed_names else path, f", named by {layer.file}")
        reason = self._against(file)
        if reason is not None:
            raise ForeignName(image=layer.file, backing=name, reason=reason)
        return file

    def _against(self, file: File) -> str | None:
        """By the file itself and where the kernel says that it is: the name may lead elsewhere by now."""
        real, mode = file.real, file.status.st_mode
        named = real in self._allowed
        if not (stat.S_ISREG(mode) or (named and stat.S_ISBLK(mode))):
            return "it does not lead to a regular file"
        if not named and not any(os.path.commonpath((real, place)) == place for place in self._allowed):
            return "it leads out of the image's folder"
        return None
