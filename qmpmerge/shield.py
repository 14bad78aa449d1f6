"""Work that must not be left half done."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finished(work: Coroutine[Any, Any, T], *, unless: Callable[[], bool] = lambda: False) -> T:
    """
    Finish `work` and return its result, whatever is asked of the calling task meanwhile.

    A cancellation that comes in between is taken back: what was begun is proved first, and the caller learns the outcome.
    Where `unless` then says so, the work is given up and CancelledError raised after all.
    """
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if unless():
                task.cancel()
                raise
            current = asyncio.current_task()
            assert current is not None, "a coroutine runs in a task"
            current.uncancel()
    return task.result()
