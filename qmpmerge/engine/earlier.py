"""
What was begun before us on a disk: the job of a qmpmerge that is gone, and the record that it left.

A job belongs to QEMU, so whoever comes next goes on from where it stands.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Image
from qmpmerge.chain.plan import Plan
from qmpmerge.engine.pace.progress import Progress, Report
from qmpmerge.errors import Busy, CannotRecord, Locked, Overtaken, Suspect, refuse
from qmpmerge.images import files
from qmpmerge.journal import locks, store
from qmpmerge.qemu import jobs, mutex
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets import identity
from qmpmerge.targets.target import ChainView, Target

if TYPE_CHECKING:
    from qmpmerge.journal.record import Record


def plan_of(view: ChainView, job: Job) -> Plan | None:
    """The plan that a running job carries out, read from the nodes it holds; None when it has just ended."""
    edges = view.layout.job_edges.get(job.id, {})
    merged = edges.get("intermediate node", ())
    if job.type == "stream":
        return _pull_of(view, edges.get("active node", ()), merged)
    if {"target", "source"} <= edges.keys():
        base, top = edges["target"][0], edges["source"][0]
    elif "base" in edges:
        base = edges["base"][0]
        top = next((image.node or "" for image in reversed(view.chain.images) if image.node in merged), "")
    else:
        return None
    inside = [image.node for image in view.chain]
    if base not in inside or top not in inside:
        return None
    planned = plan.commit(view.chain, disk=view.disk.name, base=base, top=top)
    refuse(planned.refusals)
    return planned


def _pull_of(view: ChainView, into: Sequence[str], merged: Sequence[str]) -> Plan | None:
    """By the nodes that a stream job pulls into, and from."""
    indexes = [index for index, image in enumerate(view.chain, 1) if image.node in merged]
    overlay = next((image for image in view.chain if image.node in into), None)
    if not indexes or overlay is None:
        return None
    planned = plan.between("pull", view.chain, min(indexes) - 1, view.chain.index(overlay) - 1)
    refuse(planned.refusals)
    return planned


def leaves_header(view: ChainView, planned: Plan, job: Job) -> bool:
    """Whether a commit job, of somebody else, will not rewrite the overlay's header: see `Layout.filters_below`."""
    if planned.overlay is None or job.type != "commit" or job.status == "concluded":
        return False
    merged = view.layout.job_edges.get(job.id, {}).get("intermediate node", ())
    return any(node not in merged for node in view.layout.filters_below(view.disk, planned.overlay))


def under_way(view: ChainView, planned: Plan) -> Job | None:
    """The job of ours on this disk that carries out this very plan."""
    job = view.disk.job
    if job is None or not job.ours or not job.can_be_followed or job.status == "concluded":
        return None
    running = plan_of(view, job)
    same = running is not None and (running.direction, running.base, running.top) == (
        planned.direction,
        planned.base,
        planned.top,
    )
    return job if same else None


def of_job(records: "Sequence[Record]", job: Job) -> "Record | None":
    """The record of the merge that this job carries out."""
    return next((record for record in records if record.job == job.id), None)


def as_left(record: "Record | None") -> "Record | None":
    """The record as it is now that its lock is held. Raises Overtaken, also where it is gone: its merge was ended meanwhile."""
    now = store.again(record) if record is not None else None
    if record is not None and now is None:
        raise Overtaken(image=record.chain.active.file)
    return now


async def without_concluded(target: Target, view: ChainView, records: "Sequence[Record]", report: Report) -> ChainView:
    """
    Read and dismiss a commit job of ours on this disk that ended while nobody looked, and return the view without it.

    That it ended well is told, and not believed: what was asked for is proved, or done, all the same.
    """
    ours = (view.disk.job.id if view.disk.job else "", jobs.job_id(view.disk.name))
    job = next((job for job in view.layout.jobs if job.id in ours and job.ours and job.status == "concluded"), None)
    if job is None or job.type != "commit":
        return view
    record = of_job(records, job)
    what = f"had failed ({job.reason})" if job.reason else "had ended"
    report(_progress(view, job, f"job {job.id} {what} while nobody looked{_since(record)}; it is dismissed"))
    await dismiss(target, record, job)
    return await target.chain(view.disk.name)


async def dismiss(target: Target, record: "Record | None", job: Job) -> None:
    """Take a concluded job away. An error that it ended with is noted beside base: QEMU forgets it now. Raises CannotRecord."""
    if record is not None and job.reason not in (None, jobs.CANCELED):
        with contextlib.suppress(Locked), locks.taken_for(record.plan) as lock:
            try:
                lock.suspect(job.reason or "")
            except OSError as error:
                raise CannotRecord(path=lock.path, reason=error.strerror or str(error)) from None
    await jobs.dismiss(target.monitor, job.id)


def going_on(view: ChainView, job: Job, record: "Record | None", speed: int | None = None) -> Progress:
    """The report that we go on with a job, whose limit stays where no other `speed` is asked for."""
    paused = ", where it waits to be resumed" if job.status in ("paused", "standby") and not job.has_no_space else ""
    limited = f", limited to {job.speed} bytes a second (`--speed 0` lifts that)" if speed is None and job.speed else ""
    what = f"going on, it is {job.status}{paused}{limited}"
    return _progress(view, job, f"job {job.id} is at work on this already{_since(record)}: {what}")


def _progress(view: ChainView, job: Job, note: str) -> Progress:
    counts = "copied" if job.ready else "found"
    return Progress(view.disk.name, job, counts, note=note)


def _since(record: "Record | None") -> str:
    if record is None:
        return ""
    return f" (begun {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.since))})"


def refuse_displaced(target: Target, view: ChainView, record: "Record | None", planned: Plan) -> None:
    """
    Before a job at work is gone on with: `refuse_astray` for what links the new chain; and an active image that is to lose its
    name must not have lost it to another file. Raises Replaced, and the job stays as it is.
    """
    refuse_astray(target, view, record, *planned.named)
    active = _as_recorded(planned.chain.active, record)
    if planned.pivots and identity.astray(active, target.pid) is not None and files.inode(active.file) is not None:
        refuse_astray(target, view, record, active)


def refuse_astray(target: Target, view: ChainView, record: "Record | None", *images: Image) -> None:
    """
    These of a job at work must be the images that it was begun with, as its record knows them, under their names. Raises
    Replaced.
    """
    for image in images:
        astray = identity.astray(_as_recorded(image, record), target.pid)
        if astray is not None:
            raise identity.refusal(astray, target, active=view.chain.active.file if record is not None else None)


def _as_recorded(image: Image, record: "Record | None") -> Image:
    known = record.chain if record is not None else ()
    return next((one for one in known if one.inode is not None and one.file == image.file), image)


async def refuse_suspect(target: Target, planned: Plan, suspect: str | None) -> None:
    """What must be compared, and cannot be while a guest writes, is not begun. Raises Suspect, Busy."""
    if suspect is None or not planned.pivots or not target.is_live:
        return
    try:
        guest_runs = await target.guest_runs()
    except mutex.NoTurn as error:
        raise Busy(disk=planned.receiver.file, target=target.name, holder=error.holder) from None
    if guest_runs:
        raise Suspect(base=planned.receiver.file, reason=suspect)
