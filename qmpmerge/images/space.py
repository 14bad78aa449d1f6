"""
What a merge or a pull will copy, by how much the image will grow that it goes into, and whether there is room for it.

Of images at rest it is what is written at most (see `growth`). Where a guest writes meanwhile it is a lower bound, and where an
image cannot be looked into (network, encryption) nothing is claimed.
"""

import asyncio
import os
import stat
from collections.abc import Sequence
from dataclasses import replace

from qmpmerge.chain.chain import Image
from qmpmerge.chain.outcome import ASSUMED_RATE, Estimate
from qmpmerge.chain.plan import CommitPlan, Plan
from qmpmerge.errors import ImageUnreadable
from qmpmerge.images import growth, qcow2, qemuimg
from qmpmerge.images.qemuimg import Extent

SECONDS = 10.0
"""For how long images are looked into: an answer that takes longer is no help."""

_AT_ONCE = 4

RESERVE = 256 * 1024 * 1024
"""What a pull leaves of the filesystem on which the guest's own image grows: there the guest itself runs out of space."""

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
    `version` is that of the QEMU that copies (see `growth.ZEROS_STAY`).
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
        grows, written = _growth_of(plan, maps, version)
    except TimeoutError:
        return replace(known, reason=f"looking into the images takes more than {SECONDS:g} s")
    except (ImageUnreadable, OSError) as error:
        return replace(known, reason=str(error))
    copy, limited = growth.copied(plan, maps, version), growth.scanned(plan, maps)
    return replace(known, copy=copy, growth=grows, at_least=live and plan.pivots, limited=limited, written=written)


async def _look_into(images: Sequence[Image], maps: Maps) -> None:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def look(image: Image) -> None:
        async with gate:
            maps[image] = await _extents(image)

    found = await asyncio.gather(*(look(image) for image in images if image not in maps), return_exceptions=True)
    for problem in found:
        if isinstance(problem, BaseException):
            raise problem


def _growth_of(plan: Plan, maps: Maps, version: tuple[int, int, int]) -> tuple[int | None, int]:
    """In all, and the clusters of data among that."""
    receiver, status = plan.receiver, os.stat(plan.receiver.file)
    if receiver.slice is not None:
        raise ImageUnreadable(file=receiver.file, reason="it is a part of its file, which may end where others begin")
    header = qcow2.read(receiver.file) if receiver.format == "qcow2" else None
    if stat.S_ISBLK(status.st_mode):
        return (0 if receiver.format == "raw" else None), 0
    if header is not None:
        return growth.of_qcow2(plan, header, maps, version=version, length=status.st_size)
    if not isinstance(plan, CommitPlan):
        raise ImageUnreadable(file=receiver.file, reason="how it grows is known of qcow2 files alone")
    return growth.of_raw(plan, maps, version, status.st_blocks * 512), 0


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
