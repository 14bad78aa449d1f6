"""Parts of files, from what QEMU tells of their nodes; on a real one see tests/operations/test_slices.py."""

import json

import pytest

from qmpmerge.chain.chain import Slice
from qmpmerge.qemu import slices
from qmpmerge.qemu.blockgraph import Node


def node(driver: str, shows: int, **options: object) -> Node:
    name = "json:" + json.dumps({**options, "driver": driver, "file": {"driver": "file", "filename": "/box"}})
    return Node(driver, info={"drv": driver, "file": name, "image": {"virtual-size": shows}})


FILE = node("file", 1000)
PART = node("raw", 300, offset=100, size=300)
CUT = Node("raw", info={**PART.info, "file": str(PART.info["file"])[:40]})


@pytest.mark.parametrize(
    ("storage", "found"),
    [
        ([FILE], None),
        ([node("raw", 1000), FILE], None),
        ([node("raw", 1000, size=1000), FILE], None),
        ([node("raw", 1000, offset="junk"), FILE], None),  # by its size it shows all
        ([node("qcow2", 5000), FILE], None),
        ([PART, FILE], Slice(100, 300)),
        ([node("raw", 900, offset=100), FILE], Slice(100)),
        ([node("raw", 300, size=300), FILE], Slice(0, 300)),
        ([node("raw", 488, offset="0.5k"), FILE], Slice(None, 488)),
        ([node("raw", 488, offset="512"), FILE], Slice(512)),
        ([node("qcow2", 5000), PART, FILE], Slice(100, 300)),
        ([node("raw", 200, offset=50, size=200), PART, FILE], Slice(150, 200)),
        ([node("raw", 250, offset=50), PART, FILE], Slice(150, 250)),
        ([node("raw", 200, offset=50, size=200), node("throttle", 300), PART, FILE], Slice(150, 200)),
        ([node("raw", 200, offset=50, size=200), CUT, FILE], Slice(None, 200)),
        ([CUT, FILE], Slice(None, 300)),
        ([PART, node("luks", 1000), FILE], Slice(None, 300)),
        ([node("throttle", 300), PART, FILE], Slice(100, 300)),
    ],
)
def test_which_part(storage: list[Node], found: Slice | None) -> None:
    assert slices.of(storage) == found
