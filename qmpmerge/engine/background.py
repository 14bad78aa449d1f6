"""Work that a process does not wait for when it ends: storage may never answer."""

import asyncio
import contextlib
import threading
from collections.abc import Callable


def begun(work: Callable[[], None]) -> "asyncio.Future[None]":
    """
    Do `work` in a thread; what it raises is the future's, and nobody's where nobody asks.

    asyncio's own threads are waited for as the loop ends, and once more as the process does.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def ended(error: BaseException | None) -> None:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(None)

    def do() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: whoever began it has left
            loop.call_soon_threadsafe(ended, error)

    threading.Thread(target=do, name="qmpmerge-background", daemon=True).start()
    return future
