"""
The commands: each declares itself, gathers its options into one value, and runs.

Whatever a user can do here, `import qmpmerge` can do, with the same values and the same errors. Imports that only one
command needs are made where it runs: start-up time is a feature.
"""

import os
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click

from qmpmerge import __version__
from qmpmerge.cli import completing
from qmpmerge.cli.options import Assignment, Help, Options, Size, converging, for_images, for_jobs, shared
from qmpmerge.cli.running import on_host, run

if TYPE_CHECKING:
    from qmpmerge.bitmaps import Handling
    from qmpmerge.cli.output import Output
    from qmpmerge.evidence import Use
    from qmpmerge.hosts import Host
    from qmpmerge.outcome import Ending
    from qmpmerge.witness import Policy

POLITE_SECONDS = 5.0
"""How long `--polite` leaves the monitor to others."""

ENDINGS: dict[str, str] = {
    "--pivot": "Active merge: move the guest onto the base (default).",
    "--keep-overlay": "Active merge: let the guest keep the overlay.",
    "--wait-ready": "Active merge: stop at ready, mirroring every write.",
}


def target(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare TARGET."""
    return click.argument("target", shell_complete=completing.targets)(function)


def endings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare how an active merge may end."""
    values = {"--pivot": "pivot", "--keep-overlay": "keep", "--wait-ready": "ready"}
    for flag in reversed(ENDINGS):
        function = click.option(flag, "ending", flag_value=values[flag], default="pivot", help=ENDINGS[flag])(function)
    return function


def finishing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what becomes of the merged files, and whether the guest may be paused."""
    policies = click.Choice(["stash", "relink", "delete", "keep"])
    files = click.option(
        "--merged-files",
        type=policies,
        default="stash",
        show_default=True,
        help="stash: rename to NAME.merged; relink: that, and a new overlay takes the active image's name; "
        "delete: compare, then remove; keep: leave alone.",
    )
    pause = click.option(
        "--pause/--no-pause",
        default=True,
        help="Pause the guest for the milliseconds of the pivot (default). Without, a crash during it may leave two images "
        "of which nobody can tell which holds the last writes.",
    )
    return files(pause(function))


class StoryOrder(click.Group):
    """Lists the commands in the order in which one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The order in which they are declared."""
        return list(self.commands)


@click.group(
    cls=StoryOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="TARGET is a QMP socket, unix:PATH, tcp:HOST:PORT, the name of a running VM, pid:N, or an image file.",
)
@click.version_option(__version__, prog_name="qmpmerge", message="%(prog)s %(version)s")
def cli() -> None:
    """
    Merge QEMU disk image chains, while the guest keeps writing, without libvirt.

    \b
    qmpmerge vms                                  which VMs run here
    qmpmerge disks vm1                            their disks
    qmpmerge snapshot vm1 vda=/vm/c.qcow2         put an overlay on top
    qmpmerge chain vm1 vda                        base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2
    qmpmerge commit vm1 vda --top [3]             base.raw <-- c.qcow2
    qmpmerge commit vm1 vda                       base.raw, the guest moved onto it
    """


@cli.command()
@shared
def vms(options: Options) -> int:
    """
    List the running QEMUs of this host and their monitors.

    A VM without a QMP monitor is listed as such. VMs of libvirt are marked, and left alone by the other commands.

    \b
    Exit codes: 0.
    """

    async def work(output: "Output") -> str:
        from qmpmerge import processes

        output.vms(processes.vms())
        return "done"

    return run(options, work)


@cli.command()
@target
@for_images
@shared
def disks(target: str, options: Options) -> int:
    """
    List disks and the image each one uses now.

    \b
    Examples:
      qmpmerge disks vm1
      qmpmerge disks /run/vm1.sock --json

    \b
    Exit codes: 0, 3 refused, 4 no session with TARGET, 6 it stopped answering.
    """

    async def work(host: "Host", output: "Output") -> str:
        from qmpmerge.hosts import unfinished

        found = await host.disks()
        output.disks(found, [odd for disk in found for odd in unfinished(disk)])
        return "done"

    return run(options, on_host(target, options, work))


@cli.command()
@target
@click.argument("disk", required=False, shell_complete=completing.disks)
@for_images
@shared
def chain(target: str, disk: str | None, options: Options) -> int:
    """
    Show the chain of a disk, base first.

    What QEMU uses is shown, next to what the images' headers say.

    DISK is a drive id, a qdev id, a node name or the active image's path; it may be left out where only one disk has a
    backing chain. The active image is marked with a star.

    \b
    Examples:
      qmpmerge chain vm1
      qmpmerge chain /run/vm1.sock vda --json

    \b
    Exit codes: 0, 3 refused, 4 no session with TARGET, 6 it stopped answering.
    """

    async def work(host: "Host", output: "Output") -> str:
        output.chain(await host.chain(disk))
        return "done"

    return run(options, on_host(target, options, work))


@cli.command()
@target
@click.argument(
    "overlays",
    metavar="DISK=FILE...",
    nargs=-1,
    required=True,
    type=Assignment(),
    shell_complete=completing.assignments,
)
@click.option("--relative", is_flag=True, help="Write a relative backing name even into another folder.")
@click.option("--quiesce", is_flag=True, help="Freeze the guest's filesystems for the moment; needs --agent.")
@click.option("--agent", metavar="SOCKET", help="The socket of the guest agent.")
@for_images
@shared
def snapshot(
    target: str,
    overlays: tuple[tuple[str, str], ...],
    relative: bool,
    quiesce: bool,
    agent: str | None,
    options: Options,
) -> int:
    """
    Put overlays (external snapshots) on disks, all or none.

    FILE must not exist; it is made with the size of the disk. The image used so far becomes its backing file and is not
    written any more. The backing name is relative where both lie in one folder.

    \b
    Examples:
      qmpmerge snapshot vm1 vda=/vm/snap1.qcow2
      qmpmerge snapshot vm1 vda=/vm/a1.qcow2 vdb=/vm/b1.qcow2
      qmpmerge snapshot vm1 vda=/vm/snap1.qcow2 --quiesce --agent /run/vm1-agent.sock

    \b
    Exit codes:
      0    created
      3    refused: nothing was changed
      4    no session with TARGET
      6    unknown: the overlay may be in use, or the guest may still be frozen
    """
    if quiesce != (agent is not None):
        raise click.UsageError("--quiesce and --agent SOCKET go together")
    doubled = [disk for disk, _ in overlays if [name for name, _ in overlays].count(disk) > 1]
    if doubled:
        raise click.UsageError(f"{doubled[0]} is named twice: a disk gets one overlay at a time")

    async def work(host: "Host", output: "Output") -> str:
        from qmpmerge import snapshots

        output.snapshot(await snapshots.snapshot(host, dict(overlays), relative=relative, agent=agent))
        return "created"

    return run(options, on_host(target, options, work, write=True))


@cli.command()
@target
@click.argument("disk", required=False, shell_complete=completing.disks)
@click.option(
    "--base", metavar="LAYER", help="Merge into this image (default: the lowest).", shell_complete=completing.layers
)
@click.option(
    "--top",
    metavar="LAYER",
    help="Merge from this image down (default: the active one).",
    shell_complete=completing.layers,
)
@click.option("--shallow", is_flag=True, help="Merge into the image right below the top.")
@endings
@click.option("--speed", type=Size(), default=0, metavar="SIZE", help="Limit in bytes a second, as in 100M.")
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Compare base and top before the switch (default: where it is cheap).",
)
@click.option(
    "--bitmaps",
    type=click.Choice(["refuse", "merge", "drop"]),
    default="refuse",
    show_default=True,
    help="Dirty bitmaps of merged images: do not merge, carry them over to the base, or let them go.",
)
@click.option(
    "--search", multiple=True, metavar="FOLDER", help="Look here too for images that are built on those of the chain."
)
@finishing
@click.option("--dry-run", is_flag=True, help="Make all checks, show the plan and the resulting chain, change nothing.")
@for_jobs
@converging
@for_images
@shared
def commit(
    target: str,
    disk: str | None,
    base: str | None,
    top: str | None,
    shallow: bool,
    ending: "Ending",
    speed: int,
    verify: bool | None,
    bitmaps: "Handling",
    search: tuple[str, ...],
    merged_files: "Policy",
    pause: bool,
    dry_run: bool,
    polite: bool,
    converge: Help | None,
    options: Options,
) -> int:
    """
    Merge images of a chain while the guest keeps writing.

    The images above --base up to and including --top go into --base. By default that is the whole chain, and the guest
    moves onto the base (pivots). A top below the active image makes an intermediate merge: the image above it is linked
    to the base.

    A guest that writes as fast as is copied keeps an active merge from ever being ready. With --converge the job's speed limit
    is lifted, then the guest's writes are limited, then it is paused where --converge-pause allows it; all that is undone
    at the end, even if qmpmerge is killed.

    LAYER is a path, an index as `qmpmerge chain` shows it (`vda[2]` or `[2]`, 1 is the base), or a node name.

    \b
    Examples:
      qmpmerge commit vm1 vda --top '[3]'                     of four images, 1 and 4 are left
      qmpmerge commit vm1 vda                                 everything into the base
      qmpmerge commit vm1 vda --base /vm/a.qcow2 --dry-run    look first
      qmpmerge commit vm1 vda --shallow --speed 100M          the top layer only, gently

    A job belongs to QEMU. Ctrl-C cancels it; a second Ctrl-C, a closed terminal, --detach and --timeout leave it, and
    the same command again goes on from where it stands.

    \b
    Exit codes:
      0    merged, pivoted, kept, ready, planned, unchanged
      3    refused: the disks are untouched, the hint says what to do instead
      4    no session with TARGET: the disks are untouched
      5    the job failed: the old chain is in use and right
      6    unknown: the outcome is not proven
      7    the job goes on in QEMU: --timeout passed, or we have left it
      130  cancelled by Ctrl-C, or at --timeout: the old chain is in use
    """

    async def work(host: "Host", output: "Output") -> str:
        from qmpmerge import merge

        outcome = await merge.commit(
            host,
            disk,
            base=base,
            top=top,
            shallow=shallow,
            ending=ending,
            speed=speed,
            verify=verify,
            bitmaps=bitmaps,
            force=options.force,
            search=search,
            dry_run=dry_run,
            merged_files=merged_files,
            pause=pause,
            converge=converge.told_to(output) if converge else None,
            report=output.progress,
            patience=options.patience,
            polite=POLITE_SECONDS if polite else None,
        )
        output.commit(outcome)
        return outcome.verdict

    begun = on_host(target, options, work, write=True)
    return run(options, begun if dry_run else resuming(target, options, begun))


def resuming(
    target: str, options: Options, begun: "Callable[[Output], Awaitable[str]]"
) -> "Callable[[Output], Awaitable[str]]":
    """The same work, after what an earlier run left of the image TARGET was put right, where that is beyond doubt."""

    async def resumed(output: "Output") -> str:
        from qmpmerge.errors import Unfinished

        try:
            return await begun(output)
        except Unfinished as error:
            from qmpmerge import recovery

            if error.path != target:
                raise
            outcome = await recovery.resume(target, trace=output.trace if options.verbose else None)
        if outcome is None:
            return await begun(output)
        output.commit(outcome)
        return outcome.verdict

    return resumed


@cli.command()
@click.argument("path", type=click.Path())
@click.option(
    "--use",
    type=click.Choice(["base", "top"]),
    help="Where the evidence does not decide: you have looked, and this one holds the last writes.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, change nothing.")
@shared
def recover(path: str, use: "Use | None", dry_run: bool, options: Options) -> int:
    """
    Put names and headers right after a merge was left in the middle.

    PATH is the image that the VM is started from, even if it is not there any more, another image of its chain, or a
    folder. The witness that the merge has left, QEMU where it still runs, the headers and the contents tell which image
    is right; where they do not, nothing is changed and the evidence is shown. Can be run again at any time.

    \b
    Examples:
      qmpmerge recover /vm/c.qcow2 --dry-run
      qmpmerge recover /vm

    \b
    Exit codes:
      0    done, planned, unchanged
      3    refused: another qmpmerge is at work
      4    no session with the QEMU that carried the merge out, and which still runs
      6    unknown: the evidence does not decide, see --use
      7    a job is at work: the command to follow it is printed
    """

    async def work(output: "Output") -> str:
        from qmpmerge import recovery

        trace = output.trace if options.verbose else None
        found = await recovery.recover(path, use=use, dry_run=dry_run, trace=trace)
        output.recovered(found)
        return recovery.verdict_of(found)

    return run(options, work)


@cli.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path())
@click.option("--dry-run", is_flag=True, help="Say what would be removed, change nothing.")
@shared
def clean(paths: tuple[str, ...], dry_run: bool, options: Options) -> int:
    """
    Remove merged files that were stashed, once nobody holds or needs them.

    PATH is a folder, or a file called NAME.merged. What a process has open, what another image is built on, and what a
    merge that was not finished may need, stays.

    \b
    Exit codes: 0 done, planned, unchanged; 3 refused; 6 a file could not be removed.
    """

    async def work(output: "Output") -> str:
        from qmpmerge import cleaning
        from qmpmerge.cli.words import cleaned_verdict

        found = cleaning.clean(paths, dry_run=dry_run)
        output.cleaned(found, dry_run=dry_run)
        return cleaned_verdict(found, dry_run=dry_run)

    return run(options, work)


@cli.command()
@target
@shared
def jobs(target: str, options: Options) -> int:
    """
    List block jobs and what can be done with each.

    All jobs of TARGET are shown, whoever started them.

    \b
    Exit codes: 0, 4 no session with TARGET, 6 it stopped answering.
    """

    async def work(host: "Host", output: "Output") -> str:
        output.jobs(await host.jobs())
        return "done"

    return run(options, on_host(target, options, work, live=True))


VERBS = ("follow", "pivot", "keep", "cancel", "pause", "resume", "speed", "finalize", "dismiss")


@cli.command()
@target
@click.argument("job_id", metavar="ID", shell_complete=completing.jobs)
@click.argument("verb", type=click.Choice(VERBS), metavar="VERB")
@click.argument("speed", type=Size(), required=False, metavar="[SIZE]")
@endings
@finishing
@for_jobs
@converging
@shared
def job(
    target: str,
    job_id: str,
    verb: str,
    speed: int | None,
    ending: "Ending",
    merged_files: "Policy",
    pause: bool,
    polite: bool,
    converge: Help | None,
    options: Options,
) -> int:
    """
    Steer a block job, or go on with a merge that was left.

    \b
    follow    go on with a commit job as if `commit` had started it, to its proved end
    pivot     move the guest onto the base, from a job that is ready
    keep      let the guest keep its overlay, from a job that is ready
    cancel    end the job; the old chain stays in use
    pause     have it stand still, until `resume`
    speed     limit it to SIZE bytes a second, 0 for no limit
    finalize  have a pending job take its last step; a merge is flushed first, as by `follow`
    dismiss   take an ended job out of QEMU's list

    What a job's state does not allow is refused, with what it does allow.

    \b
    Examples:
      qmpmerge job vm1 qmpmerge-commit-vda follow
      qmpmerge job vm1 qmpmerge-commit-vda speed 50M

    \b
    Exit codes: as of `commit`.
    """
    if (verb == "speed") != (speed is not None):
        raise click.UsageError("`speed` takes a SIZE, as in `speed 50M`; the other verbs take none")

    async def work(host: "Host", output: "Output") -> str:
        from qmpmerge import verbs
        from qmpmerge.outcome import Outcome

        done = await verbs.steer(
            host,
            job_id,
            verb,
            speed=speed or 0,
            ending=ending,
            merged_files=merged_files,
            pause=pause,
            converge=converge.told_to(output) if converge else None,
            report=output.progress,
            patience=options.patience,
            polite=POLITE_SECONDS if polite else None,
        )
        if not isinstance(done, Outcome):
            output.steered(job_id, done)
            return "done"
        output.commit(done)
        return done.verdict

    return run(options, on_host(target, options, work, live=True))


@cli.command()
@target
@click.option(
    "--search", multiple=True, metavar="FOLDER", help="Look here too for images that are built on the chain's."
)
@for_images
@shared
def doctor(target: str, search: tuple[str, ...], options: Options) -> int:
    """
    Tell everything that is odd about the chains and jobs of TARGET, and the command that mends each.

    TARGET may also be a folder of images. Nothing is changed. The worst comes first: `harm` is for data or a guest that
    suffer now or at the next start, `care` for what somebody has to decide, `note` for what only takes up room.

    \b
    Examples:
      qmpmerge doctor vm1
      qmpmerge doctor /vm
      qmpmerge doctor vm1 --json | jq -e '.findings == []'

    \b
    Exit codes: 0 whatever is found, 3 refused, 4 no session with TARGET, 6 it stopped answering.
    """

    async def work(output: "Output") -> str:
        from qmpmerge import diskdoctor

        output.doctor(target, await diskdoctor.examine_path(target, allow=options.allow, search=search))
        return "done"

    async def on_live(host: "Host", output: "Output") -> str:
        from qmpmerge import doctor

        output.doctor(target, await doctor.examine(host, search=search))
        return "done"

    from qmpmerge.doors import is_image

    is_path = is_image(target) or os.path.isdir(target)
    return run(options, work if is_path else on_host(target, options, on_live))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """
    Print the completion script of a shell.

    VMs, disks, layers and jobs are completed live.

    \b
    bash   qmpmerge completion bash > ~/.local/share/bash-completion/completions/qmpmerge
    zsh    qmpmerge completion zsh > a file _qmpmerge in a folder of $fpath
    fish   qmpmerge completion fish > ~/.config/fish/completions/qmpmerge.fish
    """
    from click.shell_completion import get_completion_class

    maker = get_completion_class(shell)
    assert maker is not None, "the shells are click's own"
    click.echo(re.sub(r"\n+\Z", "", maker(cli, {}, "qmpmerge", "_QMPMERGE_COMPLETE").source()))
    return 0
