"""
What can be done with a block job that is there, whoever has started it: one call for every verb.
"""

import contextlib
from typing import TYPE_CHECKING, Literal, get_args

from qmpmerge import given
from qmpmerge.chain.chain import Chain
from qmpmerge.chain.outcome import Ending, Outcome, Policy
from qmpmerge.engine import earlier, resume
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.engine.pace.progress import Report
from qmpmerge.errors import ForeignFile, InUse, JobVerb, Locked, Unfinished, VmState, unproven
from qmpmerge.journal import store
from qmpmerge.journal.record import Record
from qmpmerge.operations import follow
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.target import Target

if TYPE_CHECKING:
    from qmpmerge.engine.pace.converge import Converge

Verb = Literal["follow", "pivot", "keep", "cancel", "pause", "resume", "speed", "finalize", "dismiss"]
VERBS: tuple[Verb, ...] = get_args(Verb)


async def control(
    target: Target,
    job_id: str,
    verb: Verb,
    *,
    speed: int = 0,
    ending: Ending = "pivot",
    merged_files: Policy | None = None,
    pause: bool = True,
    converge: "Converge | None" = None,
    report: Report | None = None,
    timeout: float | None = None,
    patience: Patience | None = None,
    polite: float | None = None,
) -> Outcome | Job | None:
    """
    Do one of `VERBS`, where the job's state allows it.

    `job_id` may also be the disk that the job is on. ``follow``, ``pivot`` and ``keep`` bring a commit job, or a pull of ours,
    to a proved end, and so does ``finalize``: it is flushed and compared first, which a plain `job-finalize` would leave out.
    They return an Outcome; the others return the job as it is then, None when it is gone. `speed` is for ``speed``, `ending`
    for ``follow``, what follows as for `commit.commit`.

    Raises NoSuchJob, JobVerb, QemuRefused, Replaced, NotProven, and what `follow.follow` raises.
    """
    given.see(verb, VERBS, "verb")
    given.see_count(speed, "speed")
    job = await target.job(job_id)
    if verb not in job.verbs and not (verb in jobs.FINISHING and job.can_be_followed):
        raise JobVerb(job=job.id, verb=verb, status=job.status, verbs=job.verbs)
    if verb in jobs.FINISHING or (verb == "finalize" and job.can_be_followed):
        ready_for = verb in ("pivot", "keep")
        ending = "keep" if verb == "keep" else "pivot" if verb == "pivot" else ending
        return await follow.follow(
            target,
            job.id,
            ending=ending,
            needs_ready=ready_for,
            merged_files=merged_files,
            pause=pause,
            converge=converge,
            report=report,
            timeout=timeout,
            patience=patience,
            polite=polite,
        )
    if verb == "dismiss":
        await _dismiss(target, job)
        return await jobs.look(target.monitor, job.id)
    if verb == "cancel" and job.can_be_followed:
        await _see_that_it_may_end(target, job.id)
    controlled = await jobs.control(target.monitor, job.id, verb, speed)
    if verb == "cancel" and job.ours:
        with unproven(target.name, f"job {job.id} cancelled, and nothing left of it"):
            await _settle(target, job.id)
    return controlled


async def _see_that_it_may_end(target: Target, job_id: str) -> None:
    """
    QEMU opens what it has written to below the active image by its name again when a job ends (see `LeftDisplaced`), and
    names that a merge of ours took away come back. Raises Replaced, RecordNotBelieved.
    """
    layout = await target.layout()
    edges = layout.job_edges.get(job_id, {})
    for disk in layout.disks:
        if disk.chain is not None and disk.job is not None and disk.job.id == job_id:
            written = edges.get("base", edges.get("target", edges.get("active node", [])))
            base = [image for image in disk.chain.images[:-1] if image.node in written]
            records = store.believed(store.about(disk.chain)) if disk.job.ours else []
            record = earlier.of_job(records, disk.job)
            earlier.refuse_astray(target, await target.view(layout, disk.name), record, *base)


async def _settle(target: Target, job_id: str) -> None:
    """What was written down about a job that was cancelled goes, and names that it had taken away come back."""
    layout = await target.layout()
    for disk in layout.disks:
        if disk.chain is not None:
            records = [record for record in _records(disk.chain) if record.job == job_id]
            with contextlib.suppress(Unfinished, ForeignFile, Locked, VmState, InUse):  # for `recover` to look at
                await resume.settle(target, await target.view(layout, disk.name), records)


def _records(chain: Chain) -> list[Record]:
    return [found for found in store.about(chain) if isinstance(found, Record)]


async def _dismiss(target: Target, job: Job) -> None:
    """QEMU forgets the error with the job; the next merge into the same base must know of it."""
    chains = [disk.chain for disk in await target.disks() if disk.chain is not None] if job.ours and job.reason else []
    records = [record for chain in chains for record in _records(chain)]
    await earlier.dismiss(target, earlier.of_job(records, job), job)
