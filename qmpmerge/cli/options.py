"""Options that every command shares, and the types of the others."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import click

from qmpmerge.cli import complete
from qmpmerge.cli.commands import group
from qmpmerge.cli.quantities import Duration
from qmpmerge.engine.pace.patience import Patience

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.engine.pace.converge import Converge


POLITE_SECONDS = 5.0
"""How long `--polite` releases the monitor."""

ENDINGS: dict[str, str] = {
    "--pivot": "Move the guest onto the base (default where the active image is merged).",
    "--keep-overlay": "Let the guest keep its overlay, the base being a copy.",
    "--wait-ready": "Stop when base and overlay are in sync, and stay so; `qmpmerge job` ends it later.",
}


@dataclass(frozen=True)
class Options:
    """
    What the shared options say. `patience` says how long we stay, and is told when a signal wants us to leave at once.
    """

    json: bool
    trace: bool
    quiet: bool
    force: frozenset[str] = frozenset()
    allow: tuple[str, ...] = ()
    form: str | None = None
    secret: str | None = None
    patience: Patience = field(default_factory=Patience)

    def output(self, err: TextIO | None = None) -> "Output":
        """The renderer they ask for, on this process's streams; `err` in the place of stderr."""
        if self.json:
            from qmpmerge.cli.render.json import JsonOutput

            return JsonOutput(sys.stdout, err or sys.stderr, command=group.typed(), quiet=self.quiet)
        from qmpmerge.cli.render.text import TextOutput

        return TextOutput(sys.stdout, err or sys.stderr, quiet=self.quiet)


def basic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the options that every command has; it gets them as one value, ``options``."""
    return _gathered(function, [_json, _quiet])


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and those of commands that speak to a QEMU."""
    return _gathered(function, [_json, _trace, _quiet])


_json = click.option("--json", is_flag=True, help="One JSON object on stdout, progress as JSON lines on stderr.")
_trace = click.option("-v", "--trace", is_flag=True, help="Show the QMP conversation on stderr.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress, no notes, no hints but those of errors.")


def habits(*flags: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Take flags that change nothing here, as those of virsh for what is so anyway."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag in flags:
            function = click.option(flag, is_flag=True, hidden=True, expose_value=False)(function)
        return function

    return declare


def forcing(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare which refusals the user may override; they come in ``options``."""
    return click.option(
        "--force",
        multiple=True,
        type=click.Choice(names),
        metavar="NAME",
        help=f"Go on although qmpmerge refuses for this reason: {', '.join(names)}.",
    )


def _gathered(function: Callable[..., Any], declared: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    def gather(
        *,
        json: bool,
        quiet: bool,
        trace: bool = False,
        timeout: float | None = None,
        force: tuple[str, ...] = (),
        allow: tuple[str, ...] = (),
        form: str | None = None,
        secret: str | None = None,
        detach: bool = False,
        **rest: object,
    ) -> Any:
        options = Options(json, trace, quiet, frozenset(force), allow, form, secret, Patience(timeout, detach))
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
    return for_headers(click.option("--secret", metavar="FILE", help="The passphrase of encrypted images.")(function))


def for_headers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, where images are only looked at."""
    form = click.option(
        "--format",
        "form",
        type=click.Choice(["qcow2", "raw"]),
        help="The image's format, where it is a block device, or its name and its first bytes disagree.",
    )
    help = "A folder, file or device that headers may name, besides the image's folder."
    return allow(help)(form(function))


def allow(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare what may be named by what is read; it comes in ``options``."""
    return click.option("--allow", multiple=True, type=click.Path(exists=True), metavar="PATH", help=help)


def search(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare where else to look for what is built on the images."""
    return click.option(
        "--search",
        multiple=True,
        type=click.Path(exists=True, file_okay=False),
        metavar="FOLDER",
        help="Look here too, and below, for images that are built on those of the chain, and would be ruined.",
    )(function)


def waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare how long one stays with a job, in ``options``; ``--polite`` comes by itself."""
    limit = click.option(
        "--timeout",
        type=Duration(positive=True),
        metavar="TIME",
        help="Leave after this time, as in 90 (seconds), 10m or 1h30m; the job goes on (exit code 7).",
    )
    polite = click.option("--polite", is_flag=True, help="Leave the monitor to others between two looks at the job.")
    return limit(polite(function))


def detaching(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare that one may leave at once; it comes in ``options``."""
    return click.option("--detach", is_flag=True, help="Leave once the job has been started (exit code 7).")(function)


@dataclass(frozen=True)
class Help:
    """What may be done to a guest that writes faster than the job copies, as `converge.Converge` takes it."""

    pause: float

    def reporting_to(self, output: "Output") -> "Converge":
        """The same, with each rung noted."""
        from qmpmerge.engine.pace.converge import Converge

        return Converge(self.pause, output.note)


def converging(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    Declare what may be done to a guest that writes faster than the job copies, over `waiting`; the command gets one value,
    ``converge``.
    """
    declared = (
        click.option("--converge", is_flag=True, help="Slow down a guest that writes faster than the job copies."),
        click.option(
            "--converge-pause",
            type=Duration(positive=True),
            metavar="TIME",
            help="The same, and pause it where that is not enough, for so long at the most, as in 2s.",
        ),
    )

    def gather(*, converge: bool, converge_pause: float | None, polite: bool, **rest: object) -> Any:
        wanted = Help(converge_pause or 0.0) if converge or converge_pause is not None else None
        refuse_together({"--polite": polite, "--converge": wanted})  # who helps a guest must have the monitor at hand
        return function(converge=wanted, polite=polite, **rest)

    return _declared(gather, function, declared)


def refuse_together(given: Mapping[str, object]) -> None:
    """Options of which one at the most may be given, and what the user said of each."""
    flags = [flag for flag, value in given.items() if value]
    if len(flags) > 1:
        raise click.UsageError(f"{' and '.join(flags)} cannot be used together")


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


def targets(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare TARGET..."""
    argument = click.argument("targets", metavar="TARGET...", nargs=-1, shell_complete=complete.targets)
    return argument(function)


def keep(*, required: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare how many overlays stay."""
    return click.option(
        "--keep",
        type=click.IntRange(min=0),
        required=required,
        metavar="N",
        help="Leave the newest N overlays above the base, and merge what lies below them; 0 merges everything.",
    )


def endings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare how an active merge may end: ``ending``, and ``pivot`` where the user has said that it is to be that."""
    declared = [click.option(flag, is_flag=True, help=meaning) for flag, meaning in ENDINGS.items()]

    def gather(*, pivot: bool, keep_overlay: bool, wait_ready: bool, **rest: object) -> Any:
        refuse_together(dict(zip(ENDINGS, (pivot, keep_overlay, wait_ready), strict=True)))
        ending = "keep" if keep_overlay else "ready" if wait_ready else "pivot"
        return function(ending=ending, pivot=pivot, **rest)

    return _declared(gather, function, declared)


def finishing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what becomes of the merged files, and that the guest may not be paused."""
    files = click.option(
        "--merged-files",
        type=click.Choice(["stash", "delete", "keep"]),
        default=None,
        metavar="ACTION",
        help="What becomes of merged files: stash (default) renames them to NAME.merged, delete compares and removes them, "
        "keep (default of a pull) leaves them alone.",
    )
    pause = click.option(
        "--no-pause",
        is_flag=True,
        help="Do not pause the guest for the milliseconds of the pivot; a crash in them may leave two images of which "
        "nobody can tell which holds the last writes.",
    )

    def gather(*, no_pause: bool, **rest: object) -> Any:
        return function(pause=not no_pause, **rest)

    return _declared(gather, function, [files, pause])
