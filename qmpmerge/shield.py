"""Work that must not be left half done."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
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


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """
    Finish all of them at the same time, and return their results.

    A cancellation is passed on to each, as often as it comes, and raised when the last has ended; so is what the first of them
    raises that does; of the others' errors nobody complains.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    is_cancelled = False
    while left := {task for task in tasks if not task.done()}:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError:
            is_cancelled = True
            for task in left:
                task.cancel()
    for task in tasks:
        _ = task.cancelled() or task.exception()
    results = [task.result() for task in tasks]
    if is_cancelled:
        raise asyncio.CancelledError
    return results
