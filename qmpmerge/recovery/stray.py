"""
Whether a file that is only called like a stashed one was merged: where no note proves it, its contents do.

Compared is what it shows, through the images below it, with what the first image below shows that has its own name still.
Images that lie between the two were merged with it. They are opened by the rule for names, and not while anybody uses them.
"""

import os
import shlex
from collections.abc import Collection

from qmpmerge.chain.chain import Image, Inode
from qmpmerge.errors import Refused
from qmpmerge.images import files, walk
from qmpmerge.images.stashed import original_of
from qmpmerge.images.walk import Layer
from qmpmerge.recovery import evidence


async def why_not_merged(file: str, others: Collection[str], doubt: str) -> str | None:
    """
    Why it is not proved that a merge has put `file` aside, with a way out; None where it is: by what itself shows, or one of
    the `others`, called like it, that is built on it. `doubt` is why its note does not prove it.
    """
    for top in others:
        if _is_below(file, top) and await _why_not(top) is None:
            return None
    reason = await _why_not(file)
    better = f"`rm -- {shlex.quote(file)}` if you know better"
    return None if reason is None else f"{doubt}, and {reason}: {better}"


def _is_below(file: str, top: str) -> bool:
    """Whether `file` lies between `top` and the image that it would have been merged into."""
    try:
        images, base = _chain(top)
    except Refused:
        return False
    return file in [image.file for image in images[base:-1]]


async def _why_not(top: str) -> str | None:
    try:
        images, base = _chain(top)
    except Refused as error:
        return f"it cannot be compared: {error}"
    if base == 0:
        return "there is no image below it that it could have been merged into"
    below = images[base - 1].file
    equal = await evidence.compared(images, images[:base])
    if isinstance(equal, str):
        return f"it cannot be compared with {below}: {equal}"
    return None if equal else f"{below} does not show what it shows"


def _inode(layer: Layer) -> Inode | None:
    """The file that was walked; with its data there are two."""
    return next(iter(layer.inodes)) if len(layer.inodes) == 1 else files.inode(layer.file)


def _chain(top: str) -> tuple[list[Image], int]:
    """The images from the lowest to `top`, and the index of the highest that has its own name; 0 for none. Raises Refused."""
    layers = walk.walk(top, by_stashed_names=True)
    images = [Image(layer.file, layer.format, 0, inode=_inode(layer), slice=layer.slice) for layer in layers]
    named = [index for index, image in enumerate(images, 1) if original_of(os.path.basename(image.file)) is None]
    return images, max(named, default=0)
