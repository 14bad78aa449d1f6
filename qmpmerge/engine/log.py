"""
The logger `qmpmerge`, which is told each step of a merge: a state that is entered, the job, flushes, the pause, renames. Who
watches is told the same.

It has no handler of its own: who uses the library says where its lines go, and no handler or filter of theirs ends a merge.
asyncio has loaded `logging` for whoever comes here.
"""

import contextlib
import logging
import traceback
from collections.abc import Iterable, Iterator
from typing import Literal

from qmpmerge import watch
from qmpmerge.chain.chain import Image
from qmpmerge.images.headers import as_read

log = logging.getLogger("qmpmerge")
log.addHandler(logging.NullHandler())


def step(name: str, text: str, *, about: str = "", target: str = "", **facts: object) -> None:
    """
    Tell of a step: its `name`, what it is `about` (a job, a disk) and in which `target`, for several have jobs of the same
    name, and a text with the facts in it, in braces. A record of the logger has name, target and facts as its `step`,
    `target` and `facts`.
    """
    told = text.format_map(facts)
    watcher = watch.current()
    if watcher is not None:
        watcher.step(name, told, {"about": about, "target": target, **facts})
    with harmless():
        extra = {"step": name, "target": target, "facts": facts}
        log.info("%s: %s" if about else "%s%s", about, told, extra=extra, stacklevel=2)


def warn(text: str) -> None:
    """What has gone wrong, and harms nothing."""
    with harmless():
        log.warning("%s", text, stacklevel=2)


def headers(when: Literal["before", "after"], images: Iterable[Image]) -> None:
    """Tell who watches, if anybody does, what the headers of these images say."""
    watcher = watch.current()
    if watcher is not None:
        for image in images:
            watcher.header(when, image.file, as_read(image))


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """What a function of the caller raises is shown as `logging.Handler.handleError` shows it, and goes no further."""
    try:
        yield
    except Exception:
        if logging.raiseExceptions:
            traceback.print_exc()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """
    What is logged in the block is handed on at its end, with the time at which it was logged: a handler can be slow, and the
    guest stands still meanwhile.
    """
    watcher = watch.current()
    if watcher is not None:
        watcher.hurry(True)
    records: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    log.addFilter(keep)
    try:
        yield
    finally:
        if watcher is not None:
            watcher.hurry(False)
        log.removeFilter(keep)
        for record in records:
            with harmless():
                log.handle(record)
