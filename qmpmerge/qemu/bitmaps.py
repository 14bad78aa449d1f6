"""
Dirty bitmaps of images that a merge takes out of the chain: which there are, and how they come along.

Neither commit nor stream of QEMU moves them (5.2 to 11.1): they stay in the old files, and the next incremental backup
would miss what they tell.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from qmpmerge.chain.chain import Image
from qmpmerge.chain.plan import CommitPlan, Plan
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.value import Value

OURS = "qmpmerge-writes"
"""The name of one that a pull makes for itself (`writes`), in QEMU's memory alone."""


class Bitmap(Value):
    """A dirty bitmap as QEMU has it. `granularity` in bytes; `recording` says that writes are marked in it."""

    image: Image
    name: str
    granularity: int
    recording: bool
    persistent: bool
    inconsistent: bool
    busy: bool

    def __str__(self) -> str:
        return f"dirty bitmap {self.name} of {self.image.file}"


def of(layout: Layout, images: Sequence[Image]) -> list[Bitmap]:
    """The named bitmaps of these images, base first; those without a name are some job's own, and `OURS` is a pull's."""
    return [
        Bitmap(
            image=image,
            name=entry["name"],
            granularity=entry["granularity"],
            recording=entry["recording"],
            persistent=entry["persistent"],
            inconsistent=entry.get("inconsistent", False),
            busy=entry["busy"],
        )
        for image in images
        for entry in layout.nodes[image.node or ""].info.get("dirty-bitmaps", ())
        if entry.get("name") and not is_ours(entry)
    ]


def is_ours(entry: Mapping[str, Any]) -> bool:
    """Whether it is that of a pull, by what QEMU tells of it: nobody else's that happens to be called so is kept."""
    return bool(entry.get("name") == OURS and not entry["persistent"])


def obstacle(layout: Layout, plan: CommitPlan, bitmap: Bitmap) -> str | None:
    """Why a bitmap cannot be carried over to the plan's base, as a clause about it; None where it can."""
    base = plan.base
    other = next((one for one in of(layout, [base]) if one.name == bitmap.name), None)
    if bitmap.inconsistent:
        return "it is inconsistent, its VM was killed"
    if bitmap.busy or (other is not None and (other.busy or other.inconsistent)):
        return "it, or the base's own of that name, is in use or inconsistent"
    if other is not None and bitmap.persistent and not other.persistent:
        return "it is persistent, the base's own of that name is not"
    if bitmap.persistent and base.format != "qcow2":
        return f"it is persistent, and {base.file} is {base.format}, which has no room for bitmaps"
    if bitmap.persistent and _is_version_2(layout, base):
        return f"it is persistent, and {base.file} is qcow2 of compat=0.10, which has no room for bitmaps"
    if bitmap.image.virtual_size != max(base.virtual_size, plan.top.virtual_size):
        return "it is for another size than the merged image will have"
    return None


def _is_version_2(layout: Layout, image: Image) -> bool:
    own = layout.nodes[image.node or ""].info.get("image", {}).get("format-specific", {}).get("data", {})
    return bool(own.get("compat") == "0.10")


def portable(layout: Layout, plan: Plan) -> tuple[Bitmap, ...]:
    """
    The bitmaps of the merged images that can be carried over. Those of one name only together: a part of them would tell
    the next incremental backup that less has changed than has. Of a pull none, whose images keep them.
    """
    if not isinstance(plan, CommitPlan):
        return ()
    found = of(layout, plan.merged)
    lost = {bitmap.name for bitmap in found if obstacle(layout, plan, bitmap) is not None}
    return tuple(bitmap for bitmap in found if bitmap.name not in lost)


def left_behind(layout: Layout, plan: Plan) -> list[str]:
    """What becomes of the bitmaps of images that a pull takes out of the chain, as sentences; a commit carries them over."""
    found = [] if isinstance(plan, CommitPlan) else of(layout, plan.merged)
    ends = {True: "stays in that file", False: "is in QEMU's memory alone, and is gone once that image is closed"}
    miss = "the next incremental backup by it would miss what it tells"
    return [f"{bitmap} {ends[bitmap.persistent]}: {miss}" for bitmap in found]


async def carry(monitor: Monitor, layout: Layout, base: Image, bitmaps: Sequence[Bitmap]) -> None:
    """
    Merge the bitmaps into those of their names on `base`, which are made where there are none; all or nothing.

    To be called while a commit job has base open for writing, after the copy and before the switch. What is recording
    goes on recording in the same step, so that no write of the guest falls between: base gets each of them until the
    switch as well, and alone from then on. Raises QemuRefused.
    """
    present = {bitmap.name: bitmap for bitmap in of(layout, [base])}
    actions: list[dict[str, Any]] = []
    for name, group in groupby(sorted(bitmaps, key=lambda bitmap: bitmap.name), key=lambda bitmap: bitmap.name):
        sources = list(group)
        if name not in present:
            actions.append(_addition(base, name, sources))
        merges = [{"node": source.image.node, "name": name} for source in sources]
        data: dict[str, Any] = {"node": base.node, "target": name, "bitmaps": merges}
        actions.append({"type": "block-dirty-bitmap-merge", "data": data})
        if name in present and not present[name].recording and any(source.recording for source in sources):
            actions.append({"type": "block-dirty-bitmap-enable", "data": {"node": base.node, "name": name}})
    await monitor.execute("transaction", actions=actions)


def _addition(base: Image, name: str, sources: Sequence[Bitmap]) -> dict[str, Any]:
    data = {
        "node": base.node,
        "name": name,
        "granularity": min(source.granularity for source in sources),
        "persistent": any(source.persistent for source in sources),
        "disabled": not any(source.recording for source in sources),
    }
    return {"type": "block-dirty-bitmap-add", "data": data}


def snapshots(layout: Layout, images: Sequence[Image]) -> list[str]:
    """The internal snapshots of these images, as clauses."""
    return [
        f"internal snapshot {entry['name'] or entry['id']} of {image.file}"
        for image in images
        for entry in layout.nodes[image.node or ""].info.get("image", {}).get("snapshots", ())
    ]
