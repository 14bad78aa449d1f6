"""Options of the commands that merge: which layers, how fast, how it ends, and what becomes of the files."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qmpmerge.cli import complete
from qmpmerge.cli.options import declared, refuse_together
from qmpmerge.cli.quantities import Duration, Size
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.engine.pace.converge import Converge

Declare = Callable[[Callable[..., Any]], Callable[..., Any]]

POLITE_SECONDS = 5.0
"""How long `--polite` releases the monitor."""

ENDINGS: dict[str, str] = {
    "--pivot": "Move the guest onto the base (default where the active image is merged).",
    "--keep-overlay": "Let the guest keep its overlay, the base being a copy.",
    "--hold": "Stop once all is copied, before anything is switched; `qmpmerge job` ends it later.",
}


def layers(*, base: str, top: str) -> Declare:
    """Declare `--base` and `--top`, with these words about each."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag, meaning in (("--top", top), ("--base", base)):
            option = click.option(flag, metavar="LAYER", help=meaning, shell_complete=complete.layers)
            function = option(function)
        return function

    return declare


def keep(*, required: bool = False) -> Declare:
    """Declare how many overlays stay."""
    return click.option(
        "--keep",
        type=click.IntRange(min=0),
        required=required,
        metavar="N",
        help="Leave the newest N overlays above the base, and merge what lies below them; 0 merges everything.",
    )


def speed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare how fast one job may copy."""
    return click.option(
        "--speed",
        type=Size(),
        metavar="SIZE",
        help="Copy at most so much a second, as in 100M or 100 MiB/s (powers of 1024, as QEMU counts); 0 for no limit.",
    )(function)


def verifying(does: str, does_not: str) -> Declare:
    """Declare ``verify``: True, False, or None where nothing is said; with these words about the first two."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        def gather(*, verify: bool, no_verify: bool, **rest: object) -> Any:
            refuse_together({"--verify": verify, "--no-verify": no_verify})
            return function(verify=verify or (False if no_verify else None), **rest)

        options = (("--verify", does), ("--no-verify", does_not))
        return declared(gather, function, [click.option(flag, is_flag=True, help=help) for flag, help in options])

    return declare


def endings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare how a merge may end: ``ending``, and ``pivot`` where the user has said that it is to be that."""
    flags = [click.option(flag, is_flag=True, help=ENDINGS[flag]) for flag in ("--pivot", "--keep-overlay")]

    def gather(*, pivot: bool, keep_overlay: bool, hold: bool, **rest: object) -> Any:
        refuse_together(dict(zip(ENDINGS, (pivot, keep_overlay, hold), strict=True)))
        ending = "keep" if keep_overlay else "hold" if hold else "pivot"
        return function(ending=ending, pivot=pivot, **rest)

    return declared(gather, function, [*flags, holding("--wait-ready")])


def holding(*synonyms: str) -> Declare:
    """Declare ``hold``, also by what others call it."""
    return click.option("--hold", *synonyms, "hold", is_flag=True, help=ENDINGS["--hold"])


def merged_files(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what becomes of the merged files."""
    return click.option(
        "--merged-files",
        type=click.Choice(["stash", "delete", "keep"]),
        metavar="ACTION",
        help="What becomes of merged files: stash (default) renames them to NAME.merged, delete compares and removes them, "
        "keep (default of a pull) leaves them alone.",
    )(function)


def finishing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and that the guest may not be paused."""
    pause = click.option(
        "--no-pause",
        is_flag=True,
        help="Do not pause the guest for the milliseconds of the pivot; a crash in them may leave two images of which "
        "nobody can tell which holds the last writes.",
    )

    def gather(*, no_pause: bool, **rest: object) -> Any:
        return function(pause=not no_pause, **rest)

    return declared(gather, function, [merged_files, pause])


class Help(Value):
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
    options = (
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

    return declared(gather, function, options)
