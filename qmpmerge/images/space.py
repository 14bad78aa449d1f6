"""
What a merge or a pull will copy, by how much the image will grow that it goes into, and whether there is room for it.

Exact for images at rest: what is shown of the images that leave, less what the image that it goes into has room for already, or
of a pull holds itself. Where a guest writes meanwhile it is a lower bound, and where an image cannot be looked into (network,
encryption) nothing is claimed.
"""

import asyncio
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import replace

from qmpmerge.chain.chain import Image
from qmpmerge.chain.outcome import ASSUMED_RATE, Estimate
from qmpmerge.chain.plan import CommitPlan, Plan
from qmpmerge.errors import ImageUnreadable
from qmpmerge.images import qcow2, qemuimg
from qmpmerge.images.qemuimg import Extent

SECONDS = 10.0
"""For how long images are looked into: an answer that takes longer is no help."""

ZEROS_STAY = (11, 1, 0)
"""
From this QEMU on an intermediate commit notes zeros as such again, as an active one always does; up to 10.0 it copies them
as data, twice what `qemu-img commit` needs where half is zeros. What lies between was not tried, and is taken to copy them.
"""

_AT_ONCE = 4
_BLOCK = 4096
"""What filesystems allocate in, for themselves too: one more for every some 340 ranges of a file on ext4."""
_RANGES_IN_BLOCK = 340

_REFCOUNT_BYTES = 2

RESERVE = 256 * 1024 * 1024
"""What a pull leaves of the filesystem on which the guest's own image grows: there the guest itself runs out of space."""

Range = tuple[int, int]
"""First byte, and the byte behind the last."""

Maps = dict[Image, list[Extent]]
"""What images hold, each looked into once."""


async def estimate(
    plan: Plan,
    *,
    live: bool = False,
    pid: int | None = None,
    speed: int = 0,
    closely: bool = True,
    version: tuple[int, int, int] = (0, 0, 0),
    maps: Maps | None = None,
) -> Estimate:
    """
    Look into the images of the plan, as they are on disk; unless `closely` only where room may be short. What was looked into
    is in `maps` then, and what is there already is not looked into again.

    `live` says that a guest writes to the active image, `pid` as whom: root may use what filesystems reserve for it;
    `version` is that of the QEMU that copies (see `ZEROS_STAY`).
    Raises ToolMissing.
    """
    receiver, size, maps = plan.receiver, _size(plan), {} if maps is None else maps
    known = Estimate(
        free=_free(receiver, pid),
        rate=speed or ASSUMED_RATE,
        rate_given=bool(speed),
        file=receiver.file,
        reserve=min(RESERVE, size) if live and receiver is plan.chain.active else 0,
    )
    most = replace(known, growth=_most(size))
    if not closely and known.free is not None and most.is_enough:  # looking takes some 10 ms an image
        return most
    try:
        async with asyncio.timeout(SECONDS):
            await _look_into([receiver, *plan.merged], maps)
        growth = _growth_of(plan, maps, version)
    except TimeoutError:
        return replace(known, reason=f"looking into the images takes more than {SECONDS:g} s")
    except (ImageUnreadable, OSError) as error:
        return replace(known, reason=str(error))
    copy, limited = _copied(plan, maps), _limited(plan, maps)
    return replace(known, copy=copy, growth=growth, at_least=live and plan.pivots, limited=limited)


def _copied(plan: Plan, maps: Maps) -> int | None:
    """Bytes that are copied, of images that were looked into; None where one of them was not."""
    if not maps.keys() >= {plan.receiver, *plan.merged}:
        return None
    merged = [maps[image] for image in plan.merged]
    if isinstance(plan, CommitPlan):
        return _length(_union(extent for layer in merged for extent in layer))
    return _length(_union(_shown(plan, maps[plan.receiver], merged)[0]))


def _limited(plan: Plan, maps: Maps) -> int | None:
    """What a stream reads in all, zeros too (block/stream.c)."""
    if isinstance(plan, CommitPlan):
        return None
    data, zeros = _shown(plan, maps[plan.receiver], [maps[image] for image in plan.merged])
    return _length(_union([*data, *zeros]))


async def _look_into(images: Sequence[Image], maps: Maps) -> None:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def look(image: Image) -> None:
        async with gate:
            maps[image] = await _extents(image)

    found = await asyncio.gather(*(look(image) for image in images if image not in maps), return_exceptions=True)
    for problem in found:
        if isinstance(problem, BaseException):
            raise problem


def _growth_of(plan: Plan, maps: Maps, version: tuple[int, int, int]) -> int | None:
    held, merged = maps[plan.receiver], [maps[image] for image in plan.merged]
    if isinstance(plan, CommitPlan):
        data, zeros = _shown(plan, [], merged)
        return _growth(plan, held, [*data, *zeros], zeros_stay=plan.pivots or version >= ZEROS_STAY)
    return _growth_of_pull(plan, held, merged)


async def _extents(image: Image) -> list[Extent]:
    if not image.has_path or image.inode is None:
        raise ImageUnreadable(file=image.file, reason="it is not a file on this host")
    if image.format not in ("raw", "qcow2", "qed") or stat.S_ISFIFO(os.stat(image.file).st_mode):
        raise ImageUnreadable(file=image.file, reason=f"{image.format} is not looked into")
    header = qcow2.read_of(image) if image.format == "qcow2" else None
    if header is not None and (header.data_file is not None or header.encrypted):
        raise ImageUnreadable(file=image.file, reason="it is encrypted, or its data is in another file")
    return await qemuimg.extents(image)


def _free(base: Image, pid: int | None) -> int | None:
    if not base.has_path:
        return None
    try:
        if stat.S_ISBLK(os.stat(base.file).st_mode):
            return None
        room = os.statvfs(os.path.realpath(base.file))
        is_root = pid is not None and os.stat(f"/proc/{pid}").st_uid == 0
    except OSError:
        return None
    return room.f_frsize * (room.f_bfree if is_root else room.f_bavail)


def _size(plan: Plan) -> int:
    """Of the disk as the images show it that leave."""
    return plan.views[0][-1].virtual_size


def _most(size: int) -> int:
    """What no image outgrows: the whole disk, and a sixteenth more for tables, largest with clusters of 512 bytes."""
    return size * 17 // 16 + 1024 * 1024


# --- pull -----------------------------------------------------------------------------------------------------------


def _growth_of_pull(plan: Plan, held: Sequence[Extent], merged: Sequence[Sequence[Extent]]) -> int:
    """Exact but for data that is all zeros, which QEMU sees as it copies."""
    header = qcow2.read(plan.receiver.file) if plan.receiver.format == "qcow2" else None
    if header is None or stat.S_ISBLK(os.stat(plan.receiver.file).st_mode):
        raise ImageUnreadable(file=plan.receiver.file, reason="how it grows is known of qcow2 files alone")
    data, zeros = _shown(plan, held, merged)
    held_data = _union(one for one in held if not one.zero)
    return _qcow2_growth(header, held_data, [*data, *zeros], zeros_stay=True)


def _shown(plan: Plan, held: Sequence[Extent], merged: Sequence[Sequence[Extent]]) -> tuple[list[Extent], list[Extent]]:
    """What is shown of the images that leave through one above that holds so much: data, and zeros."""
    hidden, data, size = _union(held), list[Extent](), _size(plan)
    zeros = [Extent(0, size, zero=True)] if plan.base is None and plan.top.format == "raw" else []
    for layer in reversed(merged):
        for zero, shown in ((False, data), (True, zeros)):
            ranges = _without(_union(one for one in layer if one.zero is zero), hidden)
            shown += [Extent(start, min(end, size) - start, zero) for start, end in ranges if start < size]
        hidden = _joined([*hidden, *_union(layer)])
    return data, zeros


# --- commit: by how much base grows -----------------------------------------------------------------------------------


def _growth(plan: CommitPlan, base: Sequence[Extent], merged: Sequence[Extent], *, zeros_stay: bool) -> int | None:
    if plan.base.slice is not None:
        raise ImageUnreadable(file=plan.base.file, reason="it is a part of its file, which may end where others begin")
    status = os.stat(plan.base.file)
    if stat.S_ISBLK(status.st_mode):
        return 0 if plan.base.format == "raw" else None
    # What base notes as zeros, or has a place but perhaps no blocks for, takes space once data comes.
    held = _union(extent for extent in base if not extent.zero)
    header = qcow2.read(plan.base.file) if plan.base.format == "qcow2" else None
    if header is not None:
        return _qcow2_growth(header, held, merged, zeros_stay=zeros_stay)
    copied = [extent for extent in merged if plan.pivots or not (extent.zero and zeros_stay)]
    new = _without(_aligned(_union(copied), _BLOCK), held)
    growth = _length(new) + (1 + len(new) // _RANGES_IN_BLOCK) * _BLOCK if new else 0
    # Preallocated files read as holes, but have their blocks.
    return max(0, min(growth, plan.top.virtual_size + _BLOCK - status.st_blocks * 512))


def _qcow2_growth(header: qcow2.Qcow2Header, held: list[Range], merged: Sequence[Extent], *, zeros_stay: bool) -> int:
    """Clusters of data, and of the tables that lead to them. Images of version 2 have no way to note zeros."""
    cluster = header.cluster_size
    data = _union(extent for extent in merged if not (extent.zero and zeros_stay and header.version >= 3))
    new = _length(_without(_aligned(data, cluster), held))
    span = cluster // header.entry_size * cluster  # what one second-level table covers
    tables = _length(_without(_aligned(_union(merged), span), _aligned(held, span))) // span * cluster
    refcounts = (new + tables) // (cluster // _REFCOUNT_BYTES) + cluster if new + tables else 0
    return new + tables + -(-refcounts // cluster) * cluster


def _union(extents: Iterable[Extent]) -> list[Range]:
    return _joined((extent.start, extent.start + extent.length) for extent in extents)


def _joined(ranges: Iterable[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def _aligned(ranges: Iterable[Range], step: int) -> list[Range]:
    """The ranges made wide enough to begin and end at multiples of `step`."""
    return _joined((start // step * step, -(-end // step) * step) for start, end in ranges)


def _without(ranges: Iterable[Range], taken: Sequence[Range]) -> list[Range]:
    """What is left of `ranges` without `taken`; both in order and apart."""
    left: list[Range] = []
    place = 0
    for begin, end in ranges:
        start = begin
        while place < len(taken) and taken[place][1] <= start:
            place += 1
        number = place
        while number < len(taken) and taken[number][0] < end:
            if taken[number][0] > start:
                left.append((start, taken[number][0]))
            start = max(start, taken[number][1])
            number += 1
        if start < end:
            left.append((start, end))
    return left


def _length(ranges: Iterable[Range]) -> int:
    return sum(end - start for start, end in ranges)
