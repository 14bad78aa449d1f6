"""
Commit: what lies above base is merged down into it.

    intermediate    COPYING -> PENDING -> flush base and compare -> SAFE -> job-finalize -> flush overlay
    active          COPYING -> READY -> SAFE -> pause, job-complete, run

A plain `block-commit` is not safe; each step here avoids a harm that tests/operations/test_commit.py pins. An intermediate
merge waits at PENDING until base is durable, since QEMU rewrites the overlay's header first and flushes afterwards. An
active merge is never held there: it would freeze the guest.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qmpmerge import shield
from qmpmerge.chain.outcome import MergedFile, Verdict, files_advice, launch_advice
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.engine import blockjob, pivot, safeguards
from qmpmerge.engine.operation import Operation
from qmpmerge.engine.run import Run
from qmpmerge.errors import (
    FlushUnavailable,
    HeaderNotDurable,
    NotDurable,
    NotProven,
    NotWritable,
    QemuRefused,
    unproven,
)
from qmpmerge.journal.record import Record
from qmpmerge.qemu import flush, jobs
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.targets.target import Target

if TYPE_CHECKING:
    from qmpmerge.recovery.evidence import Judgement, Use


def operation(plan: CommitPlan) -> Operation:
    """The operation that carries out this plan."""
    return Active(plan) if plan.pivots else Intermediate(plan)


@dataclass
class Commit:
    """What both have in common: see `Operation`."""

    plan: CommitPlan
    verdict: ClassVar[Verdict]
    counts: ClassVar[str]
    holds_at: ClassVar[str]
    pivots: ClassVar[bool]
    job_type: ClassVar[str] = "commit"
    decisions: ClassVar[frozenset[str]] = frozenset({"ready", "pending", "concluded"})

    async def start(self, run: Run) -> None:
        """
        Send block-commit: nodes always by name, nothing ended behind our back. Raises NotWritable, QemuRefused, ToolMissing.
        """
        await safeguards.see_what_base_holds(run)
        arguments: dict[str, Any] = {
            "job_id": run.job,
            "device": run.disk.root,
            "top_node": run.old_nodes[0],  # a filter above top, where there is one: see `Layout.filters_below`
            "base_node": self.plan.base.node,
            "speed": run.speed or 0,
            "on_error": "enospc",
            "auto_dismiss": False,
        }
        try:
            await run.target.monitor.execute("block-commit", **arguments, **await self._more(run))
        except QemuRefused as error:
            await self._see_that_none_began(run)
            if "read-only" in error.reason:  # a node with an explicit `read-only=on`, which only trying tells
                raise NotWritable(file=self.plan.base.file, reason=error.reason) from None
            raise

    async def _see_that_none_began(self, run: Run) -> None:
        """QEMU said no. Raises NotProven where there is a job all the same, or that cannot be seen."""
        expected = f"no job {run.job}, since QEMU refused to start it"
        with unproven(run.target.name, expected):
            if await jobs.look(run.target.monitor, run.job) is not None:
                raise NotProven(target=run.target.name, expected=expected, found="it at work")

    async def _more(self, run: Run) -> dict[str, Any]:
        return {}

    async def end_of(self, run: Run, doorbell: Doorbell, job: Job | None) -> Job | None:
        """It waits to be dismissed."""
        if job is not None:
            await jobs.dismiss(run.target.monitor, run.job)
        return job

    async def let_go(self, run: Run) -> None:
        """Nothing: what it leaves are nodes, which are closed once it is done."""

    async def relink(self, run: Run) -> None:
        """QEMU does not go on without having written it."""

    @property
    def left_behind(self) -> str | None:
        """The chain shows what it did; base by itself neither that nor its old data, nor does what lies between it and top."""
        between = "; nor is an image between the two" if len(self.plan.merged) > 1 else ""
        base, top = self.plan.base.file, self.plan.top.name
        return (
            f"{base} may hold what {top} shows by now, and is nothing to start from or to build on without it{between}"
        )

    def advice(self, merged: tuple[MergedFile, ...], *, may_be_deleted: bool) -> list[str]:
        """What became of the files."""
        return files_advice(merged) if may_be_deleted else []


class Intermediate(Commit):
    """The overlay right above top is linked to base."""

    verdict: ClassVar[Verdict] = "merged"
    counts, holds_at, pivots = "scanned", "pending", False

    async def _more(self, run: Run) -> dict[str, Any]:
        """The backing string is always given: QEMU would write an absolute path, or a json: name, over a relative one."""
        more: dict[str, Any] = {"backing_file": self.plan.backing_name, "auto_finalize": False}
        masks = run.base_driver != self.plan.base.format
        if masks and await run.target.monitor.accepts("block-commit", "backing-mask-protocol"):
            more["backing_mask_protocol"] = True
        return more

    async def safeguards(self, run: Run, doorbell: Doorbell, job: Job) -> None:
        """Base is made durable before the overlay's header is rewritten, and what is held before anybody relies on it."""
        if job.status != "concluded":
            await safeguards.see_files(run, doorbell)
        if job.status == "pending":
            await safeguards.make_durable_and_verify(run, doorbell)
        if job.status != "concluded":
            await safeguards.see_that_it_is_compared(run, doorbell)
        if job.status != "concluded" and run.request.ending == "pivot":
            await safeguards.carry_bitmaps(run, doorbell)

    async def switch(self, run: Run, doorbell: Doorbell, job: Job) -> Job | None:
        """The overlay's header is rewritten, and the graph with it."""
        await safeguards.see_that_it_stays(run, doorbell)
        return await shield.finished(blockjob.finalize(run, doorbell, job))

    async def evidence(
        self, record: Record, target: Target | None, use: "Use | None" = None, *, layout: Layout | None = None
    ) -> "Judgement":
        """The overlay's header is looked at."""
        from qmpmerge.recovery.evidence import by_header, judge

        assert self.plan.overlay is not None, "it is no active merge"
        return await judge(record, target, use, layout=layout, kept=self.plan.overlay, decide=by_header)

    async def make_durable(self, run: Run) -> None:
        """The overlay's header; and base, where somebody else ended the job before we could flush it."""
        assert self.plan.overlay is not None, "it is no active merge"
        try:
            if not run.receiver_is_durable:
                await flush.flush(run.target.monitor, self.plan.base)
            await flush.flush(run.target.monitor, self.plan.overlay, header_only=True)
            run.log("durable", "the header of {file} is durable", file=self.plan.overlay.label)
        except (NotDurable, FlushUnavailable) as error:
            raise HeaderNotDurable(
                target=run.target.name, overlay=self.plan.overlay.file, reason=error.reason
            ) from None


class Active(Commit):
    """The guest moves onto base, or keeps the overlay once base holds all data."""

    verdict: ClassVar[Verdict] = "pivoted"
    counts, holds_at, pivots = "copied", "ready", True

    async def safeguards(self, run: Run, doorbell: Doorbell, job: Job) -> None:
        """
        The job has flushed base before it said that it is ready. An overlay that is kept keeps its bitmaps. Of what is held all
        else is seen when it goes on: the guest writes until then.
        """
        if job.status != "concluded":
            await safeguards.see_files(run, doorbell)
        if run.is_to_be_held(job):
            return
        await safeguards.verify_at_rest(run, doorbell, job)
        if job.status != "concluded":
            await safeguards.see_that_it_is_compared(run, doorbell)
        if job.status in ("pending", "ready") and run.request.ending == "pivot":
            await safeguards.carry_bitmaps(run, doorbell)

    async def switch(self, run: Run, doorbell: Doorbell, job: Job) -> Job | None:
        """With the guest paused the device moves; or the job is let go."""
        if job.status == "ready" and run.request.ending == "pivot":
            await safeguards.see_that_it_stays(run, doorbell)
            return await pivot.pivot(run, doorbell, job.status)
        run.past_return = True
        run.let_go = run.let_go or (job.status == "ready" and run.request.ending == "keep")
        return await shield.finished(blockjob.end(run, doorbell, job.status, keeps=run.let_go))

    async def evidence(
        self, record: Record, target: Target | None, use: "Use | None" = None, *, layout: Layout | None = None
    ) -> "Judgement":
        """No header is written: names, contents and times are looked at."""
        from qmpmerge.recovery.evidence import by_contents, judge

        return await judge(record, target, use, layout=layout, kept=self.plan.base, decide=by_contents)

    async def make_durable(self, run: Run) -> None:
        """No header was written, and base is flushed by whoever writes to it."""

    def advice(self, merged: tuple[MergedFile, ...], *, may_be_deleted: bool) -> list[str]:
        """Which image the VM must be started from now."""
        launch = launch_advice(self.plan.base.label, merged[-1])
        return [launch, *super().advice(merged, may_be_deleted=may_be_deleted)]
