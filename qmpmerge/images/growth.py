"""
What a job reads of the images that leave, and by how much the image grows that it writes to, as made of what they hold.

QEMU asks what is allocated in chunks, and writes a chunk of zeros as zeros only where its ends are those of clusters of the
image that is written. All else is data: a zero that is written into a cluster that shows data takes the whole cluster. So where
clusters have one size the figure is exact, and where they differ it is what is written at most.

A raw image holds all of itself, its holes too; and behind the end of an image in the middle, where one above is longer, zeros
are allocated as if they were noted there (bdrv_co_common_block_status_above in block/io.c).
"""

import bisect
import operator
from collections.abc import Iterable, Mapping, Sequence

from qmpmerge.chain.chain import Image
from qmpmerge.chain.plan import CommitPlan, Plan
from qmpmerge.images import qcow2, ranges
from qmpmerge.images.qcow2 import Qcow2Header
from qmpmerge.images.qemuimg import Extent
from qmpmerge.images.ranges import Range, down, up
from qmpmerge.value import Value

ZEROS_STAY = (11, 1, 0)
"""
From this QEMU on an intermediate commit notes zeros as such again, as an active one always does; up to 10.0 it copies them
as data, twice what `qemu-img commit` needs where half is zeros. What lies between was not tried, and is taken to copy them.
"""

CHUNK = 512 * 1024
"""What block-stream and an intermediate commit read at a time (block/stream.c, block/commit.c)."""

_BUFFER = 10 * 1024 * 1024
"""What an active commit reads at a time, at the most (block/mirror.c)."""

_GRANULES = 4096, 65536
"""An active commit copies in blocks of base's clusters, between these two; a raw base has the larger."""

_BLOCK = 4096
"""What filesystems allocate in, for themselves too: one more for every some 340 ranges of a file on ext4."""
_RANGES_IN_BLOCK = 340

_REFCOUNT_BYTES = 2

Maps = Mapping[Image, Sequence[Extent]]
"""What images hold."""


class Written(Value):
    """What a job writes: `data` what takes clusters, `touched` what is led to by tables, be it data or noted as zeros."""

    data: list[Range]
    touched: list[Range]


def copied(plan: Plan, maps: Maps, version: tuple[int, int, int]) -> int:
    """Bytes that are copied: of a commit what the images that leave hold between them, of a pull the data shown of them."""
    if isinstance(plan, CommitPlan):
        held = [extent for image in plan.merged for extent in maps[image]]
        return ranges.length(_union([*held, *room(plan, version)]))
    return ranges.length(_union(one for one in _shown(plan, maps) if not one.zero))


def room(plan: Plan, version: tuple[int, int, int]) -> list[Extent]:
    """The zeros behind the end of the shortest image that leaves, where they are copied as data."""
    if plan.direction == "pull" or plan.pivots or version >= ZEROS_STAY:
        return []
    start, end = min(image.virtual_size for image in plan.merged), plan.top.virtual_size
    return [Extent(start, end - start, zero=True)] if start < end else []


def scanned(plan: Plan, maps: Maps) -> int | None:
    """What a stream reads in all, zeros too (block/stream.c); None of a commit."""
    return None if isinstance(plan, CommitPlan) else ranges.length(_union(_shown(plan, maps)))


def of_qcow2(
    plan: Plan, header: Qcow2Header, maps: Maps, *, version: tuple[int, int, int], length: int
) -> tuple[int, int]:
    """
    Clusters of data and of the tables that lead to them, in bytes, of an image whose file has `length`; and of data alone.
    Images of version 2 have no way to note zeros. Raises OSError.
    """
    written = _committed(plan, header, maps, version) if isinstance(plan, CommitPlan) else _pulled(plan, header, maps)
    cluster, span = header.cluster_size, header.span
    # What is noted as zeros takes a cluster once data comes, and so does what is compressed, or an internal snapshot's too.
    own = [] if header.snapshots else [one for one in maps[plan.receiver] if not one.zero]
    held = _union(one for one in own if not one.compressed or not isinstance(plan, CommitPlan))
    new = ranges.length(ranges.without(ranges.aligned(written.data, cluster), held))
    tables = ranges.without(ranges.aligned(written.touched, span), ranges.aligned(_union(own), span))
    count = new + ranges.length(tables) // span * cluster + _longer_table(plan, header)
    return up(count + _refcounts(count, header, length), _BLOCK), new


def of_raw(plan: CommitPlan, maps: Maps, version: tuple[int, int, int], blocks: int) -> int:
    """The blocks of a filesystem, of which a raw base has so many bytes."""
    zeros_stay = not plan.pivots and version >= ZEROS_STAY
    copied = [extent for layer in _layers(plan, maps) for extent in layer if not (extent.zero and zeros_stay)]
    step = _GRANULES[1] if plan.pivots else _BLOCK
    new = ranges.without(ranges.aligned(_union(copied), step), _union(maps[plan.base]))
    growth = ranges.length(new) + (1 + len(new) // _RANGES_IN_BLOCK) * _BLOCK if new else 0
    # Preallocated files read as holes, but have their blocks.
    return max(0, min(growth, up(plan.top.virtual_size, _GRANULES[1]) + _BLOCK - blocks))


# --- what is read -----------------------------------------------------------------------------------------------------


def _layers(plan: Plan, maps: Maps) -> list[list[Extent]]:
    """What a job finds in the images that leave, in order, data and zeros."""
    end, layers = plan.merged[-1].virtual_size, list[list[Extent]]()
    for image in plan.merged:
        layer = list(maps[image])
        if image.format == "raw":
            holes = ranges.without([(0, image.virtual_size)], _union(layer))
            layer += [Extent(start, stop - start, zero=True) for start, stop in holes]
        if image.virtual_size < end:
            layer.append(Extent(image.virtual_size, end - image.virtual_size, zero=True))
        layers.append(layer)
    return layers


def _shown(plan: Plan, maps: Maps) -> list[Extent]:
    """What is shown of them, as far as the disk goes: in the order of the images, each range as its image has it."""
    through = [] if isinstance(plan, CommitPlan) else maps[plan.receiver]
    hidden, shown, size = _union(through), list[Extent](), _size(plan)
    for layer in reversed(_layers(plan, maps)):
        for zero in (False, True):
            left = ranges.without(((one.start, one.end) for one in layer if one.zero is zero), hidden)
            shown += [Extent(start, min(end, size) - start, zero) for start, end in left if start < size]
        hidden = ranges.joined([*hidden, *_union(layer)])
    return shown


# --- what is written --------------------------------------------------------------------------------------------------


def _committed(plan: CommitPlan, header: Qcow2Header, maps: Maps, version: tuple[int, int, int]) -> Written:
    shown, stay, granule = _shown(plan, maps), list[Range](), 1
    zeros = [(one.start, one.end) for one in shown if one.zero]
    if plan.pivots:
        granule = max(_GRANULES[0], min(header.cluster_size, _GRANULES[1]))
        stay = _kept_by_mirror(zeros, header.cluster_size, granule, _run(plan))
    elif version >= ZEROS_STAY:
        stay = _kept_by_commit(zeros, plan, header.cluster_size, maps)
    copied, room = ranges.aligned(_union(shown), granule), _room_of_base(plan, header.cluster_size)
    data = ranges.without(copied, stay if header.version >= 3 else ())
    return Written(ranges.joined([*data, *room[:1]]), ranges.joined([*copied, *room]))


def _kept_by_mirror(zeros: Sequence[Range], cluster: int, granule: int, run: int) -> list[Range]:
    """Of larger clusters than it copies by, what it reads at a time stays zeros where it is whole clusters, or not at all."""
    if run < cluster or run < granule:
        return []
    if cluster <= granule:
        return _inner(zeros, granule)
    ends = ((start, end if end % cluster == 0 else down(end, cluster) - _BUFFER) for start, end in zeros)
    return ranges.joined((start, end) for start, end in ends if start % cluster == 0 and start < end)


def _kept_by_commit(zeros: Sequence[Range], plan: CommitPlan, cluster: int, maps: Maps) -> list[Range]:
    """Chunks from the first byte on; where one ends within a cluster this stays zeros only if base shows zeros there."""
    size, base = plan.top.virtual_size, plan.base
    blank = ranges.joined([(one.start, one.end) for one in maps[base] if one.zero] + [(base.virtual_size, size)])
    if plan.base_index == 1:
        blank = ranges.without([(0, size)], _union(one for one in maps[base] if not one.zero))
    kept = ranges.common(ranges.joined(zeros), blank)
    if min(CHUNK, _run(plan)) >= cluster:
        kept += [(start, end) for start, end in zeros if start % cluster == 0]
    return ranges.joined(_inner(kept, cluster, size))


def _room_of_base(plan: CommitPlan, cluster: int) -> list[Range]:
    """What base notes as zeros as it is enlarged: what it is built on would show there. The first is written as data."""
    size = plan.base.virtual_size
    return [(size, up(size, cluster)), (size, plan.top.virtual_size)] if plan.shines_through else []


def _pulled(plan: Plan, header: Qcow2Header, maps: Maps) -> Written:
    """A chunk is written with the rest of its clusters, and as zeros where all of that reads as zeros."""
    shown, cluster, size = _shown(plan, maps), header.cluster_size, plan.receiver.virtual_size
    zeros, touched = _union(one for one in shown if one.zero), _union(shown)
    data = ranges.joined([*_union(one for one in shown if not one.zero), *_chunks_of_raw(plan, maps)])
    if plan.base is None:  # what nobody holds is zeros
        held = _union(one for one in maps[plan.receiver] if not one.zero)
        zeros = ranges.without([(0, size)], ranges.joined([*data, *held]))
    wide, stay = up(CHUNK, cluster), list[Range]()
    for start, end in zeros if header.version >= 3 else ():
        first = start if start % cluster == 0 else up(start, cluster) + wide
        last = end if end % cluster == 0 or end == size else down(end, cluster) - wide
        stay += [(first, last)] if first < last else []
    return Written(ranges.without(ranges.joined([*data, *touched]), stay), touched)


def _chunks_of_raw(plan: Plan, maps: Maps) -> list[Range]:
    """Those with data, of a raw image, which is read whatever its file has: by chunks from 0, or from another range's end."""
    raw = plan.merged[0]
    if raw.format != "raw":
        return []
    above = _union([*maps[plan.receiver], *(one for layer in _layers(plan, maps)[1:] for one in layer)])
    read, found = ranges.without([(0, raw.virtual_size)], above), list[Range]()
    for start, end in ranges.common(read, _union(maps[raw])):
        begin, stop = read[bisect.bisect_right(read, start, key=operator.itemgetter(0)) - 1]
        for phase in {0, begin % CHUNK}:
            chunk = down(start - phase, CHUNK) + phase, up(end - phase, CHUNK) + phase
            found.append((max(chunk[0], begin), min(chunk[1], stop)))
    return ranges.joined(found)


def _run(plan: Plan) -> int:
    """So many bytes the tables of each image that leaves tell at a time; of subclusters a cluster, of other formats enough."""
    headers = [qcow2.read_of(image) for image in plan.merged if image.format == "qcow2"]
    return min(
        (one.cluster_size if one.entry_size > 8 else one.span for one in headers if one is not None), default=_BUFFER
    )


def _inner(found: Iterable[Range], step: int, size: int | None = None) -> list[Range]:
    """Their whole blocks; the last of a disk of that size is whole."""
    inner = ((up(start, step), end if end == size else down(end, step)) for start, end in found)
    return [(start, end) for start, end in inner if start < end]


# --- tables -----------------------------------------------------------------------------------------------------------


def _longer_table(plan: Plan, header: Qcow2Header) -> int:
    """A first-level table for a base that is enlarged."""
    before, after = (up(size, header.span) // header.span for size in (plan.receiver.virtual_size, _size(plan)))
    return up(after * 8, header.cluster_size) if after > before else 0


def _refcounts(new: int, header: Qcow2Header, length: int) -> int:
    """Reference counts for so many bytes more, and the tables that lead to them, which may be made several times."""
    cluster = header.cluster_size
    counts = up(new // (cluster // _REFCOUNT_BYTES) + cluster, cluster) if new else 0
    blocks = (length + new + counts) // (cluster // _REFCOUNT_BYTES * cluster) + 1
    return counts + (3 * up(blocks * 8, cluster) if new and blocks * 8 > cluster else 0)


def _size(plan: Plan) -> int:
    """Of the disk as the images show it that leave."""
    return plan.views[0][-1].virtual_size


def _union(extents: Iterable[Extent]) -> list[Range]:
    return ranges.joined((extent.start, extent.end) for extent in extents)
