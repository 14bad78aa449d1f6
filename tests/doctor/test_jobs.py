"""Nodes that a merge which was killed has left open in QEMU look like a disk, and are none."""

from pathlib import Path

import pytest
from rig.disks import blockdev
from rig.machines import Content, fill, make_chain

import qmpmerge


@pytest.mark.parametrize("top", ["[3]", None])
async def test_a_command_without_a_disk_means_the_one_that_is_used(top: str | None, tmp_path: Path) -> None:
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    with blockdev(tmp_path, images, content) as setup:
        session = setup.machine.session
        plain = {"top_node": "b" if top else "c", "base_node": "base", **({"backing_file": "base.raw"} if top else {})}
        session.execute("block-commit", job_id="plain", device="c", **plain)
        while jobs := session.execute("query-jobs"):
            if jobs[0]["status"] == "ready":
                session.execute("job-complete", id="plain")
        async with qmpmerge.live(setup.machine.target) as target:
            assert [disk.name for disk in await target.disks()] == ["disk0", "b" if top else "c"]
            view = await target.chain()
            assert view.disk.name == "disk0"
            assert str(view.chain) == ("base.raw <-- c.qcow2" if top else "base.raw")
        setup.check()
