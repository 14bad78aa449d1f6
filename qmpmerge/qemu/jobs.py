"""
Block jobs: what they are, and how one is followed.

A job belongs to QEMU. Events wake us, queries decide: a job that vanished, an event, 100 %: none of these is proof.
"""

import contextlib
import re
import time
from collections.abc import Callable, Collection
from typing import Any

from qmpmerge.errors import JobVerb, NoSuchJob, NotProven, QemuRefused, StillRunning, unproven
from qmpmerge.qemu.monitor import Doorbell, Monitor
from qmpmerge.value import Value

PREFIX = "qmpmerge-"
LOOK_AGAIN_SECONDS = 0.5
RESUME_SECONDS = 5.0
END_SECONDS = 60.0

VERBS = {
    "created": ("cancel",),
    "running": ("follow", "pause", "speed", "cancel"),
    "paused": ("follow", "resume", "speed", "cancel"),
    "ready": ("follow", "pivot", "keep", "pause", "speed", "cancel"),
    "standby": ("follow", "resume", "speed", "cancel"),
    "waiting": ("follow", "cancel"),
    "pending": ("follow", "finalize", "cancel"),
    "aborting": ("follow",),
    "concluded": ("follow", "dismiss"),
    "null": (),
}
"""What can be done with a job, by its status (JobStatus and JobVerb in qapi/job.json)."""

FINISHING = frozenset({"follow", "pivot", "keep"})
"""The verbs that `follow.follow` carries out, up to a proved end; the others are `control`'s."""

CANCELED = "Operation canceled"
"""The error of a job that somebody has cancelled (strerror of ECANCELED)."""


class Job(Value):
    """
    One job as QEMU tells it. `done` and `total` are in bytes and count what the job type counts; `speed` is bytes a
    second, 0 for unlimited. `reason` is QEMU's sentence once the job has failed. `disk` is known where the block
    graph was looked at.
    """

    id: str
    type: str
    status: str
    done: int
    total: int
    reason: str | None = None
    ready: bool = False
    speed: int = 0
    io_status: str = "ok"
    disk: str | None = None

    @property
    def ours(self) -> bool:
        """Whether the id says that a qmpmerge started it."""
        return self.id.startswith(PREFIX)

    @property
    def can_be_followed(self) -> bool:
        """Whether we know how to bring it to a proved end: a commit, or a stream that we have started ourselves."""
        return self.type == "commit" or (self.type == "stream" and self.ours)

    @property
    def has_no_space(self) -> bool:
        """Whether it stands still because the storage of its target is full."""
        return self.io_status == "nospace" and self.status in ("paused", "standby")

    @property
    def verbs(self) -> list[str]:
        """The verbs of `qmpmerge job` that are legal now."""
        return [verb for verb in VERBS.get(self.status, ()) if verb not in FINISHING or self.can_be_followed]


def job_id(disk: str, direction: str = "commit") -> str:
    """The id of our job on `disk`: letters, digits and ``-._`` only, as QEMU wants it; one for each disk and direction."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", disk)
    if name != disk:
        import zlib

        name = f"{name}-{zlib.crc32(disk.encode(errors='surrogatepass')):08x}"
    return f"{PREFIX}{direction}-{name}"


QUERIES: tuple[tuple[str, dict[str, Any]], ...] = (("query-jobs", {}), ("query-block-jobs", {}))
"""What tells of all jobs; the former knows the error, the latter the speed and the I/O status."""


async def query(monitor: Monitor) -> list[Job]:
    """
    All jobs, asked for in one go.

    Raises VmState before the machine is there (``-preconfig``).
    """
    return read(monitor, *await monitor.execute_all(QUERIES))


def read(monitor: Monitor, plain: Any, block: Any) -> list[Job]:
    """The same, of what was told to `QUERIES`."""
    if isinstance(plain, QemuRefused) and "machine initialization" in plain.reason:
        from qmpmerge.qemu import vmstate  # no job of ours can be at work

        raise vmstate.preconfig(monitor) from None
    for told in (plain, block):
        if isinstance(told, QemuRefused):
            raise told
    return _told(plain, block)


async def look(monitor: Monitor, job_id: str) -> Job | None:
    """The job of this id now, None when QEMU has none."""
    return next((job for job in await query(monitor) if job.id == job_id), None)


def _told(plain: Any, block: Any) -> list[Job]:
    more = {entry["device"]: entry for entry in block}
    return [_job(entry, more.get(entry["id"], {})) for entry in plain]


def _job(entry: Any, block: Any) -> Job:
    return Job(
        id=entry["id"],
        type=entry["type"],
        status=entry["status"],
        done=entry["current-progress"],
        total=entry["total-progress"],
        reason=entry.get("error"),
        ready=entry["status"] in ("ready", "standby"),
        speed=block.get("speed", 0),
        io_status=block.get("io-status", "ok"),
    )


async def follow(
    monitor: Monitor,
    doorbell: Doorbell,
    job_id: str,
    until: Collection[str],
    *,
    tell: Callable[[Job], None],
    deadline: float | None = None,
) -> Job | None:
    """
    Wait until the job's status is one of `until`, or it is gone (None): what that means only the graph can tell.

    `tell` is called with every sighting. A job paused for want of space (io-status ``nospace``) is resumed every few
    seconds: QEMU pauses it again while there is none. Raises StillRunning at `deadline` (`time.monotonic` seconds).
    """
    resumed = time.monotonic()
    while True:
        job = await look(monitor, job_id)
        if job is None:
            return None
        tell(job)
        if job.status in until:
            return job
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise StillRunning(target=monitor.name, job=job_id)
        if now - resumed >= RESUME_SECONDS:
            resumed = now
            await resume_for_space(monitor, job)
        await doorbell.wait(min(LOOK_AGAIN_SECONDS, deadline - now) if deadline is not None else LOOK_AGAIN_SECONDS)


async def resume_for_space(monitor: Monitor, job: Job) -> None:
    """Let a job try again that was paused for want of space: nobody tells when there is some."""
    if job.has_no_space:
        with contextlib.suppress(QemuRefused):  # it was resumed or ended meanwhile: the next look tells
            await monitor.execute("job-resume", id=job.id)


async def set_speed(monitor: Monitor, job: Job, speed: int) -> None:
    """Bytes a second, 0 for no limit; nothing is sent where that is its speed, or where it is not known any more."""
    if speed != job.speed and "speed" in job.verbs:
        with contextlib.suppress(QemuRefused):  # it has moved on meanwhile
            await monitor.execute("block-job-set-speed", device=job.id, speed=speed)


async def dismiss(monitor: Monitor, job_id: str) -> None:
    """Take a concluded job out of QEMU's list; fine when it is gone already."""
    try:
        await monitor.execute("job-dismiss", id=job_id)
    except QemuRefused:
        if await look(monitor, job_id) is not None:
            raise


async def control(monitor: Monitor, job_id: str, verb: str, speed: int = 0) -> Job | None:
    """
    Pause, resume, cancel or dismiss a job, or set its speed in bytes a second, where its state allows it.

    Returns the job as it is then, None when it is gone. `cancel` waits for the end. Raises NoSuchJob, JobVerb, QemuRefused;
    NotProven where it cannot be looked at any more, or is a stream whose last step has failed.
    """
    known = await query(monitor)
    job = next((job for job in known if job.id == job_id), None)
    if job is None:
        raise NoSuchJob(job=job_id, target=monitor.name, known=[job.id for job in known])
    if verb not in job.verbs or verb in FINISHING:
        raise JobVerb(job=job.id, verb=verb, status=job.status, verbs=job.verbs)
    if verb == "speed":
        await monitor.execute("block-job-set-speed", device=job_id, speed=speed)
    elif verb == "finalize" and job.type == "stream":
        await _finalize_stream(monitor, job_id)
    else:
        await monitor.execute(f"job-{verb}", id=job_id)
    with unproven(monitor.name, f"job {job_id} after {verb}"):
        if verb == "cancel":
            _ = await _wait_for_end(monitor, job_id)
        return await look(monitor, job_id)


async def _finalize_stream(monitor: Monitor, job_id: str) -> None:
    """
    The last step of a stream, which is dismissed in the same breath: QEMU 7.2 and 10.0 crash when anybody asks for their nodes
    while it is concluded. Its error is lost with it, so it is raised: NotProven, since the graph may have changed all the same.
    """
    steps = [("job-finalize", {"id": job_id}), ("query-jobs", {}), ("job-dismiss", {"id": job_id})]
    finalized, known, _ = await monitor.execute_all(steps)
    if isinstance(finalized, QemuRefused):
        raise finalized
    errors = [entry["error"] for entry in known if entry["id"] == job_id and "error" in entry]
    expected = f"job {job_id} ended without an error"
    with unproven(monitor.name, expected):
        last = await _wait_for_end(monitor, job_id)
    errors += [last.reason] if last is not None and last.reason is not None else []
    if errors:
        raise NotProven(target=monitor.name, expected=expected, found=errors[-1])


async def ended(monitor: Monitor, job_id: str, deadline: float | None) -> None:
    """Wait until a job that is ending has ended. Raises StillRunning at `deadline` (`time.monotonic` seconds)."""
    async with monitor.listening() as doorbell:
        await follow(monitor, doorbell, job_id, ("concluded",), tell=lambda job: None, deadline=deadline)


async def _wait_for_end(monitor: Monitor, job_id: str) -> Job | None:
    """The job as it was dismissed, None where it is gone already."""
    async with monitor.listening() as doorbell:
        deadline = time.monotonic() + END_SECONDS
        job = await follow(monitor, doorbell, job_id, ("concluded",), tell=lambda job: None, deadline=deadline)
    if job is not None:
        await dismiss(monitor, job_id)
    return job
