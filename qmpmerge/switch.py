"""
The point of no return, and the proof: a fresh discovery must show what was planned, or the outcome is *unknown*.
"""

import contextlib
import shlex
import time

from qmpmerge import durable, jobs
from qmpmerge.chain import Chain
from qmpmerge.errors import CommandError, FlushUnavailable, HeaderNotDurable, JobFailed, NotDurable, NotProven
from qmpmerge.jobs import Job
from qmpmerge.monitor import Doorbell
from qmpmerge.outcome import MergedFile, Outcome
from qmpmerge.plan import CommitPlan
from qmpmerge.steps import Merge, prove_old_chain


async def switch(merge: Merge, doorbell: Doorbell, job: Job | None) -> Outcome:
    """The point of no return, and the proof."""
    keeps = job is not None and job.status == "ready" and merge.ending == "keep"
    if job is not None and job.status != "concluded":
        job = await _end(merge, doorbell, job.status, keeps)
    if job is not None:
        await jobs.dismiss(merge.host.monitor, merge.job)
        if job.error is not None:
            await prove_old_chain(merge)
            raise JobFailed(job=merge.job, reason=job.error)
    if keeps:
        return await _prove(merge, "kept", merge.plan.chain)
    if merge.plan.overlay is not None:
        await _make_overlay_durable(merge)
    await _delete_nodes(merge)
    return await _prove(merge, "pivoted" if merge.plan.pivots else "merged", merge.plan.result)


async def _end(merge: Merge, doorbell: Doorbell, status: str, keeps: bool) -> Job | None:
    """Tell the job to end, and wait until it has."""
    monitor = merge.host.monitor
    while True:
        try:
            if status == "pending":
                await monitor.execute("job-finalize", id=merge.job)
            elif keeps:
                await monitor.execute("block-job-cancel", device=merge.job, force=False)
            else:
                await monitor.execute("job-complete", id=merge.job)
            # Somebody else's active job may want to be finalized too, and the guest stands still until it is.
            wanted: tuple[str, ...] = ("concluded", "pending") if status == "ready" else ("concluded",)
        except CommandError:
            # A drain by somebody else can put a ready job into standby for a moment: wait for it and say it again.
            # A pending job of ours is on its way already.
            wanted = ("concluded", status) if status == "ready" else ("concluded",)
            await doorbell.wait(jobs.LOOK_AGAIN_SECONDS / 5)
        deadline = merge.deadline if merge.host.is_live else None
        job = await jobs.follow(monitor, doorbell, merge.job, wanted, tell=lambda job: None, deadline=deadline)
        if job is None or job.status == "concluded":
            return job
        status = job.status


async def _make_overlay_durable(merge: Merge) -> None:
    """And base, where somebody else ended the job before we could flush it."""
    assert merge.plan.overlay is not None
    try:
        if not merge.base_is_durable:
            await durable.flush(merge.host.monitor, merge.plan.base)
        await durable.flush(merge.host.monitor, merge.plan.overlay)
    except (NotDurable, FlushUnavailable) as error:
        raise HeaderNotDurable(target=merge.host.target, overlay=merge.plan.overlay.file, reason=error.reason) from None


async def _delete_nodes(merge: Merge) -> None:
    """Close what explicit -blockdev nodes the merge left open, top down; nodes of -drive are gone by themselves."""
    named = [node for node in merge.old_nodes if not node.startswith("#")]
    present = (await merge.host.layout()).nodes if named else {}
    for node in named:
        if node in present:
            with contextlib.suppress(CommandError):  # gone with its parent, or in use by somebody else
                await merge.host.monitor.execute("blockdev-del", node_name=node)


async def _prove(merge: Merge, verdict: str, expected: Chain) -> Outcome:
    """A fresh look at graph and headers must show what was expected, else the outcome is unknown."""
    view = await merge.host.chain(merge.name_after(expected))
    if not _is_shown(merge, expected, view.chain):
        raise NotProven(target=merge.host.target, expected=_told(expected), found=_told(view.chain))
    left = [node for node in merge.old_nodes if node in view.layout.nodes and verdict != "kept"]
    hints = [*_advice(merge, verdict)]
    if left:
        hints.append(f"still open in QEMU, in use by somebody else: {', '.join(left)}")
    return _outcome(merge, verdict, view.chain, tuple(hints))


def _is_shown(merge: Merge, expected: Chain, found: Chain) -> bool:
    if not found.same_files(expected):
        return False
    overlay = merge.plan.overlay
    if overlay is None or expected is not merge.plan.result:
        return True
    image = found[expected.index(expected.find(overlay.node or overlay.file))]
    formats = {merge.plan.base.format, merge.base_driver}
    return image.backing == merge.plan.backing_name and image.backing_format in formats


def _told(chain: Chain) -> str:
    return " <-- ".join(f"{image.file} (backing {image.backing})" if image.backing else image.file for image in chain)


def _advice(merge: Merge, verdict: str) -> list[str]:
    if verdict == "kept":
        return [f"{merge.plan.base.file} held all data at the moment it was let go; the guest writes to the overlay"]
    if verdict == "pivoted":
        base, old = merge.plan.base.file, merge.plan.top.file
        return [f"start the VM from {base} from now on: {old} opens without a word and shows older data"]
    return ["the merged files can be deleted once no other image is built on them"]


def merged_files(planned: CommitPlan) -> tuple[MergedFile, ...]:
    """The images that the chain loses, base first, each still in its place."""
    return tuple(MergedFile(image.file, now=image.file) for image in planned.merged)


def _outcome(merge: Merge, verdict: str, after: Chain, hints: tuple[str, ...]) -> Outcome:
    return Outcome(
        verdict=verdict,
        disk=merge.disk.name,
        before=merge.plan.chain,
        after=after,
        job=merge.job,
        merged=merged_files(merge.plan) if verdict in ("merged", "pivoted") else (),
        copied=merge.copied if merge.plan.pivots else None,
        seconds=time.monotonic() - merge.started,
        hints=hints,
        verified=merge.verified,
    )


def ready(merge: Merge) -> Outcome:
    """The outcome of a merge that was to stop at ready."""
    command = f"qmpmerge job {shlex.quote(merge.host.target)} {merge.job}"
    hints = (f"every write now goes to both images; `{command} pivot`, `{command} keep` or `{command} cancel` ends it",)
    return _outcome(merge, "ready", merge.plan.chain, hints)
