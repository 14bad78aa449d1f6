"""Options that every command shares, and the types of the others."""

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

from qmpmerge.cli import complete
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.errors import FORCEABLE

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.engine.pace.converge import Converge


POLITE_SECONDS = 5.0
"""How long `--polite` releases the monitor."""

ENDINGS: dict[str, str] = {
    "--pivot": "Active merge: move the guest onto the base (default).",
    "--keep-overlay": "Active merge: let the guest keep the overlay.",
    "--wait-ready": "Active merge: stop at ready, mirroring every write.",
}

LONGEST_SECONDS = 1e9
"""Thirty years; the timers of Python and of the kernel cannot be set to any time."""

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


@dataclass(frozen=True)
class Options:
    """
    What the shared options say. `timeout` is in seconds, None for no limit of the user's; `patience` says what becomes
    of a job then, and is told when a signal wants us to leave at once.
    """

    json: bool
    verbose: bool
    quiet: bool
    timeout: float | None
    force: frozenset[str]
    allow: tuple[str, ...] = ()
    form: str | None = None
    secret: str | None = None
    patience: Patience = field(default_factory=Patience)

    def output(self, err: TextIO | None = None) -> "Output":
        """The renderer they ask for, on this process's streams; `err` in the place of stderr."""
        if self.json:
            from qmpmerge.cli.render.json import JsonOutput

            return JsonOutput(sys.stdout, err or sys.stderr, quiet=self.quiet)
        from qmpmerge.cli.render.text import TextOutput

        return TextOutput(sys.stdout, err or sys.stderr, quiet=self.quiet)


def basic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the options that every command has; it gets them as one value, ``options``."""
    return _gathered(function, [_json, _quiet])


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and those of commands that speak to a QEMU."""
    return _gathered(function, [_json, _verbose, _quiet, _timeout, _force])


_json = click.option("--json", is_flag=True, help="One JSON object on stdout, progress as JSON lines on stderr.")
_verbose = click.option("-v", "--verbose", is_flag=True, help="Show the QMP conversation on stderr.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress, no hints.")
_force = click.option(
    "--force", multiple=True, type=click.Choice(FORCEABLE), help="Go on although qmpmerge refuses for this reason."
)


def _timeout(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--timeout",
        type=Duration(positive=True),
        metavar="TIME",
        help="Stop waiting after this time, as in 90 (seconds) or 10m. A job that runs then goes on (exit code 7).",
    )(function)


def _gathered(function: Callable[..., Any], declared: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    def gather(
        *,
        json: bool,
        quiet: bool,
        verbose: bool = False,
        timeout: float | None = None,
        force: tuple[str, ...] = (),
        allow: tuple[str, ...] = (),
        form: str | None = None,
        secret: str | None = None,
        detach: bool = False,
        on_timeout: Literal["leave", "cancel"] = "leave",
        **rest: object,
    ) -> Any:
        patience = Patience(timeout, on_timeout, detach)
        options = Options(json, verbose, quiet, timeout, frozenset(force), allow, form, secret, patience)
        return function(options=options, **rest)

    return _declared(gather, function, declared)


def _declared(
    gather: Callable[..., Any], function: Callable[..., Any], options: Sequence[Callable[..., Any]]
) -> Callable[..., Any]:
    """`gather` in the place of the command `function`, with these options and those that it has already."""
    gather.__name__ = function.__name__
    gather.__doc__ = function.__doc__
    gather.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in reversed(options):
        gather = option(gather)
    return gather


def for_images(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the options of the offline door; they come in ``options`` too."""
    allow = click.option(
        "--allow",
        multiple=True,
        metavar="PATH",
        help="Image as TARGET: a folder, file or device that headers may name, besides the image's folder.",
    )
    form = click.option(
        "--format",
        "form",
        type=click.Choice(["qcow2", "raw"]),
        help="Image as TARGET: its format, where it is a block device or its name and its first bytes disagree.",
    )
    secret = click.option("--secret", metavar="FILE", help="Image as TARGET: the passphrase of encrypted images.")
    return allow(form(secret(function)))


def for_jobs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare how one leaves a job; ``--polite`` comes by itself, the others in ``options``."""
    declared = (
        click.option("--detach", is_flag=True, help="Leave once the job has been started (exit code 7)."),
        click.option(
            "--on-timeout",
            type=click.Choice(["leave", "cancel"]),
            default="leave",
            help="What becomes of the job at --timeout: it goes on (default), or is cancelled.",
        ),
        click.option("--polite", is_flag=True, help="Release the monitor between polls."),
    )
    for option in reversed(declared):
        function = option(function)
    return function


@dataclass(frozen=True)
class Help:
    """What may be done to a guest that writes faster than the job copies, as `converge.Converge` takes it."""

    floor: int
    pause: float

    def reporting_to(self, output: "Output") -> "Converge":
        """The same, with each rung noted."""
        from qmpmerge.engine.pace.converge import Converge

        return Converge(self.floor, self.pause, output.note)


def converging(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what may be done to a guest that writes faster than the job copies; the command gets one value, ``converge``."""
    declared = (
        click.option("--converge", is_flag=True, help="Slow down a guest that writes faster than the job copies."),
        click.option(
            "--converge-floor",
            type=Size(),
            metavar="SIZE",
            help="Let it write so much a second (default: 1M).",
        ),
        click.option(
            "--converge-pause",
            type=Duration(),
            metavar="TIME",
            help="And pause it, for so long at the most, as in 2s (default: never).",
        ),
    )

    def gather(*, converge: bool, converge_floor: int | None, converge_pause: float | None, **rest: object) -> Any:
        if not converge and (converge_floor is not None or converge_pause is not None):
            raise click.UsageError("--converge-floor and --converge-pause go with --converge")
        wanted = (
            Help(UNITS["M"] if converge_floor is None else converge_floor, converge_pause or 0.0) if converge else None
        )
        return function(converge=wanted, **rest)

    return _declared(gather, function, declared)


class Size(click.ParamType[int]):
    """Bytes, with an optional K, M, G or T (powers of 1024)."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """``64M`` is 67108864."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(
            r"(\d{1,19}(?:\.\d{1,19})?)\s*([KMGT]?)(?:i?B)?(?:/s)?", str(value), re.IGNORECASE | re.ASCII
        )
        number = (float(match[1]) if "." in match[1] else int(match[1])) * UNITS[match[2].upper()] if match else -1
        if not 0 <= number < 1 << 63:  # QMP's int
            self.fail(f"{value!r} is no size: write bytes, or a number with K, M, G or T, as in 64M", param, ctx)
        return int(number)


class Duration(click.ParamType[float]):
    """Seconds, or a number with s, m, h or d. `positive` takes no 0, `with_unit` no bare number."""

    name = "time"

    def __init__(self, *, positive: bool = False, with_unit: bool = False) -> None:
        self._positive = positive
        self._with_unit = with_unit

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``7d`` is 604800."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", str(value), re.IGNORECASE | re.ASCII)
        unit = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2].lower()] if match else 0
        seconds = float(match[1]) * unit if match else math.inf
        if seconds > LONGEST_SECONDS:
            self.fail(f"{value!r} is no time: write seconds, or a number with s, m, h or d, as in 10m", param, ctx)
        if self._with_unit and match is not None and not match[2]:
            self.fail(f"{value!r} has no unit: write {value}d for days, or s, m or h", param, ctx)
        if self._positive and seconds == 0:
            self.fail("no time at all is too short", param, ctx)
        return seconds


class Assignment(click.ParamType[tuple[str, str]]):
    """``DISK=FILE``."""

    name = "disk=file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the first ``=``."""
        if isinstance(value, tuple):
            return value
        disk, equals, file = str(value).partition("=")
        if not (disk and equals and file):
            self.fail(f"{value!r} is not of the form DISK=FILE, as in vda=/vm/snap1.qcow2", param, ctx)
        return disk, file


def target(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare TARGET."""
    return click.argument("target", shell_complete=complete.targets)(function)


def endings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare how an active merge may end; the command gets one value, ``ending``."""
    declared = [click.option(flag, is_flag=True, help=meaning) for flag, meaning in ENDINGS.items()]

    def gather(*, pivot: bool, keep_overlay: bool, wait_ready: bool, **rest: object) -> Any:
        said = dict(zip(ENDINGS, (pivot, keep_overlay, wait_ready), strict=True))
        flags = [flag for flag, is_given in said.items() if is_given]
        if len(flags) > 1:
            raise click.UsageError(f"{' and '.join(flags)} cannot be used together")
        return function(ending="keep" if keep_overlay else "ready" if wait_ready else "pivot", **rest)

    return _declared(gather, function, declared)


def finishing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what becomes of the merged files, and whether the guest may be paused."""
    policies = click.Choice(["stash", "delete", "keep"])
    files = click.option(
        "--merged-files",
        type=policies,
        default="stash",
        show_default=True,
        help="stash: rename to NAME.merged; delete: compare, then remove; keep: leave alone.",
    )
    pause = click.option(
        "--pause/--no-pause",
        default=True,
        help="Pause the guest for the milliseconds of the pivot (default). Without, a crash during it may leave two images "
        "of which nobody can tell which holds the last writes.",
    )
    return files(pause(function))
