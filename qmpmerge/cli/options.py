"""Options that every command shares, and the types of the others."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, TextIO

import click

from qmpmerge.cli import complete
from qmpmerge.cli.commands import group
from qmpmerge.cli.quantities import Duration
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output


class Options(Value):
    """
    What the shared options say. `patience` says how long we stay, and is told when a signal wants us to leave at once.
    """

    json: bool
    trace: bool
    record: str | None
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
    """The same, and those of commands that speak to a QEMU or change images."""
    return _gathered(function, [_json, _trace, _record, _quiet])


_json = click.option("--json", is_flag=True, help="One JSON object on stdout, progress as JSON lines on stderr.")
_trace = click.option("-v", "--trace", is_flag=True, help="Show the QMP conversation, and our own steps, on stderr.")
_record = click.option(
    "--record",
    metavar="FILE",
    envvar="QMPMERGE_RECORD",
    help="Add the same to this file, as JSON lines (environment: QMPMERGE_RECORD).",
)
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


def _gathered(function: Callable[..., Any], shared: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    def gather(
        *,
        json: bool,
        quiet: bool,
        trace: bool = False,
        record: str | None = None,
        timeout: float | None = None,
        force: tuple[str, ...] = (),
        allow: tuple[str, ...] = (),
        form: str | None = None,
        secret: str | None = None,
        detach: bool = False,
        **rest: object,
    ) -> Any:
        options = Options(json, trace, record, quiet, frozenset(force), allow, form, secret, Patience(timeout, detach))
        return function(options=options, **rest)

    return declared(gather, function, shared)


def declared(
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
        help="Leave after this time, as in 90 (seconds), 10m or 1h30m (exit code 7): the job goes on, that of "
        "images that no VM uses is taken back.",
    )
    polite = click.option("--polite", is_flag=True, help="Leave the monitor to others between two looks at the job.")
    return limit(polite(function))


def detaching(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare that one may leave at once; it comes in ``options``."""
    return click.option("--detach", is_flag=True, help="Leave once the job has been started (exit code 7).")(function)


def refuse_together(given: Mapping[str, object]) -> None:
    """Options of which one at the most may be given, and what the user said of each."""
    flags = [flag for flag, value in given.items() if value]
    if len(flags) > 1:
        raise click.UsageError(f"{' and '.join(flags)} cannot be used together")


class Assignment(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks alone
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
