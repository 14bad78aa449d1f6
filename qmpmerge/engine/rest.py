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
    if await _is_exported(run):
        return None
    deadline = time.monotonic() + CLEAN_SECONDS
    while time.monotonic() < deadline:
        runs, job = await _look(run)
        if runs or job is None:
            return None
        if _is_clean(job):
            return int(job["offset"])
    return None


async def lasts(run: Run, since: int | None) -> bool:
    """Whether nobody can have written since `begin` has returned `since`."""
    runs, job = await _look(run)
    return since is not None and not runs and job is not None and _is_clean(job) and job["offset"] == since


async def _look(run: Run) -> tuple[bool, Any]:
    """Whether a guest can write (a storage daemon does not tell), and the job."""
    status, known = await run.target.monitor.execute_all([("query-status", {}), ("query-block-jobs", {})])
    runs = run.target.is_live and (isinstance(status, QemuRefused) or status["running"])
    jobs = [] if isinstance(known, QemuRefused) else known
    return runs, next((job for job in jobs if job["device"] == run.job), None)


def _is_clean(job: Any) -> bool:
    return bool(job["offset"] == job["len"] and not job["busy"])


async def _is_exported(run: Run) -> bool:
    """Whether somebody can write past the guest; what we have opened ourselves we have not exported."""
    if not run.target.is_live:
        return False
    try:
        return bool(await run.target.monitor.execute("query-block-exports"))
    except QemuRefused:
        return True
