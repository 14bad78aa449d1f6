"""Which raw files were cut off."""

import os
from dataclasses import replace
from pathlib import Path

from qmpmerge.chain.chain import Image, Slice
from qmpmerge.images import files, lengths


def test_what_is_shorter_than_qemu_believes(tmp_path: Path) -> None:
    path = str(tmp_path / "base.raw")
    Path(path).write_bytes(bytes(1000))
    base = Image(path, "raw", 1024, inode=files.inode(path))  # QEMU rounds up
    part = replace(base, virtual_size=512, slice=Slice(512, 512))
    active = Image("/no/such.qcow2", "qcow2", 4096, data=base)
    network = Image("nbd://host", "raw", 4096)
    well = (base, part, active, network, replace(base, virtual_size=4096, inode=(0, 0)))
    assert lengths.cut(well) is None
    os.truncate(path, 511)
    assert [lengths.cut([image]) is not None for image in well] == [True, True, True, False, False]
    assert lengths.cut(well) == lengths.Cut(path, 511, 1024)
    os.unlink(path)
    assert lengths.cut(well) is None
