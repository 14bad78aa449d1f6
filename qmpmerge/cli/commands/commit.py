"""`commit`: merge layers of a chain."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import click

from qmpmerge.cli import ask, complete, merge_options, options
from qmpmerge.cli.commands import group
from qmpmerge.cli.merge_options import POLITE_SECONDS, Help
from qmpmerge.cli.options import Options, detaching, for_images, forcing, refuse_together, shared, waiting
from qmpmerge.cli.run import awaited, look, on_target, run
from qmpmerge.errors import FORCEABLE

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Ending, Outcome, Policy
    from qmpmerge.chain.plan import Direction
    from qmpmerge.cli.render.output import Output
    from qmpmerge.targets.target import Target


@group.cli.command()
@options.target
@click.argument("disk", required=False, shell_complete=complete.disks)
@merge_options.layers(
    base="Merge into this image (default: the lowest).", top="Merge from this image down (default: the active one)."
)
@click.option("--shallow", is_flag=True, help="Merge into the image right below the top.")
@click.option("--active", is_flag=True, hidden=True)  # as one types it with virsh, and as it is where top says so
@options.habits("--wait", "--verbose")
@merge_options.keep()
@merge_options.endings
@merge_options.speed
@merge_options.verifying(
    "Compare base and top before the switch, whatever it costs (default: where it is cheap).", "Do not compare them."
)
@options.search
@merge_options.finishing
@click.option("--dry-run", is_flag=True, help="Make all checks, show the chain that would result, change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before the guest is moved onto the base.")
@waiting
@detaching
@merge_options.converging
@for_images
@forcing(*FORCEABLE)
@shared
def commit(
    target: str,
    disk: str | None,
    base: str | None,
    top: str | None,
    shallow: bool,
    keep: int | None,
    active: bool,
    pivot: bool,
    ending: "Ending",
    speed: int | None,
    verify: bool | None,
    search: tuple[str, ...],
    merged_files: "Policy | None",
    pause: bool,
    dry_run: bool,
    yes: bool,
    polite: bool,
    converge: Help | None,
    options: Options,
) -> int:
    """
    Merge images of a chain while the guest keeps writing.

    The images above --base, up to and including --top, go into --base. By default that is the whole chain, and the guest
    moves onto the base (pivots): start the VM from the base then; --keep-overlay is another end of such a
    merge. With a --top below the active image the guest keeps its image, and the one above the top is linked to the base.

    With --hold all is copied and nothing switched: the old chain stays in use, and the merge waits in QEMU until the same
    command without it, or `qmpmerge job`, goes on with it or cancels it.

    A base outside the active image's folder may be of use to others: name it by --base, or let --search go through its
    folder.

    A guest that writes faster than the job copies keeps a merge of the active image from ever being ready. With --converge
    the job's own limit is lifted, then the guest's writes are limited, down to 1 MiB/s; with --converge-pause it is paused
    at last. All that is undone at the end, even if qmpmerge is killed.

    LAYER is an index as `qmpmerge chain` shows it (`3`; 1 is the base, `-1` the active image), a file name as it shows it,
    a path, or a node name. What means two images is refused. An index means another image
    once layers are gone: name files in what is run more than once. `'[3]'` and `'vda[3]'` need quotes; libvirt's numbers
    are others: those of a VM with two disks, or that was started again.

    \b
    Examples:
      qmpmerge commit vm1 vda --top 3              of four images, 1 and 4 stay
      qmpmerge commit vm1 vda                      everything into the base
      qmpmerge commit vm1 vda --dry-run            look first
      qmpmerge commit vm1 vda --shallow            the top layer only
      qmpmerge commit vm1 vda --keep 2             all but the newest two overlays
      qmpmerge commit vm1 vda --speed 100M         gently
      qmpmerge commit vm1 vda --top 3 --hold       copy now, switch later
      qmpmerge commit /vm/c.qcow2                  images that no VM uses

    Where stdin, stdout or stderr is a terminal the plan is shown on it first, and the guest is moved only if you type yes
    there; what is piped in is no answer. Not asked are --yes and --json, and what has no terminal, such as a cron job.

    The job belongs to QEMU. Ctrl-C cancels it; a second Ctrl-C, a closed terminal, --detach and --timeout leave it, and
    the same command again goes on from where it stands. `timeout -s INT 10m qmpmerge commit ...` cancels it after that time.

    \b
    Exit codes:
      0    merged, pivoted, kept, ready, held, planned or unchanged, as asked
      3    refused: the disks are untouched, the hint says what to do instead
      4    no session with TARGET: the disks are untouched
      5    the job failed: the old chain is in use and right
      6    unknown: the outcome is not proven
      7    --timeout passed, or we have left it: the job goes on in QEMU; that of
           images that no VM uses was taken back
      130  cancelled by Ctrl-C or a no, or not begun before --timeout: the old
           chain is in use
    """
    refuse_together({"--base": base is not None, "--shallow": shallow})
    if keep is not None:
        refuse_together({"--keep": True, "--top": top is not None, "--shallow": shallow, "--active": active and keep})
    refuse_together({"--detach": options.patience.detach, "--converge": converge})
    if active and ending == "pivot" and not pivot:
        raise click.UsageError(
            "with virsh `--active` alone leaves the guest on its overlay: say `--wait-ready` for that, or `--pivot` to have it "
            "moved onto the base"
        )

    async def work(
        target: "Target", output: "Output", *, dry_run: bool, agreed: "Sequence[Outcome] | None" = None
    ) -> "Outcome":
        from qmpmerge.operations import commit as operation

        if (active or pivot) and top is not None:
            await _refuse_below_active(target, disk, top, "--active" if active else "--pivot")
        return await operation.commit(
            target,
            disk,
            base=base,
            top=top,
            shallow=shallow,
            keep=keep,
            ending=ending,
            speed=speed,
            verify=verify,
            force=options.force,
            search=search,
            dry_run=dry_run,
            agreed=agreed,
            merged_files=merged_files or "stash",
            pause=pause,
            converge=converge.reporting_to(output) if converge else None,
            report=output.progress,
            patience=options.patience,
            polite=POLITE_SECONDS if polite else None,
        )

    async def planned(target: "Target", output: "Output") -> "Outcome | None":
        from qmpmerge.operations import commit as operation

        pivots = await operation.would_pivot(target, disk, base=base, top=top, shallow=shallow, keep=keep)
        return await work(target, output, dry_run=True) if pivots else None

    is_asked = not (dry_run or yes or options.json) and ending == "pivot" and ask.can_be_asked()
    return _carried_out(target, options, work, planned if is_asked else None, dry_run=dry_run)


def _carried_out(
    target: str,
    options: Options,
    work: "Callable[..., Awaitable[Outcome]]",
    planned: "Callable[[Target, Output], Awaitable[Outcome | None]] | None",
    *,
    dry_run: bool,
) -> int:
    """Do `work`; where there is a way to have it `planned`, once the user has agreed to that."""

    def merge(agreed: "Sequence[Outcome] | None" = None) -> "Callable[[Output], Awaitable[str]]":
        async def merged(target: "Target", output: "Output") -> str:
            outcome = await work(target, output, dry_run=dry_run, agreed=agreed)
            output.commit(outcome)
            return outcome.verdict

        begun = on_target(target, options, merged, write=True, dry_run=dry_run)
        return begun if dry_run else resuming(target, options, begun, "commit")

    def agreed_to(output: "Output", agreed: "Sequence[Outcome]") -> str:
        options.patience.begin_again()  # the question took its time
        return awaited(options, merge(agreed), output)

    if planned is None:
        return run(options, merge())
    looked = on_target(target, options, planned, write=True, dry_run=True)
    return look(options, ask.before(lambda output: awaited(options, looked, output), agreed_to))


async def _refuse_below_active(target: "Target", disk: str | None, top: str, option: str) -> None:
    """What one says with `--active`, or with `--pivot`, must be so."""
    from qmpmerge.errors import ActiveOnly

    view = await target.chain(disk)
    image = view.chain.find(top, view.disk.name)
    if image is not view.chain.active:
        raise ActiveOnly(option=option, top=image.file, active=view.chain.active.file)


def resuming(
    target: str, options: Options, begun: "Callable[[Output], Awaitable[str]]", direction: "Direction"
) -> "Callable[[Output], Awaitable[str]]":
    """The same work, after what an earlier run left of the image TARGET was put right, where that is beyond doubt."""

    async def resumed(output: "Output") -> str:
        from qmpmerge.errors import Unfinished

        try:
            return await begun(output)
        except Unfinished as error:
            from qmpmerge.engine import resume

            if error.path != target:
                raise
            outcome = await resume.settle_image(target, allow=options.allow)
        if outcome is None or outcome.direction != direction:
            return await begun(output)
        output.commit(outcome)
        return outcome.verdict

    return resumed
