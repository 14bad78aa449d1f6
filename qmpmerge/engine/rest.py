"""
Whether nobody writes to the disk of an active merge: only then do base and top show the same, and go on to.

A guest that was paused may be let run again by anybody who has a monitor, so QEMU is asked each time that it matters. And
whoever has written meanwhile, though the guest stands still again, is seen too: the job has copied that.
"""

import time
from typing import Any

from qmpmerge.engine.run import Run
from qmpmerge.errors import QemuRefused

CLEAN_SECONDS = 2.0


async def begin(run: Run) -> int | None:
    """
    What the job, which is ready, has copied (bytes) once nothing is left to copy; None where somebody writes, or could.

    A writer that does not rest is not waited for for ever.
    """
    deadline = time.monotonic() + CLEAN_SECONDS
    while time.monotonic() < deadline:
        is_written, job = await _look(run)
        if is_written or job is None:
            return None
        if _is_clean(job):
            return int(job["offset"])
    return None


async def lasts(run: Run, since: int | None) -> int | None:
    """`since`, where nobody can have written since `begin` has returned that; else None."""
    if since is None:
        return None
    is_written, job = await _look(run)
    return since if not is_written and job is not None and _is_clean(job) and job["offset"] == since else None


async def _look(run: Run) -> tuple[bool, Any]:
    """
    Whether a guest can write (a storage daemon does not tell), or somebody past it, by an export; and the job. What we have
    opened ourselves nobody else has.
    """
    questions = ("query-status", "query-block-exports", "query-block-jobs")
    status, exports, known = await run.target.monitor.execute_all([(question, {}) for question in questions])
    runs = isinstance(status, QemuRefused) or status["running"]
    is_exported = isinstance(exports, QemuRefused) or bool(exports)
    jobs = [] if isinstance(known, QemuRefused) else known
    job = next((job for job in jobs if job["device"] == run.job), None)
    return run.target.is_live and (runs or is_exported), job


def _is_clean(job: Any) -> bool:
    return bool(job["offset"] == job["len"] and not job["busy"])
