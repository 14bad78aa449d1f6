"""
What was begun before us on a disk: jobs of a qmpmerge that is gone, and the note that it left in its lock (`locks`).

A job belongs to QEMU, so whoever comes next goes on from where it stands. The note tells what no job remembers once it
has ended: since when, which images, and whether an earlier merge into this base failed, after which what the base shows
must be compared before anything is switched (QEMU's cache may believe what the storage has lost).
"""

import contextlib
import time
from dataclasses import replace

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain
from qmpmerge.chain.outcome import Ending
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.engine.operation import Merge
from qmpmerge.engine.patience import Patience
from qmpmerge.engine.progress import Progress, Report
from qmpmerge.errors import Locked, Suspect, refuse
from qmpmerge.journal import locks, note
from qmpmerge.journal.note import Earlier
from qmpmerge.qemu import jobs
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.target import ChainView, Host

# --- what is found ----------------------------------------------------------------------------------------------------


def plan_of(view: ChainView, job: Job) -> CommitPlan | None:
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
    planned = plan.commit(view.chain, disk=view.disk.name, base=base, top=top)
    refuse(planned.refusals)
    return planned


def under_way(view: ChainView, planned: CommitPlan) -> Job | None:
    """The job of ours on this disk that carries out this very plan."""
    job = view.disk.job
    if job is None or not job.ours or job.type != "commit" or job.status == "concluded":
        return None
    running = plan_of(view, job)
    same = running is not None and (running.base, running.top) == (planned.base, planned.top)
    return job if same else None


async def tidied(host: Host, view: ChainView, report: Report) -> ChainView:
    """
    Read and dismiss a commit job of ours on this disk that ended while nobody looked, and return the view without it.

    That it ended well is told, and not believed: what was asked for is proved, or done, all the same.
    """
    ours = (view.disk.job.id if view.disk.job else "", jobs.job_id(view.disk.name))
    job = next((job for job in view.layout.jobs if job.id in ours and job.ours and job.status == "concluded"), None)
    if job is None or job.type != "commit":
        return view
    what = f"had failed ({job.error})" if job.error else "had ended"
    report(told(view, job, f"job {job.id} {what} while nobody looked{_since(view, job)}; it is dismissed"))
    await dismiss(host, view.chain, job)
    return await host.chain(view.disk.name)


async def dismiss(host: Host, chain: Chain, job: Job) -> None:
    """Take a concluded job away. An error that it ended with is kept in its note: QEMU forgets it now."""
    earlier = note.find(chain)
    if earlier is not None and earlier.job == job.id and job.error not in (None, jobs.CANCELED):
        beside = note.place(earlier.plan)
        with contextlib.suppress(Locked), locks.held(beside) as lock:
            lock.note({**(locks.noted(beside) or {}), "suspect": job.error})
    await jobs.dismiss(host.monitor, job.id)


async def forget(host: Host, job_id: str) -> None:
    """A job that was cancelled has left everything as it was: its note goes, but for an earlier failure."""
    for disk in await host.disks():
        earlier = note.find(disk.chain) if disk.chain is not None else None
        if earlier is not None and earlier.job == job_id and note.suspicion(earlier.plan) is None:
            with contextlib.suppress(Locked), locks.held(note.place(earlier.plan)) as lock:
                lock.clear()


def told(view: ChainView, job: Job, note: str) -> Progress:
    """What is reported of a job that was there before us."""
    counts = "copied" if job.ready else "found"
    return Progress(view.disk.name, job.id, job.status, job.done, job.total, counts, note=note)


def found(view: ChainView, job: Job) -> Progress:
    """The report that we go on with a job."""
    paused = ", where it waits to be resumed" if job.status in ("paused", "standby") and not job.has_no_space else ""
    note = f"job {job.id} is at work on this already{_since(view, job)}: going on, it is {job.status}{paused}"
    return told(view, job, note)


def _since(view: ChainView, job: Job) -> str:
    earlier = note.find(view.chain)
    if earlier is None or earlier.job != job.id:
        return ""
    return f" (begun {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(earlier.since))})"


def revived(
    host: Host, view: ChainView, earlier: Earlier, *, ending: Ending, report: Report, patience: Patience
) -> Merge:
    """
    A merge whose end nobody saw, to be proved as if it had just been made.

    Images are known by their files: the QEMU that has them now may have been started since, and call its nodes otherwise.
    """
    there = set(view.layout.subtree(view.disk.root))
    return Merge(
        host=host,
        disk=view.disk,
        plan=_as_called_now(earlier.plan, view.chain),
        ending=ending,
        report=report,
        patience=patience,
        old_nodes=[node for node in earlier.old_nodes if node not in there],
        base_driver=earlier.base_driver,
        job=earlier.job,
    )


def _as_called_now(planned: CommitPlan, chain: Chain) -> CommitPlan:
    nodes = [next((now.node for now in chain if now.same_as(image)), None) for image in planned.chain]
    images = tuple(replace(image, node=node) for image, node in zip(planned.chain, nodes, strict=True))
    base, top = planned.chain.index(planned.base), planned.chain.index(planned.top)
    return plan.commit(Chain(images), base=f"[{base}]", top=f"[{top}]")


async def refuse_suspect(host: Host, planned: CommitPlan, suspect: str | None) -> None:
    """What must be compared, and cannot be while a guest writes, is not begun. Raises Suspect."""
    if suspect is not None and planned.pivots and host.is_live and await host.guest_runs():
        raise Suspect(base=planned.base.file, reason=suspect)
