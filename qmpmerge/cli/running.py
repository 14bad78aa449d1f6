"""
The process edge: one coroutine, its errors, its signals, its exit code.

The first Ctrl-C (or SIGTERM) cancels and waits until the old chain is back; a second one leaves at once, and the job, which is
QEMU's, goes on.
"""

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from qmpmerge.cli.options import Options
from qmpmerge.errors import EXIT_CODES, Cancelled, Error

if TYPE_CHECKING:
    from qmpmerge.cli.output import Output
    from qmpmerge.hosts import Host


def run(options: Options, work: "Callable[[Output], Awaitable[str]]") -> int:
    """Run `work`, which returns its verdict, and return the exit code; every Error is rendered."""
    import asyncio  # 60 ms that `--version` and `--help` need not wait for

    output = options.output()
    try:
        try:
            verdict = asyncio.run(_interruptible(work, output))
        except Error as error:
            output.failure(error)
            return error.exit_code
        finally:
            output.close()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; what we did is done. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CODES["done"]
    return EXIT_CODES[verdict]


async def _interruptible(work: "Callable[[Output], Awaitable[str]]", output: "Output") -> str:
    import asyncio

    task = asyncio.ensure_future(work(output))
    asked = 0

    def interrupt() -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            output.note("left at once: a job that was started goes on, see `qmpmerge jobs`")
            sys.stderr.flush()
            os._exit(EXIT_CODES["running"])
        output.note("cancelling: waiting until the old chain is back (once more to leave at once)")
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        raise Cancelled from None


def on_host(
    target: str, options: Options, work: "Callable[[Host, Output], Awaitable[str]]"
) -> "Callable[[Output], Awaitable[str]]":
    """The same work with a session to `target` around it."""

    async def with_session(output: "Output") -> str:
        from qmpmerge.hosts import live
        from qmpmerge.monitor import GREETING_SECONDS

        patience = GREETING_SECONDS if options.timeout is None else min(GREETING_SECONDS, options.timeout)
        trace = output.trace if options.verbose else None
        async with live(target, timeout=patience, force=options.force, trace=trace) as host:
            return await work(host, output)

    return with_session
