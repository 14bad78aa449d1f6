"""The time limit of what comes before a job; `go` heeds it from there on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from qmpmerge.engine.pace.patience import Patience
from qmpmerge.errors import StillRunning, TimeUp


@contextlib.asynccontextmanager
async def in_time(patience: Patience) -> AsyncIterator[None]:
    """What comes before the job's start, within the time limit. Raises TimeUp; not for StillRunning, which is of a job."""
    limit = asyncio.timeout(patience.left)
    try:
        async with limit:
            yield
    except StillRunning:
        raise
    except TimeoutError:
        if not limit.expired():  # somebody else's
            raise
        raise TimeUp(seconds=patience.timeout or 0.0) from None
