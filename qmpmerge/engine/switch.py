"""
The point of no return, and the proof: a fresh discovery must show what was planned, or the outcome is *unknown*.
"""

from qmpmerge.chain.outcome import Outcome
from qmpmerge.engine import blockjob, journaling, proof
from qmpmerge.engine.operation import Merge
from qmpmerge.engine.take_back import failure, prove_old_chain, take_back
from qmpmerge.errors import FlushUnavailable, HeaderNotDurable, NotDurable, NotWitnessed
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell


async def switch(merge: Merge, doorbell: Doorbell, job: Job | None) -> Outcome:
    """The point of no return, and the proof; for an active merge that moved already, the proof."""
    merge.switching = True
    merge.let_go = merge.let_go or (job is not None and job.status == "ready" and merge.ending == "keep")
    if job is not None and job.status != "concluded":
        if not merge.plan.pivots:
            await _write_down(merge, doorbell)
        job = await blockjob.end(merge, doorbell, job.status, keeps=merge.let_go)
    if job is not None:
        await jobs.dismiss(merge.host.monitor, merge.job)
        if job.error is not None:
            await prove_old_chain(merge)
            raise failure(merge, job.error)
    if merge.let_go:
        return await proof.prove(merge, "kept", merge.plan.chain)
    if merge.plan.overlay is not None:
        await _make_overlay_durable(merge)
    await merge.host.close(merge.old_nodes)  # what explicit -blockdev nodes the merge left open
    return await proof.prove(merge, "pivoted" if merge.plan.pivots else "merged", merge.plan.result)


async def _write_down(merge: Merge, doorbell: Doorbell) -> None:
    try:
        journaling.note(merge, "switching")
        journaling.sync(merge)
    except OSError as error:
        await take_back(merge, doorbell)
        path = merge.witness.path if merge.witness else ""
        raise NotWitnessed(path=path, reason=error.strerror or str(error)) from None


async def _make_overlay_durable(merge: Merge) -> None:
    """And base, where somebody else ended the job before we could flush it."""
    assert merge.plan.overlay is not None
    try:
        if not merge.base_is_durable:
            await merge.flush(merge.plan.base)
        await merge.flush(merge.plan.overlay)
    except (NotDurable, FlushUnavailable) as error:
        raise HeaderNotDurable(target=merge.host.target, overlay=merge.plan.overlay.file, reason=error.reason) from None
