"""
Which part of its file an image is: nodes of the driver ``raw`` with `offset` and `size`.

That a node shows a part is told by its size, which is not that of the node it stands on. Where the part begins, only the
``json:`` name tells that QEMU gives such a node (7.2, 10.0 and 11.1, however it was opened): its own options stand first
there. Names end after 4095 characters; what cannot be read is not guessed.
"""

import itertools
import json
from collections.abc import Iterable

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Slice
from qmpmerge.qemu.blockgraph import FILTERS, Node


def of(storage: Iterable[Node]) -> Slice | None:
    """The part of the file in which an image is, from its nodes, top down to the file's; None for the whole file."""
    found: Slice | None = None
    for node, below in itertools.pairwise(storage):
        if node.driver == "raw" and 0 < _size(node) != _size(below) > 0:
            found = _inside(_options(node), found)
        elif found is not None and node.driver not in (*FILTERS, "raw"):
            found = Slice(None, found.size)  # a part of what an image shows is at no place in its file
    return found


def _size(node: Node) -> int:
    return int(node.info.get("image", {}).get("virtual-size", 0))


def _options(node: Node) -> Slice:
    try:
        return backing.slice_of(json.loads(str(node.info["file"]).removeprefix("json:")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Slice(None, _size(node))


def _inside(outer: Slice, inner: Slice | None) -> Slice:
    """A part of a part: the node of `inner` stands on that of `outer`."""
    if inner is None:
        return outer
    if outer.offset is None or inner.offset is None:
        return Slice(None, inner.size)
    rest = outer.size - inner.offset if outer.size is not None else None
    return Slice(outer.offset + inner.offset, inner.size if inner.size is not None else rest)
