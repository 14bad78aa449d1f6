"""The names under which merged files are put aside."""

import os

from qmpmerge.chain.chain import Chain
from qmpmerge.images import files
from qmpmerge.images.stashed import names, original_of


def names_away(chain: Chain, base: int, top: int) -> dict[int, str]:
    """
    By index, the names under which the merged images can be stashed: regular files only, that are there under their own
    names. Where an image is called by a symlink it is the file that loses its name, or it would still open under that. A file
    of which an image is but a part is not the merge's to rename.
    """
    merged = range(base + 1, top + 1)
    shared = {image.inode for image in chain if image.slice is not None}
    able = {index: chain[index] for index in merged if chain[index].inode not in {None, *shared}}
    there = {index: image.file for index, image in able.items() if image.is_file(image.file)}
    return {index: stash_of(files.real(file)) for index, file in there.items() if files.is_regular(file)}


def stash_of(file: str) -> str:
    """The name under which a merged file is stashed: ``NAME.merged``, or ``NAME.merged.2`` where that is taken."""
    return next(name for name in names(file) if not os.path.lexists(name))


def can_be_stashed(path: str) -> bool:
    """Whether it is a path that `stash_of` gives."""
    return path.startswith("/") and original_of(path) is not None
