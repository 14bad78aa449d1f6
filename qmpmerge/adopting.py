"""
What was begun before us on a disk: jobs of a qmpmerge that is gone, and the note that it left in its lock (`locks`).

A job belongs to QEMU, so whoever comes next goes on from where it stands. The note tells what no job remembers once it
has ended: since when, which images, and whether an earlier merge into this base failed, after which what the base shows
must be compared before anything is switched (QEMU's cache may believe what the storage has lost).
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from qmpmerge import jobs, locks, plan, steps
from qmpmerge.chain import Chain, Image
from qmpmerge.errors import (
    Error,
    JobFailed,
    Locked,
    NotDurable,
    NotVerified,
    Refused,
    StillRunning,
    Suspect,
    Unknown,
    refuse,
)
from qmpmerge.hosts import ChainView, Host
from qmpmerge.jobs import Job, Progress, Report
from qmpmerge.locks import Lock
from qmpmerge.outcome import Ending
from qmpmerge.patience import Patience
from qmpmerge.plan import CommitPlan
from qmpmerge.steps import Merge

SCHEMA = 1


@dataclass(frozen=True)
class Earlier:
    """A merge that was begun before us, as its note tells it. `since` is in seconds since 1970."""

    job: str
    since: float
    plan: CommitPlan
    old_nodes: list[str]
    base_driver: str

    def is_done(self, chain: Chain) -> bool:
        """Whether the chain is what that merge was to leave; its headers are looked at when it is proved."""
        return chain.same_files(self.plan.result)

    def is_what(self, *, base: str | None, top: str | None, shallow: bool) -> bool:
        """Whether these words, said of the chain as it was, mean the very same merge."""
        # By name, not by inode: a merged file may have been moved away since.
        images = tuple(Image(image.file, image.format, image.virtual_size, image.node) for image in self.plan.chain)
        try:
            meant = plan.commit(Chain(images), base=base, top=top, shallow=shallow)
        except Refused:
            return False
        return meant.base.file == self.plan.base.file and meant.top.file == self.plan.top.file


def place(planned: CommitPlan) -> Image:
    """The image beside which the lock lies: the base, else the lowest merged image that has a path."""
    return next((image for image in (planned.base, *planned.merged) if image.has_path), planned.base)


def find(chain: Chain) -> Earlier | None:
    """The merge that a note beside an image of this chain tells of; a note that makes no sense is none."""
    for image in chain:
        told = locks.noted(image)
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, Refused):
            return _read(told or {})
    return None


def _read(told: dict[str, Any]) -> Earlier:
    images = tuple(Image(**{**entry, "inode": tuple(entry["inode"] or ()) or None}) for entry in told["images"])
    planned = plan.commit(Chain(images), base=f"[{told['base']}]", top=f"[{told['top']}]")
    if told["schema"] != SCHEMA or not str(told["job"]).startswith(jobs.PREFIX):
        raise ValueError
    since, driver = float(told["since"]), str(told["base_driver"])
    return Earlier(str(told["job"]), since, planned, [str(node) for node in told["old_nodes"]], driver)


def suspicion(planned: CommitPlan) -> str | None:
    """The error of an earlier merge into this base after which what it shows must be compared."""
    told = locks.noted(place(planned)) or {}
    return str(told["suspect"]) if told.get("suspect") else None


def _note(merge: Merge, since: float) -> dict[str, Any]:
    chain = merge.plan.chain
    return {
        "schema": SCHEMA,
        "job": merge.job,
        "target": merge.host.target,
        "since": since,
        "images": [asdict(image) for image in chain],
        "base": chain.index(merge.plan.base),
        "top": chain.index(merge.plan.top),
        "old_nodes": merge.old_nodes,
        "base_driver": merge.base_driver,
        "suspect": merge.suspect,
    }


@contextlib.contextmanager
def noted(lock: Lock, merge: Merge, *, is_new: bool) -> Iterator[None]:
    """
    Keep a note for who comes next while the merge is under way, and after it where there is something to be known: the
    job goes on, the outcome is not proved, or base could not be written as it should. One that is not new keeps the time
    at which it was begun.
    """
    earlier = None if is_new else find(Chain((place(merge.plan),)))
    note = _note(merge, earlier.since if earlier and earlier.job == merge.job else time.time())
    lock.note(note)
    try:
        yield
    except (Unknown, StillRunning):
        raise
    except (JobFailed, NotDurable, NotVerified) as error:
        if merge.suspect is None and not is_suspicious(error):
            lock.clear()
        else:
            lock.note({**note, "suspect": merge.suspect or str(error.facts["reason"])})
        raise
    except BaseException:
        if merge.suspect is None:
            lock.clear()  # it was taken back: everything is as it was
        raise


def is_suspicious(error: Error) -> bool:
    """
    Whether after this failure base may not hold what QEMU believes: not where somebody cancelled the job, or where base
    and top could not be compared.
    """
    reason = error.facts["reason"]
    return reason == steps.DIFFERENT if isinstance(error, NotVerified) else reason != jobs.CANCELED


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
    earlier = find(chain)
    if earlier is not None and earlier.job == job.id and job.error not in (None, jobs.CANCELED):
        beside = place(earlier.plan)
        with contextlib.suppress(Locked), locks.held(beside) as lock:
            lock.note({**(locks.noted(beside) or {}), "suspect": job.error})
    await jobs.dismiss(host.monitor, job.id)


async def forget(host: Host, job_id: str) -> None:
    """A job that was cancelled has left everything as it was: its note goes, but for an earlier failure."""
    for disk in await host.disks():
        earlier = find(disk.chain) if disk.chain is not None else None
        if earlier is not None and earlier.job == job_id and suspicion(earlier.plan) is None:
            with contextlib.suppress(Locked), locks.held(place(earlier.plan)) as lock:
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
    earlier = find(view.chain)
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
