"""
Merging: what to send, in which order.

    intermediate    plan -> checks -> block-commit -> PENDING -> flush base -> job-finalize -> flush overlay -> proof
    active          plan -> checks -> block-commit -> READY -> job-complete -> proof

A plain `block-commit` is not safe; each step here avoids a harm that tests/test_merge.py pins. An intermediate merge
waits at PENDING until base is durable, since QEMU rewrites the overlay's header first and flushes afterwards. An active
merge is never held there: it would freeze the guest.

Success is read back: a fresh discovery of the graph and the header on disk must equal `plan.result`, or the outcome is
*unknown*.
"""

import asyncio
import contextlib
import shlex
import time
from collections.abc import Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from qmpmerge import checks, durable, jobs, locks, plan, qemuimg, shield
from qmpmerge.blockgraph import Disk
from qmpmerge.chain import Chain
from qmpmerge.errors import (
    CommandError,
    FlushUnavailable,
    HeaderNotDurable,
    ImageUnreadable,
    JobFailed,
    JobVerb,
    LiveOnly,
    NoSuchJob,
    NotDurable,
    NotProven,
    NotVerified,
    QemuRefused,
    StillRunning,
    TimedOut,
    Untouched,
)
from qmpmerge.hosts import ChainView, Host
from qmpmerge.jobs import Job, Meter, Report
from qmpmerge.monitor import Doorbell
from qmpmerge.plan import CommitPlan

CANCEL_SECONDS = 60.0
LOOKS = 5
"""How often a job to be followed is looked for again when it has moved on between two questions."""
CHEAP_BYTES = 256 * 1024 * 1024
"""Up to this much allocated data in the whole chain, base and top are compared unless the user says no."""

Ending = Literal["pivot", "keep", "ready"]
"""
How an active merge ends: the guest moves onto base; or it keeps the overlay, base having all data of this moment; or the
job stays ready, mirroring every write, until someone ends it.
"""


@dataclass(frozen=True)
class MergedFile:
    """An image that is no longer part of the chain: what was done with its file, and where it is now."""

    file: str
    action: str = "keep"
    now: str | None = None


@dataclass(frozen=True)
class Outcome:
    """
    What a merge came to; only proved outcomes are made into one.

    `before` and `after` are chains as discovered. `copied` is bytes, None where QEMU does not count them (an intermediate
    merge counts what it walked). `verified` says that base and top were compared before the switch. `hints` are sentences
    for the user.
    """

    verdict: str
    disk: str
    before: Chain
    after: Chain
    job: str | None = None
    merged: tuple[MergedFile, ...] = ()
    copied: int | None = None
    seconds: float = 0.0
    hints: tuple[str, ...] = ()
    verified: bool = False


@dataclass
class _Merge:
    """One merge under way: the values that every step needs."""

    host: Host
    disk: Disk
    plan: CommitPlan
    ending: Ending
    report: Report
    deadline: float | None
    old_nodes: list[str]
    base_driver: str
    job: str
    verify: bool | None
    verified: bool = False
    base_is_durable: bool = False
    copied: int | None = None
    started: float = field(default_factory=time.monotonic)


async def commit(
    host: Host,
    disk: str | None = None,
    *,
    base: str | None = None,
    top: str | None = None,
    shallow: bool = False,
    ending: Ending = "pivot",
    speed: int = 0,
    verify: bool | None = None,
    force: Collection[str] = (),
    search: Collection[str] = (),
    dry_run: bool = False,
    report: Report = lambda progress: None,
    timeout: float | None = None,
) -> Outcome:
    """
    Merge the images above `base` up to `top` into `base`; by default the whole chain, the guest moving onto its base.

    `verify` compares what base shows with what top shows, in another process, before anything is switched; None does so
    where it is cheap. An active merge is not compared while a guest can write. `force` and `search` are those of
    `checks.check`. `speed` is bytes a second, 0 for unlimited; `timeout` seconds, after which StillRunning is raised and
    the job goes on.

    Cancelling the task cancels the job and waits until the old chain is back; from the switch to the proof it waits.

    Raises subclasses of Refused before anything is sent, of Failed when the job failed, of Unknown when the outcome
    could not be proved.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    view = await host.chain(disk)
    planned = plan.commit(view.chain, disk=view.disk.name, base=base, top=top, shallow=shallow)
    if planned.is_empty:
        return Outcome("unchanged", view.disk.name, view.chain, view.chain)
    if ending == "ready" and not host.is_live:
        raise LiveOnly(option="--wait-ready")
    with locks.held(planned.base):
        await checks.check(host, view, planned, force=force, search=search)
        if dry_run:
            return Outcome("planned", view.disk.name, planned.chain, planned.result, merged=_merged_files(planned))
        merge = _begin(host, view, planned, ending, report, deadline, verify)
        async with host.monitor.listening() as doorbell:
            return await _run(merge, doorbell, starting=_start(merge, speed))


async def follow(
    host: Host,
    job_id: str,
    *,
    ending: Ending = "pivot",
    needs_ready: bool = False,
    report: Report = lambda progress: None,
    timeout: float | None = None,
) -> Outcome:
    """
    Go on with a commit job that is there already, as if `commit` had started it: the plan is read from the block graph.

    `needs_ready` refuses a job that is not ready yet instead of waiting for it. Raises NoSuchJob, JobVerb, and all that
    `commit` raises once its job runs.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    ready_for = ending if needs_ready else None
    job = await _job_to_follow(host, job_id, ready_for)
    for _ in range(LOOKS):
        if job.status == "concluded":
            await _read_concluded(host, job)
        view = await host.chain(job.disk)
        planned = _plan_of(view, job)
        if planned is not None:
            break
        job = await _job_to_follow(host, job_id, ready_for)
    else:
        raise JobVerb(job=job.id, verb="follow", status="at work on nodes that are not of one chain", verbs=["cancel"])
    merge = _begin(host, view, planned, ending, report, deadline)
    with locks.held(planned.base):
        async with host.monitor.listening() as doorbell:
            return await _run(merge, doorbell)


async def _job_to_follow(host: Host, job_id: str, ready_for: Ending | None) -> Job:
    layout = await host.layout()
    job = next((job for job in layout.jobs if job.id == job_id), None)
    if job is None:
        raise NoSuchJob(job=job_id, target=host.target, known=[job.id for job in layout.jobs])
    if job.type != "commit" or (ready_for is not None and job.status != "ready"):
        raise JobVerb(job=job.id, verb=ready_for or "follow", status=f"{job.status} ({job.type})", verbs=job.verbs)
    if job.disk is None and job.status != "concluded":
        raise JobVerb(job=job.id, verb="follow", status="on a disk that QEMU does not tell", verbs=["cancel"])
    return job


def _plan_of(view: ChainView, job: Job) -> CommitPlan | None:
    """The plan that a running commit job carries out, read from the nodes it holds; None when it has just ended."""
    edges = view.layout.job_edges.get(job.id, {})
    if "target" in edges:
        base, top = edges["target"][0], edges["source"][0]
    elif "base" in edges:
        base, top = edges["base"][0], edges["intermediate node"][0]
    else:
        return None
    inside = [image.node for image in view.chain]
    if base not in inside or top not in inside:
        return None
    if "base" in edges:
        top = next(node for node in reversed(inside) if node in edges["intermediate node"]) or top
    return plan.commit(view.chain, disk=view.disk.name, base=base, top=top)


async def _read_concluded(host: Host, job: Job) -> NoReturn:
    """
    A job that ended while nobody looked: its error is told, the chain is shown as it is now, nothing is claimed.

    Without an error it may have switched or been let go, durably or not: what it was to do is not known any more.
    """
    layout = await host.layout()
    disk = next((disk for disk in layout.disks if disk.name == job.disk or jobs.job_id(disk.name) == job.id), None)
    await jobs.dismiss(host.monitor, job.id)
    if job.error is not None:
        raise JobFailed(job=job.id, reason=job.error)
    found = f"that it had ended before we looked; the chain now is {disk.chain if disk else 'unknown'}"
    raise NotProven(target=host.target, expected=f"job {job.id} at work", found=found)


def _begin(
    host: Host,
    view: ChainView,
    planned: CommitPlan,
    ending: Ending,
    report: Report,
    deadline: float | None,
    verify: bool | None = None,
) -> _Merge:
    below = set(view.layout.subtree(planned.base.node or ""))
    return _Merge(
        host=host,
        disk=view.disk,
        plan=planned,
        ending=ending,
        report=report,
        deadline=deadline,
        old_nodes=[node for node in view.layout.subtree(planned.top.node or "") if node not in below],
        base_driver=view.layout.nodes[planned.base.node or ""].driver,
        verify=verify,
        job=view.disk.job.id if view.disk.job else jobs.job_id(view.disk.name),
    )


async def _start(merge: _Merge, speed: int) -> None:
    """Send block-commit: nodes always by name, the backing string always given, nothing ended behind our back."""
    planned, monitor = merge.plan, merge.host.monitor
    arguments: dict[str, Any] = {
        "job_id": merge.job,
        "device": merge.disk.root,
        "top_node": planned.top.node,
        "base_node": planned.base.node,
        "speed": speed,
        "on_error": "enospc",
        "auto_dismiss": False,
    }
    if not planned.pivots:
        arguments |= {"backing_file": planned.backing_name, "auto_finalize": False}
        if merge.base_driver != planned.base.format and await monitor.accepts("block-commit", "backing-mask-protocol"):
            arguments["backing_mask_protocol"] = True
    try:
        await monitor.execute("block-commit", **arguments)
    except CommandError as error:
        raise QemuRefused(command="block-commit", reason=error.description) from None


async def _run(merge: _Merge, doorbell: Doorbell, *, starting: Coroutine[None, None, None] | None = None) -> Outcome:
    """
    From a job that is being started, or runs, to a proved outcome.

    Cancelled before the switch it takes the job back, even one whose start was not confirmed yet; after it, it waits.
    """
    mine = starting is not None or merge.job.startswith(jobs.PREFIX)
    try:
        if starting is not None:
            await starting
        return await _to_the_end(merge, doorbell)
    except asyncio.CancelledError:
        if not mine:  # leaving somebody else's job is not ending it
            raise StillRunning(target=merge.host.target, job=merge.job) from None
        await shield.finished(_take_back(merge, doorbell))
        raise
    except StillRunning:
        if merge.host.is_live:
            option = {"pivot": "", "keep": " --keep-overlay", "ready": " --wait-ready"}[merge.ending]
            raise StillRunning(target=merge.host.target, job=merge.job, option=option) from None
        await shield.finished(_take_back(merge, doorbell))
        raise TimedOut(job=merge.job) from None


async def _to_the_end(merge: _Merge, doorbell: Doorbell) -> Outcome:
    """What cannot be looked at once the job was started is not refused, as if nothing had been done: it is unknown."""
    try:
        job = await _copy(merge, doorbell)
        if job is not None and job.status == "ready" and merge.ending == "ready":
            return _ready(merge)
        if job is not None and job.status == "pending":
            await _make_base_durable(merge, doorbell)
            await _verify(merge, doorbell)
        elif job is not None and _is_at_rest(merge, job):
            await _verify(merge, doorbell)  # an active job has flushed base before it says that it is ready
        return await shield.finished(_switch(merge, doorbell, job))
    except Untouched as error:
        found = f"no way to look: {error}"
        raise NotProven(target=merge.host.target, expected=str(merge.plan.result), found=found) from None


async def _copy(merge: _Merge, doorbell: Doorbell) -> Job | None:
    """Follow the job until it wants a decision, or is over."""
    meter = Meter(merge.disk.name, "copied" if merge.plan.pivots else "scanned")

    def tell(job: Job) -> None:
        merge.copied = job.done
        merge.report(meter.read(job))

    return await jobs.follow(
        merge.host.monitor,
        doorbell,
        merge.job,
        ("ready", "pending", "concluded"),
        tell=tell,
        deadline=merge.deadline,
    )


def _ready(merge: _Merge) -> Outcome:
    command = f"qmpmerge job {shlex.quote(merge.host.target)} {merge.job}"
    hints = (f"every write now goes to both images; `{command} pivot`, `{command} keep` or `{command} cancel` ends it",)
    return _outcome(merge, "ready", merge.plan.chain, hints)


async def _make_base_durable(merge: _Merge, doorbell: Doorbell) -> None:
    """At PENDING, before the overlay's header is rewritten; where it fails the job is taken back."""
    try:
        every_error_seen = await durable.flush(merge.host.monitor, merge.plan.base)
        merge.verify = merge.verify if every_error_seen else True
        merge.base_is_durable = True
    except (NotDurable, FlushUnavailable) as error:
        await shield.finished(_take_back(merge, doorbell))
        reason = error.reason
        raise NotDurable(node=merge.plan.base.file, reason=reason) from None


def _is_at_rest(merge: _Merge, job: Job) -> bool:
    """Whether nobody can write to the disk of a job that is ready: only then base and top can be compared."""
    return job.status == "ready" and not merge.host.is_live


async def _verify(merge: _Merge, doorbell: Doorbell) -> None:
    """Compare what top shows with what base shows, while both still exist; a difference takes the job back."""
    if merge.verify is False or (merge.verify is None and not _is_cheap(merge.plan)):
        return
    upto = merge.plan.chain.images[: merge.plan.chain.index(merge.plan.top)]
    below = merge.plan.chain.images[: merge.plan.chain.index(merge.plan.base)]
    try:
        same = await qemuimg.same(upto, below)
    except ImageUnreadable as error:
        if merge.verify is None:
            return
        same, reason = False, error.reason
    else:
        reason = "they show different data"
    if not same:
        await shield.finished(_take_back(merge, doorbell))
        raise NotVerified(base=merge.plan.base.file, top=merge.plan.top.file, reason=reason)
    merge.verified = True


def _is_cheap(planned: CommitPlan) -> bool:
    """Whether all that the comparison can have to read is little."""
    sizes = [image.allocated for image in planned.chain]
    return None not in sizes and sum(size or 0 for size in sizes) <= CHEAP_BYTES


async def _take_back(merge: _Merge, doorbell: Doorbell) -> None:
    """Cancel the job and see that the old chain is in use. Raises NotProven where it is not."""
    monitor = merge.host.monitor
    with contextlib.suppress(CommandError):  # it may have ended by itself
        await monitor.execute("job-cancel", id=merge.job)
    try:
        job = await jobs.follow(
            monitor,
            doorbell,
            merge.job,
            ("concluded",),
            tell=lambda job: None,
            deadline=time.monotonic() + CANCEL_SECONDS,
        )
        if job is not None:
            await jobs.dismiss(monitor, merge.job)
    except StillRunning:
        raise NotProven(target=merge.host.target, expected="the job cancelled", found="it still running") from None
    await _prove_old_chain(merge)


async def _prove_old_chain(merge: _Merge) -> None:
    after = await merge.host.chain(_name_after(merge, merge.plan.chain))
    if not after.chain.same_files(merge.plan.chain):
        raise NotProven(target=merge.host.target, expected=str(merge.plan.chain), found=str(after.chain))


async def _switch(merge: _Merge, doorbell: Doorbell, job: Job | None) -> Outcome:
    """The point of no return, and the proof."""
    keeps = job is not None and job.status == "ready" and merge.ending == "keep"
    if job is not None and job.status != "concluded":
        job = await _end(merge, doorbell, job.status, keeps)
    if job is not None:
        await jobs.dismiss(merge.host.monitor, merge.job)
        if job.error is not None:
            await _prove_old_chain(merge)
            raise JobFailed(job=merge.job, reason=job.error)
    if keeps:
        return await _prove(merge, "kept", merge.plan.chain)
    if merge.plan.overlay is not None:
        await _make_overlay_durable(merge)
    await _delete_nodes(merge)
    return await _prove(merge, "pivoted" if merge.plan.pivots else "merged", merge.plan.result)


async def _end(merge: _Merge, doorbell: Doorbell, status: str, keeps: bool) -> Job | None:
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


async def _make_overlay_durable(merge: _Merge) -> None:
    """And base, where somebody else ended the job before we could flush it."""
    assert merge.plan.overlay is not None
    try:
        if not merge.base_is_durable:
            await durable.flush(merge.host.monitor, merge.plan.base)
        await durable.flush(merge.host.monitor, merge.plan.overlay)
    except (NotDurable, FlushUnavailable) as error:
        raise HeaderNotDurable(target=merge.host.target, overlay=merge.plan.overlay.file, reason=error.reason) from None


async def _delete_nodes(merge: _Merge) -> None:
    """Close what explicit -blockdev nodes the merge left open, top down; nodes of -drive are gone by themselves."""
    present = (await merge.host.layout()).nodes
    for node in merge.old_nodes:
        if node in present and not node.startswith("#"):
            with contextlib.suppress(CommandError):  # gone with its parent, or in use by somebody else
                await merge.host.monitor.execute("blockdev-del", node_name=node)


async def _prove(merge: _Merge, verdict: str, expected: Chain) -> Outcome:
    """A fresh look at graph and headers must show what was expected, else the outcome is unknown."""
    view = await merge.host.chain(_name_after(merge, expected))
    if not _is_shown(merge, expected, view.chain):
        raise NotProven(target=merge.host.target, expected=_told(expected), found=_told(view.chain))
    left = [node for node in merge.old_nodes if node in view.layout.nodes and verdict != "kept"]
    hints = [*_advice(merge, verdict)]
    if left:
        hints.append(f"still open in QEMU, in use by somebody else: {', '.join(left)}")
    return _outcome(merge, verdict, view.chain, tuple(hints))


def _is_shown(merge: _Merge, expected: Chain, found: Chain) -> bool:
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


def _name_after(merge: _Merge, expected: Chain) -> str:
    """What the disk is called once its active image may have changed."""
    return merge.disk.drive or merge.disk.qdev or expected.active.node or expected.active.file


def _advice(merge: _Merge, verdict: str) -> list[str]:
    if verdict == "kept":
        return [f"{merge.plan.base.file} held all data at the moment it was let go; the guest writes to the overlay"]
    if verdict == "pivoted":
        base, old = merge.plan.base.file, merge.plan.top.file
        return [f"start the VM from {base} from now on: {old} opens without a word and shows older data"]
    return ["the merged files can be deleted once no other image is built on them"]


def _merged_files(planned: CommitPlan) -> tuple[MergedFile, ...]:
    return tuple(MergedFile(image.file, now=image.file) for image in planned.merged)


def _outcome(merge: _Merge, verdict: str, after: Chain, hints: tuple[str, ...]) -> Outcome:
    return Outcome(
        verdict=verdict,
        disk=merge.disk.name,
        before=merge.plan.chain,
        after=after,
        job=merge.job,
        merged=_merged_files(merge.plan) if verdict in ("merged", "pivoted") else (),
        copied=merge.copied if merge.plan.pivots else None,
        seconds=time.monotonic() - merge.started,
        hints=hints,
        verified=merge.verified,
    )
