"""`job`: control a block job."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli import complete, merge_options, options
from qmpmerge.cli.commands import group
from qmpmerge.cli.merge_options import POLITE_SECONDS, Help
from qmpmerge.cli.options import Options, forcing, shared, waiting
from qmpmerge.cli.quantities import Size
from qmpmerge.cli.run import on_target, run

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Ending, Policy
    from qmpmerge.cli.render.output import Output
    from qmpmerge.operations.control import Verb
    from qmpmerge.qemu.jobs import Job
    from qmpmerge.targets.target import Target


SWITCHING = ("merged_files", "no_pause", "timeout")

VERBS: dict[str, tuple[str, ...]] = {
    "follow": (*SWITCHING, *("pivot", "keep_overlay", "hold", "polite", "converge", "converge_pause")),
    "pivot": SWITCHING,
    "keep": ("timeout",),
    "cancel": (),
    "pause": (),
    "resume": (),
    "speed": (),
    "finalize": SWITCHING,
    "dismiss": (),
}
"""What can be done with a job, and which options say how."""


def _only_of_speed(context: click.Context, _: click.Parameter, size: int | None) -> int | None:
    """A line that makes no sense is refused while it is read."""
    if (context.params.get("verb") == "speed") != (size is not None) and not context.resilient_parsing:
        raise click.UsageError("`speed` takes a SIZE, as in `speed 50M`; the other verbs take none", context)
    return size


@group.cli.command()
@options.target
@click.argument("job_id", metavar="ID", shell_complete=complete.jobs)
@click.argument("verb", type=click.Choice([*VERBS]), metavar="VERB")
@click.argument("speed", type=Size(), required=False, metavar="[SIZE]", callback=_only_of_speed)
@merge_options.endings
@merge_options.finishing
@waiting
@merge_options.converging
@forcing("libvirt")
@shared
def job(
    target: str,
    job_id: str,
    verb: "Verb",
    speed: int | None,
    pivot: bool,
    ending: "Ending",
    merged_files: "Policy | None",
    pause: bool,
    polite: bool,
    converge: Help | None,
    options: Options,
) -> int:
    """
    Control a block job, or go on with an interrupted merge.

    ID is the job's, as `qmpmerge jobs` shows it, or the disk that it is on. VERB is one of:

    \b
    follow    go on with a merge as if `commit` had started it, to its proved end
    pivot     move the guest onto the base; the merge must be ready
    keep      let the guest keep its overlay; the merge must be ready
    cancel    end the job; the old chain stays in use
    pause     let it stand still
    resume    let a paused job go on
    speed     limit it to SIZE bytes a second, as in `speed 50M`; 0 for no limit
    finalize  let a job that waits for it (pending) take its last step; before
              that a merge is made durable, as by `follow`
    dismiss   take an ended job out of QEMU's list

    What the job's state does not allow is refused, and what it does allow is said. The options below are for `follow`;
    `pivot` and `finalize` take --merged-files, --no-pause and --timeout, and `keep` takes --timeout.

    \b
    Examples:
      qmpmerge job vm1 vda follow
      qmpmerge job vm1 qmpmerge-commit-vda speed 50M

    \b
    Exit codes:
      0    done, merged, pivoted, pulled, kept, ready, held
      3    refused: nothing was changed
      4    no session with TARGET: nothing was changed
      5    the job failed: the old chain is in use and right
      6    unknown: the outcome is not proven
      7    the job goes on in QEMU: --timeout passed, or we have left it
      130  cancelled by Ctrl-C: the old chain is in use
    """
    _refuse_ignored(click.get_current_context(), verb)

    async def work(target: "Target", output: "Output") -> str:
        from qmpmerge.chain.outcome import Outcome
        from qmpmerge.operations import control

        job = await target.job(job_id)
        if pivot and job.disk is not None and job.can_be_followed:
            await _refuse_below_active(target, job)
        done = await control.control(
            target,
            job.id,
            verb,
            speed=speed or 0,
            ending=ending,
            merged_files=merged_files,
            pause=pause,
            converge=converge.reporting_to(output) if converge else None,
            report=output.progress,
            patience=options.patience,
            polite=POLITE_SECONDS if polite else None,
        )
        if not isinstance(done, Outcome):
            output.controlled(job.id, verb, done)
            return "done"
        output.commit(done)
        return done.verdict

    return run(options, on_target(target, options, work, live=True))


async def _refuse_below_active(target: "Target", job: "Job") -> None:
    """As of `commit`: only a merge of the active image can end as `--pivot` says."""
    from qmpmerge.engine import earlier
    from qmpmerge.errors import ActiveOnly

    view = await target.chain(job.disk)
    planned = earlier.plan_of(view, job)
    if planned is not None and not planned.pivots:
        raise ActiveOnly(option="--pivot", top=planned.top.file, active=view.chain.active.file)


def _refuse_ignored(context: click.Context, verb: str) -> None:
    """An option that the verb would not heed is a mistake of the user's."""
    for name in sorted({option for heeded in VERBS.values() for option in heeded} - {*VERBS[verb]}):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"`{verb}` has no use for --{name.replace('_', '-')}")
