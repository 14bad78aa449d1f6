"""
Jobs that wait for somebody: what each state means, and the verb that ends the wait.
"""

import asyncio
import os
import shlex
from collections.abc import Iterator

from qmpmerge.doctor.findings import Finding, Severity
from qmpmerge.journal import locks
from qmpmerge.qemu import jobs
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.targets.target import Target

SETTLE_SECONDS = 0.2
"""A job is paused for a moment at every drain: what is meant by it is seen by looking twice."""

Meaning = tuple[Severity, str, str, str]
"""How bad, what, why it matters, and the verb of `qmpmerge job`."""

_GOES_ON = "it goes on only when somebody resumes it; meanwhile it comes to no end"
MEANINGS: dict[str, Meaning] = {
    "running": (
        "note",
        "it is at work, and no qmpmerge follows it",
        "it copies on by itself and then waits: nothing is switched until somebody follows it to its end",
        "follow",
    ),
    "no-space": (
        "care",
        "it ran out of space",
        "it copies nothing until there is space and somebody resumes it, which `follow` does",
        "follow",
    ),
    "paused": ("care", "it is paused", _GOES_ON, "resume"),
    "standby": ("care", "it is ready, and paused", _GOES_ON, "resume"),
    "ready": (
        "care",
        "it is ready and waits for somebody to end it",
        "every guest write goes to both images until then; if QEMU dies, the old chain is right",
        "pivot",
    ),
    "pending": (
        "care",
        "all is copied, and it waits for somebody to end it",
        "nothing is switched: the old chain is in use and right, whatever dies; it comes to no end by itself",
        "follow",
    ),
    "frozen": (
        "harm",
        "it waits to be finalized",
        "all I/O of the guest stands still until it is, and new writes may be lost",
        "follow",
    ),
    "concluded": ("note", "it has ended, and nobody has read how", "it keeps its id and what it had open", "dismiss"),
    "failed": (
        "care",
        "it has failed, and nobody has read how",
        "the old chain is in use and right; the job keeps its id and what it had open",
        "dismiss",
    ),
}
"""A job that is just ending, or is at work for somebody else, needs nobody, and has no meaning here."""

_MIXED = "; base, and what lies between it and the image that is merged, is nothing to start from or to build on by now"


async def settled(monitor: Monitor) -> list[Job]:
    """The jobs that are in the same state at two looks."""
    first = {job.id: job.status for job in await jobs.query(monitor)}
    if not first:
        return []
    await asyncio.sleep(SETTLE_SECONDS)
    return [job for job in await jobs.query(monitor) if first.get(job.id) == job.status]


def crashing(target: Target, known: list[Job]) -> list[Finding]:
    """Those that make it dangerous to ask for anything else."""
    why = "QEMU 7.2 to 10.0 crash, with the guest, when anybody asks for their nodes now: nothing else was looked at"
    return [
        Finding(
            "stream-concluded", "harm", job.id, "it has ended and was not dismissed", why, _verb(target, job, "dismiss")
        )
        for job in known
        if job.type == "stream" and job.status == "concluded"
    ]


def examine(target: Target, layout: Layout, known: list[Job]) -> Iterator[Finding]:
    """One finding for each of `known` that waits, unless a qmpmerge is at work on it."""
    for job in known:
        meaning = MEANINGS.get(_state(layout, job))
        is_anybodys = job.status == "running" and not job.ours
        if meaning is not None and not is_anybodys and not _is_watched(layout, job):
            yield _finding(target, job, meaning)


def _state(layout: Layout, job: Job) -> str:
    if job.status == "paused" and job.io_status == "nospace":
        return "no-space"
    if job.status == "pending" and "target" in layout.job_edges.get(job.id, {}):  # an active one, or a mirror
        return "frozen"
    return "failed" if job.status == "concluded" and job.reason is not None else job.status


def _is_watched(layout: Layout, job: Job) -> bool:
    """Whether a qmpmerge is at work on it, as the lock beside its base tells."""
    disks = [disk for disk in layout.disks if disk.job is not None and disk.job.id == job.id]
    images = [image for disk in disks for image in disk.chain or () if image.has_path]
    beside = [path for path in map(locks.lock_path, images) if os.path.exists(path)]
    return job.ours and any(map(locks.is_held, beside))


def _finding(target: Target, job: Job, meaning: Meaning) -> Finding:
    severity, what, why, verb = meaning
    why += _MIXED if job.type == "commit" and job.status in ("ready", "standby", "pending") else ""
    what += f": {job.reason}" if job.reason else ""
    what += f" (possible now: {', '.join(job.verbs)})" if job.verbs else ""
    name = "job-no-space" if job.io_status == "nospace" else f"job-{job.status}"
    return Finding(name, severity, job.id, what, why, _command(target, job, verb))


def _command(target: Target, job: Job, verb: str) -> str | None:
    """Where a job is of a type that we do not follow, what lets it go on; but for what only its owner knows."""
    wanted = (verb,) if verb == "pivot" else (verb, "finalize", "resume")
    return next((_verb(target, job, one) for one in wanted if one in job.verbs), None)


def _verb(target: Target, job: Job, verb: str) -> str:
    return f"qmpmerge job {shlex.quote(target.name)} {shlex.quote(job.id)} {verb}"
