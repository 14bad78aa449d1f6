"""
Write-back: what a job has written is on its way to the storage while it still copies, and not all at once when it is flushed,
which the guest's own flushes wait for too.

A flush of the guest's waits for all that is on its way to the same storage, about as long as that takes to arrive: that is the
device's queue and not the journal, for it is nearly the same where the base has all its blocks already (ext4, 2 GB/s: up to
5 ms behind 4 MiB, 12 behind 16, 38 behind 64). So little and often slows many of its flushes, and seldom and much a few.

Nothing is waited for here, and no error is seen: the kernel tells that of a write-back to every descriptor that was open
(errseq_t), so to QEMU's, and to the first that is opened later, and the flush whose error is seen stays the judge. The flags
SYNC_FILE_RANGE_WAIT_ would bound what is on its way, but they see the error, which who opens the file later is not told then.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from qmpmerge.chain.chain import Image
from qmpmerge.folder import File
from qmpmerge.images import files

INTERVAL_SECONDS = 0.1
"""
512 MiB into a raw base while the guest writes: medians of 11 to 14 runs, two processors with next to nothing else to do (none:
no write-back; the bare conversation has 261 and 3.6, active 250 and 32; most of what ours has more is before the job begins):

    interval                                   none   0.005   0.02   0.1
    intermediate: worst write and flush, ms    264    124     154    113
                  95 of 100 are within         8.0    11.8    12.2   9.9
    active:       worst write and flush        249    192     166    241
                  95 of 100 are within         18.7   15.9    16.8   16.1

At 0.2, on a busy machine, nothing of the gain was left.
"""
NAME = "write-back"
"""Of the thread."""

_WRITE = 2  # SYNC_FILE_RANGE_WRITE, linux/fs.h


@contextlib.contextmanager
def early(image: Image, pid: int | None) -> Iterator[None]:
    """
    Within the block what is written to the image's file by anybody is written back soon, if that is a regular file that we can
    read, here or as QEMU, process `pid`, sees it. Elsewhere nothing is done.
    """
    write_back = _sync_file_range()
    file = files.of_image(image, pid) if write_back is not None else None
    if file is None or not file.is_regular:
        yield
        return
    over = threading.Event()
    # A daemon: a storage that hangs is not to hold a process that wants to end.
    threading.Thread(target=_go_on, args=(file, write_back, over), name=NAME, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _go_on(file: File, write_back: Callable[..., int], over: threading.Event) -> None:
    with file:
        while not over.wait(INTERVAL_SECONDS):
            if write_back(file.descriptor, 0, 0, _WRITE) != 0:
                return


def _sync_file_range() -> Callable[..., int] | None:
    """sync_file_range(2), of all of a file. None where there is none."""
    import ctypes

    function: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function  # type: ignore[no-any-return]
