"""
The logger `qmpmerge`, which is told each step of a merge: a state that is entered, the job, flushes, the pause, renames.

It has no handler of its own: who uses the library says where its lines go. asyncio has loaded `logging` for whoever comes here.
"""

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger("qmpmerge")
log.addHandler(logging.NullHandler())


@contextlib.contextmanager
def held() -> Iterator[None]:
    """
    What is logged in the block is handed on at its end, with the time at which it was logged: a handler can be slow, and the
    guest stands still meanwhile.
    """
    records: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
        for record in records:
            log.handle(record)
