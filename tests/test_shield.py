"""Work that must not be left half done."""

import asyncio
import gc
from typing import Any

import pytest

from qmpmerge import shield


async def test_of_several_errors_the_first_is_raised_and_nobody_complains_of_the_others() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, told: complaints.append(told))

    async def failing(number: int) -> None:
        await asyncio.sleep(0)
        raise LookupError(number)

    async def ending() -> None:
        ended.append(True)

    ended: list[bool] = []
    with pytest.raises(LookupError, match="1"):
        await shield.together([ending(), failing(1), failing(2), ending()])
    gc.collect()
    assert (ended, complaints) == ([True, True], [])
