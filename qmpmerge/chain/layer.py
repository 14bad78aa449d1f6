"""
Which image of a chain is meant by a word.

A word is an index (``3``; ``-1`` is the active image; ``[3]`` and ``vda[3]`` as libvirt writes it), a node name, a path, the
file name that `chain` shows, or the URI in the header of the image above. It is held against all of these at once: what means
two images is refused, for to guess would be to merge the wrong one.
"""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpmerge.errors import AmbiguousLayer, NoSuchLayer
from qmpmerge.errors.nearest import nearest

if TYPE_CHECKING:
    from qmpmerge.chain.chain import Chain, Image

LayerName = str | int | os.PathLike[str]
"""What `find` takes: a word, an index, or a path, which is nothing but a path."""

MOST_TOLD = 10
"""Layers in a message: chains have hundreds."""

_NUMBER = r"-?[1-9][0-9]{0,8}"
_INDEX = rf"(?s)(?P<plain>{_NUMBER})|(?P<disk>.*)\[(?P<number>{_NUMBER})\]"


def find(chain: "Chain", layer: LayerName, disk: str) -> "Image":
    """The image that `layer` means in the chain of the disk. Raises NoSuchLayer, AmbiguousLayer."""
    found = _meant(chain, layer, disk)
    elsewhere = _another_file(chain, layer) if found else None
    if len(found) == 1 and elsewhere is None:
        return chain[found[0]]
    word, called = os.fspath(layer) if not isinstance(layer, int) else str(layer), disk or chain.active.file
    if not found:
        raise _no_such(chain, word, disk, called)
    told = [*_numbered(chain, found[:MOST_TOLD]), *([f"{elsewhere} (not in the chain)"] if elsewhere else [])]
    words = [_plain_word(chain, index, disk) for index in found[:MOST_TOLD]]
    raise AmbiguousLayer(layer=word, disk=called, count=len(found) + bool(elsewhere), known=told, words=words)


def _meant(chain: "Chain", layer: LayerName, disk: str) -> list[int]:
    """The indexes of the images that it can mean."""
    if isinstance(layer, bool):
        raise TypeError("a layer is a word, an index or a path")
    if isinstance(layer, int):
        number = _counted(chain, layer)
        return [] if number is None else [number]
    if not isinstance(layer, str):
        return [index for index, image in enumerate(chain, 1) if image.is_file(os.fspath(layer))]
    number = _counted(chain, _index_in(layer, disk) or 0)
    above = [*(image.backing for image in chain.images[1:]), None]
    return [
        index
        for index, (image, written) in enumerate(zip(chain, above, strict=True), 1)
        # QEMU spells URIs in a way of its own, and people as they stand in the header above
        if index == number or _is_called(image, layer) or (written == layer and not image.has_path)
    ]


def _is_called(image: "Image", word: str) -> bool:
    return image.node == word or (image.has_path and image.name == word) or image.is_file(word)


def _index_in(word: str, disk: str) -> int | None:
    match = re.fullmatch(_INDEX, word)
    if match is None or match["disk"] not in (None, "", disk):
        return None
    return int(match["plain"] or match["number"])


def _counted(chain: "Chain", number: int) -> int | None:
    """The index; from the active image down where it is negative."""
    index = number if number > 0 else len(chain) + 1 + number
    return index if number and 1 <= index <= len(chain) else None


def _another_file(chain: "Chain", layer: LayerName) -> str | None:
    """The file here that is called like an image of the chain, and is none."""
    if not isinstance(layer, str) or not any(image.has_path and image.name == layer for image in chain):
        return None
    if not os.path.lexists(layer) or any(image.is_file(layer) for image in chain):
        return None
    return os.path.abspath(layer)


def _plain_word(chain: "Chain", index: int, disk: str) -> str:
    """A word that means this image alone."""
    image = chain[index]
    words = [str(index), f"[{index}]", image.file, *([image.node] if image.node else [])]
    plain = (word for word in words if _meant(chain, word, disk) == [index] and _another_file(chain, word) is None)
    return next(plain, words[0])


# --- what is told where it means none -----------------------------------------------------------------------------


def _no_such(chain: "Chain", word: str, disk: str, called: str) -> NoSuchLayer:
    number = _index_in(word, disk)
    near = _nearest(chain, word, disk) if number is None else None
    place = near[1] if near is not None else 1 if number is not None and number < 0 else len(chain)
    first = max(1, min(place - MOST_TOLD // 2, len(chain) - MOST_TOLD + 1))
    told = _numbered(chain, range(first, min(len(chain), first + MOST_TOLD - 1) + 1))
    return NoSuchLayer(layer=word, disk=called, count=len(chain), known=told, nearest=near and near[0])


def _nearest(chain: "Chain", word: str, disk: str) -> tuple[str, int] | None:
    """What is spelt most like it, and its index: a path by a path, and what is no path by a name, a node or ``vda[2]``."""
    names = [image.name for image in chain]
    others = [[image.node or "" for image in chain], [f"{disk}[{index}]" for index in range(1, len(chain) + 1)]]
    for known in [names] if "/" in word else [names, *others]:
        found = nearest(os.path.basename(word), [name for name in known if known.count(name) == 1])
        if found is not None:
            index = known.index(found) + 1
            return chain[index].file if "/" in word else found, index
    return None


def _numbered(chain: "Chain", indexes: Sequence[int]) -> list[str]:
    return [f"{index} {chain[index].label}" for index in indexes]
