"""`job`: control a block job."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli import complete, options
from qmpmerge.cli.commands import group
from qmpmerge.cli.options import POLITE_SECONDS, Help, Options, Size, converging, for_jobs, shared
from qmpmerge.cli.run import on_target, run

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Ending, Policy
    from qmpmerge.cli.render.output import Output
    from qmpmerge.targets.target import Target


VERBS = ("follow", "pivot", "keep", "cancel", "pause", "resume", "speed", "finalize", "dismiss")


@group.cli.command()
@options.target
@click.argument("job_id", metavar="ID", shell_complete=complete.jobs)
@click.argument("verb", type=click.Choice(VERBS), metavar="VERB")
@click.argument("speed", type=Size(), required=False, metavar="[SIZE]")
@options.endings
@options.finishing
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
    Control a block job, or resume an interrupted merge.

    \b
    follow    go on with a commit job as if `commit` had started it, to its proved end
    pivot     move the guest onto the base, from a job that is ready
    keep      let the guest keep its overlay, from a job that is ready
    cancel    end the job; the old chain stays in use
    pause     have it stand still, until `resume`
    resume    let it go on
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

    async def work(target: "Target", output: "Output") -> str:
        from qmpmerge.chain.outcome import Outcome
        from qmpmerge.operations import control

        done = await control.control(
            target,
            job_id,
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
            output.controlled(job_id, done)
            return "done"
        output.commit(done)
        return done.verdict

    return run(options, on_target(target, options, work, live=True))
