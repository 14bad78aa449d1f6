"""
The doctor's look at an image or at a folder, and what `active` says about the images of the folder: a launch script asks that.
"""

import os
from collections.abc import Collection, Iterator, Sequence

from qmpmerge.doctor import images
from qmpmerge.doctor.findings import Finding, sort
from qmpmerge.errors import Error
from qmpmerge.images import formats, overlays
from qmpmerge.operations import active


async def examine_path(
    path: "str | os.PathLike[str]",
    *,
    allow: Collection[str] = (),
    search: Collection[str] = (),
    form: str | None = None,
) -> tuple[Finding, ...]:
    """
    All findings about the chain whose active image is at `path`, or about all chains that lie in the folder `path`.

    `allow`, `form` and `search` are those of `walk.walk` and of `doctor.examine`. Raises ImageUnreadable where there is
    nothing at `path`, ToolMissing.
    """
    path = os.path.abspath(os.fspath(path))
    found = await images.examine_path(path, allow=allow, search=search, form=form)
    return sort([*found, *_refused(path, found)]) if os.path.isdir(path) else found


def _refused(folder: str, found: Sequence[Finding]) -> Iterator[Finding]:
    """Images on which nothing is built here, and from which no launch script gets a VM started, where nothing else says why."""
    told = {word for one in found if one.severity != "note" for word in (one.where, *_paths(one.what))}
    for image in _leaves(folder):
        try:
            active.active(image)
        except Error as error:
            if told.isdisjoint((image, *_paths(str(error)))):
                why = f"`qmpmerge active` refuses, and so does a launch script that asks it: {error.hint}"
                yield Finding(error.name, "care", image, str(error), why)


def _paths(text: str) -> list[str]:
    return [word.strip("(),:;") for word in text.split() if "/" in word]


def _leaves(folder: str) -> list[str]:
    try:
        there = [formats.read(image) for image in overlays.in_folder(folder)]
    except OSError:  # told already
        return []
    below = {inode for image in there for inode in image.below}
    return [image.file for image in there if image.inode not in below and not image.is_aside]
