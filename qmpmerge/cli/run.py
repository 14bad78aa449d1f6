"""
The process edge: one coroutine, its errors, its signals, its exit code.

The first Ctrl-C (or SIGTERM) cancels and waits until the old chain is back; a second one, and a terminal that is closed
(SIGHUP), leave at once: the job, which is QEMU's, goes on. From the switch to the proof all of them wait.
"""

import contextlib
import functools
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qmpmerge.cli import interrupts, no_tls, streams
from qmpmerge.cli.options import Options
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.errors import (
    EXIT_CODES,
    Cancelled,
    DiskNeeded,
    Error,
    NeedsSecret,
    NoSuchTarget,
    Offline,
    SecretUnreadable,
)

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.targets.target import Target


T = TypeVar("T")


def run(options: Options, work: "Callable[[Output], Awaitable[str]]") -> int:
    """Run `work`, which returns its verdict, and return the exit code; every Error is rendered."""
    return _shown(options, lambda output: awaited(options, work, output))


def awaited(options: Options, work: "Callable[[Output], Awaitable[T]]", output: "Output") -> T:
    """What `work` comes to; it is what signals cancel."""
    from qmpmerge.processes import limits

    limits.raise_own()
    limits.refuse_few()
    no_tls.import_asyncio()  # `--version` and `--help` need not wait for it
    import asyncio

    return asyncio.run(_interruptible(work, output, options.patience))


def look(options: Options, work: "Callable[[Output], str]") -> int:
    """The same for what only reads a little, and need not wait for asyncio either; Ctrl-C ends it at once."""

    def interruptible(output: "Output") -> str:
        interrupts.raise_now()
        return work(output)

    return _shown(options, interruptible)


def _shown(options: Options, work: "Callable[[Output], str]") -> int:
    """Of any work: what comes of it is rendered."""
    output = options.output()
    if options.record is not None or options.trace:
        from qmpmerge.cli import recorded

        work = recorded.work(work, options)
    try:
        code = EXIT_CODES[work(output)]
    except (Error, KeyboardInterrupt) as error:  # the latter until the signals are ours: nothing was begun
        code = show(error if isinstance(error, Error) else Cancelled(), options, output)
    except Exception as error:
        from qmpmerge.cli import bug

        code = bug.show(error, as_json=options.json)
    finally:
        output.close()
    return code


def show(error: Error, options: Options, output: "Output") -> int:
    """Say it, on stdout where stderr does not take what people find there; returns the exit code."""
    if isinstance(error, NoSuchTarget | DiskNeeded):
        from qmpmerge.cli import words

        error = words.explained(error)
    output.failure(error)
    if not options.json and streams.is_failing(sys.stderr):
        options.output(err=sys.stdout).failure(error)
    return error.exit_code


ONE_SIGNAL_SECONDS = 0.25
"""Within so short a time it is one: timeout(1) sends its signal to the process, and once more to all of its group."""


async def _interruptible(work: "Callable[[Output], Awaitable[T]]", output: "Output", patience: Patience) -> T:
    import asyncio

    task = asyncio.ensure_future(work(output))
    asked: float | None = None

    def interrupt() -> None:
        nonlocal asked
        if asked is None:
            asked = loop.time()
            output.note("cancelling: waiting until the old chain is back (once more to leave at once)")
        elif loop.time() - asked < ONE_SIGNAL_SECONDS:
            return
        else:
            output.note("leaving at once; only what must be proved first is waited for")
            patience.leave()
        task.cancel()

    def hang_up() -> None:
        patience.leave()
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup wants us to stay
        loop.add_signal_handler(signal.SIGHUP, hang_up)
    if interrupts.is_noted():
        task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        raise Cancelled from None


def on_target(
    target: str,
    options: Options,
    work: "Callable[[Target, Output], Awaitable[T]]",
    *,
    write: bool = False,
    dry_run: bool = False,
    live: bool = False,
) -> "Callable[[Output], Awaitable[T]]":
    """
    The same work with `target` open around it; `write` asks for images to be locked, a `dry_run` leaves
    them as they are, `live` refuses them.

    The passphrase of encrypted images is asked for on the terminal where the user did not give it.
    """

    async def with_target(output: "Output") -> T:
        from qmpmerge.targets.open import is_image

        if live and is_image(target):
            raise Offline(path=target)
        secret = None if options.secret is None else _read_secret(options.secret)
        given = {"write": write, "dry_run": dry_run, "allow": options.allow, "form": options.form}
        try:
            async with door(options, output, secret=secret, **given)(target) as opened_target:
                return await work(opened_target, output)
        except NeedsSecret as error:
            if secret is not None or not sys.stdin.isatty():
                raise
            secret = _ask_secret(error.image)
        async with door(options, output, secret=secret, **given)(target) as opened_target:
            return await work(opened_target, output)

    return with_target


def door(
    options: Options, output: "Output", **given: Any
) -> "Callable[[str], contextlib.AbstractAsyncContextManager[Target]]":
    """What opens a TARGET as the options say, and tells what there is to know of it; `given` is for it."""

    @contextlib.asynccontextmanager
    async def opened(target: str) -> "AsyncIterator[Target]":
        from qmpmerge.qemu.monitor import GREETING_SECONDS
        from qmpmerge.targets import open as door

        limit = options.patience.timeout
        patience = GREETING_SECONDS if limit is None else min(GREETING_SECONDS, limit)
        async with door.open(target, timeout=patience, force=options.force, **given) as opened_target:
            opened_target.tell_waits(output.note)
            for note in opened_target.notes:
                output.note(note)
            yield opened_target

    return opened


@functools.cache  # a plan is looked at first, then carried out
def _ask_secret(image: str) -> str:
    return str(click.prompt(f"passphrase of {image}", hide_input=True, err=True))


LONGEST_SECRET = 65536
"""Characters; /dev/zero has no end."""


@functools.cache  # a pipe gives it only once, and TARGET may be opened again
def _read_secret(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read(LONGEST_SECRET + 1)
        if len(text) > LONGEST_SECRET:
            raise ValueError("it is too long for one")
        return text.rstrip("\n")
    except (OSError, ValueError) as error:
        raise SecretUnreadable(file=file, reason=getattr(error, "strerror", None) or str(error)) from None
