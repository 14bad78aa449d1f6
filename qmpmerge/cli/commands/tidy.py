"""`tidy`: shorten the chains of several VMs and folders."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import click

from qmpmerge.cli import ask, merge_options, options, streams
from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, forcing, shared
from qmpmerge.cli.quantities import Duration, Size
from qmpmerge.cli.run import awaited, door, look
from qmpmerge.errors import FORCEABLE

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Outcome, Policy
    from qmpmerge.cli.render.output import Output
    from qmpmerge.operations.shorten import Direction
    from qmpmerge.operations.tidy import Tidied, Tidying, Told

QUESTION = f"Merge, and have the VMs use the bases from now on? {ask.CHOICE}"


class Work(Protocol):
    """What was asked for on the command line, or its plan; `told` hears of each disk as it is done."""

    async def __call__(
        self, output: "Output", told: "Told", *, dry_run: bool, agreed: "Sequence[Outcome] | None" = None
    ) -> "Tidying":
        """As `qmpmerge.tidy`."""


@group.cli.command()
@options.targets
@merge_options.keep(required=True)
@click.option("--all", "every", is_flag=True, help="All VMs of this host that are root's or yours, but libvirt's.")
@click.option(
    "--direction",
    type=click.Choice(["commit", "pull", "auto"]),
    default="commit",
    show_default=True,
    metavar="WAY",
    help="commit merges into the base; pull leaves the base as it is, and pulls into the oldest overlay that stays; auto pulls "
    "where a commit is refused for the sake of others, unless no overlay stays (--keep 0).",
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="N",
    help="Merge so many disks at the same time.",
)
@click.option(
    "--speed",
    type=Size(),
    metavar="SIZE",
    help="Copy at most so much a second, all together, as in 100M; 0 for no limit.",
)
@merge_options.merged_files
@options.search
@options.allow("A folder, file or device that headers may name, besides the image's folder.")
@click.option("--dry-run", is_flag=True, help="Make all checks, show what would be merged, change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before guests are moved onto their bases.")
@click.option(
    "--timeout",
    type=Duration(positive=True),
    metavar="TIME",
    help="Begin nothing more after this time, as in 90 (seconds) or 4h, leave what is at work, and take back what is in "
    "images that no VM uses (exit code 7).",
)
@forcing(*FORCEABLE)
@shared
def tidy(
    targets: tuple[str, ...],
    keep: int,
    every: bool,
    direction: "Direction",
    parallel: int,
    speed: int | None,
    merged_files: "Policy | None",
    search: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    options: Options,
) -> int:
    """
    Shorten the chains of many disks.

    Each is left its base and its newest overlays.

    TARGET may also be a folder: each chain whose active image lies right there and is not in use. Disks whose chains are short
    enough are left alone, and one that is refused or fails stops no other. Left out are images of a folder that are in use,
    and `snapshot=on` drives.

    \b
    Examples:
      qmpmerge tidy vm1 vm2 --keep 2
      qmpmerge tidy --all /vm --keep 2 --speed 100M --timeout 4h
      qmpmerge tidy /vm --keep 1 --dry-run

    Each merge is as of `commit`; with --keep 0 guests are moved onto their bases, and on a terminal you are asked before, as
    by `commit`. The exit code is that of the worst outcome.

    Ctrl-C cancels what is at work and begins nothing more; a second Ctrl-C, a closed terminal and --timeout leave the jobs
    that are QEMU's, and the same command again goes on from there. It may be killed, and may run twice: where another qmpmerge
    is at work a disk is refused, or its monitor is taken.

    \b
    Exit codes:
      0    all are as short as was asked
      3    a disk was refused: it is untouched
      4    no session with a TARGET: its disks are untouched
      5    a job failed: the old chain is in use and right
      6    an outcome is not proven
      7    --timeout passed: a job goes on in QEMU, that of images that no VM uses
           was taken back, or a disk's turn did not come
      130  cancelled by Ctrl-C: the old chains are in use
    """
    if not (targets or every):
        raise click.UsageError("name VMs, images or folders, as in `qmpmerge tidy vm1 /vm --keep 2`, or say `--all`")
    if direction == "pull" and not keep:
        raise click.UsageError(
            "`--direction pull` with `--keep 0` has no overlay to pull into: keep one with `--keep 1`, or have guests moved "
            "onto their bases with `--direction commit`"
        )

    async def work(
        output: "Output", told: "Told", *, dry_run: bool, agreed: "Sequence[Outcome] | None" = None
    ) -> "Tidying":
        from qmpmerge.operations import tidy as operation

        return await operation.tidy(
            targets,
            keep=keep,
            every=every,
            direction=direction,
            parallel=parallel,
            speed=speed,
            merged_files=merged_files,
            force=options.force,
            allow=options.allow,
            search=search,
            dry_run=dry_run,
            agreed=agreed,
            patience=options.patience,
            door=lambda name, **how: door(options, output, allow=options.allow, **how)(name),
            told=told,
            report=output.progress,
        )

    def carried_out(output: "Output") -> str:
        is_asked = not (keep or dry_run or yes or options.json) and ask.can_be_asked()
        agreed = _agreed(work, options, output) if is_asked else None
        return _carried_out(work, options, output, dry_run=dry_run, agreed=agreed)

    return look(options, carried_out)


def _agreed(work: Work, options: Options, output: "Output") -> "list[Outcome]":
    """The plans of all merges that pivot, after the user has agreed to them. Raises Cancelled."""
    planned = awaited(options, lambda output: work(output, lambda entry: None, dry_run=True), output)
    moved = [(one, one.outcome) for one in planned.tidied if one.outcome is not None and one.outcome.pivots]
    if moved:
        ask.confirm(lambda screen: _show_all(screen, [entry for entry, _plan in moved]), QUESTION)
        options.patience.begin_again()  # the question took its time
    return [plan for _entry, plan in moved]


def _show_all(screen: "Output", entries: "list[Tidied]") -> None:
    from qmpmerge.operations.tidy import Tidying

    screen.tidied(*entries)
    screen.tidy(Tidying(tuple(entries)))


def _carried_out(
    work: Work, options: Options, output: "Output", *, dry_run: bool, agreed: "Sequence[Outcome] | None"
) -> str:
    """Do it, show each disk as it is done, and all of them at the end; the verdict."""
    done: list[Tidied] = []

    def told(entry: "Tidied") -> None:
        done.append(entry)
        _show(entry, options, output)

    async def all_that_was_done(output: "Output") -> "Tidying":
        import asyncio

        try:
            return await work(output, told, dry_run=dry_run, agreed=agreed)
        except asyncio.CancelledError:  # all old chains are back, and what was merged before is told too
            from qmpmerge.operations.tidy import Tidying

            return Tidying(tuple(done))

    result = awaited(options, all_that_was_done, output)
    output.tidy(result)
    return result.verdict


def _show(entry: "Tidied", options: Options, output: "Output") -> None:
    """Say it, on stdout where stderr does not take an error."""
    output.tidied(entry)
    if entry.error is not None and not options.json and streams.is_failing(sys.stderr):
        options.output(err=sys.stdout).tidied(entry)
