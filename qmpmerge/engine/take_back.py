"""Take a job back, and see that the old chain is in use."""

import contextlib
import errno
import os
import time

from qmpmerge.chain.chain import Chain
from qmpmerge.engine import progress
from qmpmerge.engine.run import Run
from qmpmerge.errors import CommandError, JobFailed, NoSuchDisk, NotProven, OutOfQuota, StillRunning
from qmpmerge.qemu import jobs
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.targets.target import ChainView

CANCEL_SECONDS = 60.0


async def take_back(run: Run, doorbell: Doorbell) -> None:
    """Cancel the job and see that the old chain is in use. Raises NotProven where it is not."""
    monitor = run.target.monitor
    with contextlib.suppress(CommandError):  # it may have ended by itself
        await monitor.execute("job-cancel", id=run.job)
    try:
        job = await jobs.follow(
            monitor,
            doorbell,
            run.job,
            ("concluded",),
            tell=lambda job: None,
            deadline=time.monotonic() + CANCEL_SECONDS,
        )
        if job is not None:
            await jobs.dismiss(monitor, run.job)
    except StillRunning:
        raise NotProven(target=run.target.name, expected="the job cancelled", found="it still running") from None
    await prove_old_chain(run)


async def prove_old_chain(run: Run) -> None:
    """See that the chain is what it was before. Raises NotProven."""
    after = await view_after(run, run.plan.chain)
    if not after.chain.same_files(run.plan.chain):
        raise NotProven(target=run.target.name, expected=str(run.plan.chain), found=str(after.chain))


def failure(run: Run, reason: str) -> JobFailed:
    """The error that a job ended with, where the old chain has been seen to be in use."""
    if reason == os.strerror(errno.EDQUOT):
        filesystem = progress.of(run.plan.base, 0).filesystem
        return OutOfQuota(job=run.job, reason=reason, filesystem=filesystem)
    return JobFailed(job=run.job, reason=reason)


async def view_after(run: Run, expected: Chain) -> ChainView:
    """The disk as it is now. Where its device was unplugged meanwhile, only the node of its active image has a name."""
    try:
        return await run.target.chain(run.name_after(expected))
    except NoSuchDisk:
        if expected.active.node is None:
            raise
        return await run.target.chain(expected.active.node)
