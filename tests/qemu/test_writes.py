"""What guests write while QEMU streams is told, what it copies is not; and nothing is left of it, however the job ends."""

from pathlib import Path
from typing import Any

import pytest
from rig.disks import BACKEND, KINDS, Setup, device, nodes
from rig.machines import MIB, SIZE, Content, machine

import qmpmerge
from qmpmerge.errors import QemuRefused
from qmpmerge.qemu import bitmaps, writes
from qmpmerge.qemu.monitor import Monitor

GRAIN = 64 * 1024
FILTER = "job-filter"


def left(setup: Setup) -> list[str]:
    """All dirty bitmaps, and nodes of ours."""
    nodes = setup.machine.session.execute("query-named-block-nodes", flat=True)
    names = [node["node-name"] for node in nodes if "qmpmerge" in node["node-name"]]
    return names + [bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", ())]


async def told(monitor: Monitor, node: str) -> list[tuple[int, int]]:
    return [(part.start, part.length) for part in await writes.read(monitor, node, SIZE)]


@pytest.mark.parametrize("ends", ["job-finalize", "job-cancel"])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_guests_write_is_told(
    kind: str, ends: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    with KINDS[kind](tmp_path, images, content) as setup:
        async with setup.target() as target:
            active, layout = (await target.chain()).chain.active, await target.layout()
            node = active.node or ""
            await writes.begin(target.monitor, layout, node)
            assert bitmaps.of(await target.layout(), [active]) == [], "it is nobody's"
            await writes.begin(target.monitor, await target.layout(), node)  # one that was left goes
            stream: dict[str, Any] = {"job_id": "j", "device": node, "filter_node_name": FILTER, "auto_finalize": False}
            await target.monitor.execute("block-stream", **stream)
            setup.machine.wait_for_job("pending")
            assert await told(target.monitor, node) == [], "what is copied is not written"
            setup.write(0x61, 4096, 4096)
            if kind == "storage-daemon":
                with pytest.raises(QemuRefused, match="add-fd"):
                    await writes.read(target.monitor, node, SIZE)
            else:
                setup.write(0x62, 5 * MIB, 2 * GRAIN)
                setup.write(0x63, SIZE - 512, 512)
                assert await told(target.monitor, node) == [(0, GRAIN), (5 * MIB, 2 * GRAIN), (SIZE - GRAIN, GRAIN)]
            setup.machine.session.execute(ends, id="j")
            while setup.machine.session.execute("query-jobs"):
                pass
            await writes.end(target.monitor, await target.layout(), node)
            assert left(setup) == []
            with pytest.raises(QemuRefused, match="is gone"):
                await writes.read(target.monitor, node, SIZE)


async def test_a_write_that_is_under_way_is_told(tmp_path: Path, images: list[Path]) -> None:
    """QEMU marks it when it has ended: what another process reads of it before would be taken for damage."""
    arguments = nodes(images)
    place = next(index for index, part in enumerate(arguments) if ",node-name=c," in part)
    arguments[place] = arguments[place].replace("file=c-file", "file=slow")
    slow = [
        "-object",
        "throttle-group,id=group",
        "-blockdev",
        "throttle,node-name=slow,throttle-group=group,file=c-file",
    ]
    arguments[place - 1 : place - 1] = slow
    with machine(tmp_path, *arguments, *device("c")) as vm:
        async with qmpmerge.live(vm.target) as target:
            await writes.begin(target.monitor, await target.layout(), "c")
            stream: dict[str, Any] = {"job_id": "j", "device": "c", "filter_node_name": FILTER, "auto_finalize": False}
            await target.monitor.execute("block-stream", **stream)
            vm.wait_for_job("pending")
            limits = {"bps-write": 1000, "bps-write-max": 1000}
            vm.session.execute("qom-set", path="/objects/group", property="limits", value=limits)
            vm.io(BACKEND, "aio_write 5M 64k")
            vm.io(BACKEND, "aio_write 6M 64k")  # waits for a minute
            (bitmap,) = next(
                node["dirty-bitmaps"]
                for node in vm.session.execute("query-named-block-nodes", flat=True)
                if node["node-name"] == "c"
            )
            assert bitmap["count"] < 2 * GRAIN
            assert await told(target.monitor, "c") == [(5 * MIB, GRAIN), (6 * MIB, GRAIN)]


async def test_a_bitmap_of_the_users_is_left_alone(setup: Setup) -> None:
    async with setup.target() as target:
        view = await target.chain()
        node = view.chain.active.node or ""
        theirs = {"node": node, "name": bitmaps.OURS, "persistent": True}
        setup.machine.session.execute("block-dirty-bitmap-add", **theirs)
        with pytest.raises(QemuRefused, match="already"):
            await writes.begin(target.monitor, await target.layout(), node)
        outcome = await qmpmerge.pull(target, verify=True)
        assert (outcome.verdict, outcome.verified) == ("pulled", False)
        assert any(hint.startswith("not checked: ") and "already" in hint for hint in outcome.hints)
    assert left(setup) == [bitmaps.OURS]
