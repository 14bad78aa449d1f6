"""
Pull: what lies below an image goes up into it, down to a base or all of it (`block-stream`).

    COPYING -> PENDING -> flush the overlay, compare -> SAFE -> job-finalize -> flush the overlay

No image shows other data at any time, so others may use whatever lies below. A plain `block-stream` is not safe: it says that
it is done with its tables in QEMU's memory alone (tests/operations/test_pull.py).

The job dismisses itself: QEMU 7.2 and 10.0 crash when anybody asks for their nodes while a stream job is concluded. So how it
ended is read from the graph and the header; its error is heard as it goes.
"""

import shlex
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qmpmerge import shield
from qmpmerge.chain.outcome import MergedFile, Verdict, pulled_advice
from qmpmerge.chain.plan import PullPlan
from qmpmerge.engine import blockjob, copies, proof, safeguards
from qmpmerge.engine.run import Run
from qmpmerge.errors import (
    CannotRecover,
    Failed,
    FlushUnavailable,
    HeaderNotDurable,
    NoSuchDisk,
    NotDurable,
    NotProven,
    NotWritable,
    QemuRefused,
    Untouched,
    unproven,
)
from qmpmerge.images import qcow2
from qmpmerge.journal.record import Record
from qmpmerge.qemu import flush, jobs
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.targets.target import Target

if TYPE_CHECKING:
    from qmpmerge.recovery.evidence import Judgement, Use


@dataclass
class Pull:
    """See `Operation`."""

    plan: PullPlan
    verdict: ClassVar[Verdict] = "pulled"
    job_type: ClassVar[str] = "stream"
    counts: ClassVar[str] = "scanned"
    pivots: ClassVar[bool] = False
    decisions: ClassVar[frozenset[str]] = frozenset({"pending", "concluded"})
    holds_at: ClassVar[str] = "pending"

    async def start(self, run: Run) -> None:
        """Send block-stream, to the image's own node and not to a filter above. Raises NotWritable, QemuRefused, NotDurable."""
        try:
            run.copies = await copies.foresee(run, self.plan)
            await self._ask(run)
        except (Untouched, Failed):
            await copies.forget(run, self.plan)
            raise

    async def _ask(self, run: Run) -> None:
        arguments: dict[str, Any] = {
            "job_id": run.job,
            "device": self.plan.overlay.node,
            "filter_node_name": f"qmpmerge-pull-{zlib.crc32(run.job.encode()):08x}",  # 31 characters at the most
            "speed": run.speed or 0,
            "on_error": "enospc",
            "auto_finalize": False,
            "auto_dismiss": True,
            **await self._base(run),
        }
        try:
            await run.target.monitor.execute("block-stream", **arguments)
        except QemuRefused as error:
            with unproven(run.target.name, f"no job {run.job}, since QEMU refused to start it"):
                if await jobs.look(run.target.monitor, run.job) is not None:
                    raise NotProven(target=run.target.name, expected=f"no job {run.job}", found="it at work") from None
            if "read-only" in error.reason or "Failed to get" in error.reason:
                raise NotWritable(file=self.plan.overlay.file, reason=error.reason) from None
            raise

    async def _base(self, run: Run) -> dict[str, Any]:
        """
        Where to stop, and the string for the header, always given: QEMU would write an absolute path, or a json: name, over a
        relative one.
        """
        base = self.plan.base
        if base is None:
            return {}
        more: dict[str, Any] = {"base_node": base.node, "backing_file": self.plan.backing_name}
        masks = run.base_driver != base.format
        if masks and await run.target.monitor.accepts("block-stream", "backing-mask-protocol"):
            more["backing_mask_protocol"] = True
        return more

    async def safeguards(self, run: Run, doorbell: Doorbell, job: Job) -> None:
        """What was pulled is made durable before the header says that it is there."""
        if job.status == "concluded":
            return
        await safeguards.see_files(run, doorbell)
        await safeguards.make_receiver_durable(run, doorbell)
        await copies.verify(run, doorbell, self.plan)

    async def switch(self, run: Run, doorbell: Doorbell, job: Job) -> Job | None:
        """The overlay's header is rewritten, and the graph with it."""
        await safeguards.see_that_it_stays(run, doorbell)
        return await shield.finished(blockjob.finalize(run, doorbell, job))

    async def end_of(self, run: Run, doorbell: Doorbell, job: Job | None) -> Job | None:
        """Where the graph is what it was, it has failed."""
        if job is not None:
            await jobs.dismiss(run.target.monitor, run.job)  # somebody else's, that waits for it
        after = await proof.view_after(run, self.plan.result)
        if not after.chain.same_files(self.plan.chain):
            return None
        reason = doorbell.heard.get(run.job) or "it ended, and the chain is what it was"
        return Job(run.job, self.job_type, "null", 0, 0, reason=reason)

    async def make_durable(self, run: Run) -> None:
        """The overlay, and its header, which is written once more where it could not be at the end of the job."""
        try:
            await self._mended(run)
            await flush.flush(run.target.monitor, self.plan.overlay)
        except (NotDurable, FlushUnavailable, QemuRefused) as error:
            overlay = self.plan.overlay.file
            raise HeaderNotDurable(target=run.target.name, overlay=overlay, reason=error.reason) from None

    async def _mended(self, run: Run) -> None:
        """A header that has stayed behind the graph is written; both show the right data. Raises QemuRefused, NotDurable."""
        after = await proof.view_after(run, self.plan.result)
        image = next((image for image in after.chain if image.same_as(self.plan.overlay)), None)
        if image is not None and self._is_behind(image.backing):
            await self._relink(run, after.disk.root)

    async def relink(self, run: Run) -> None:
        """As at the end of the job. Raises CannotRecover."""
        overlay = self.plan.overlay
        try:
            header = qcow2.read_of(overlay) if overlay.has_path else None
            if run.carrier is None or run.record is None or header is None or not self._is_behind(header.backing):
                return
            disk = run.record.device or self.plan.chain.active.node
            await self._relink(run, (await run.carrier.layout()).find(disk, run.carrier.name).root)
        except (OSError, NoSuchDisk) as error:
            raise CannotRecover(file=overlay.file, reason=str(error)) from None
        except (NotDurable, QemuRefused) as error:
            raise CannotRecover(file=overlay.file, reason=error.reason) from None

    def _is_behind(self, backing: str | None) -> bool:
        return backing == self.plan.overlay.backing != self.plan.backing_name

    async def _relink(self, run: Run, root: str) -> None:
        """
        Have QEMU write the header once more: only where it takes the right format for that of base, the overlay's own, and not
        where there is no base any more, which it refuses. Raises QemuRefused, NotDurable.
        """
        base, overlay = self.plan.base, self.plan.overlay
        if base is None or not (overlay.format == base.format == run.base_driver):
            command = shlex.join(["qmpmerge", "recover", self.plan.chain.active.file])
            reason = f"it is the old one, which QEMU does not change now; with the VM off `{command}` ends this"
            raise NotDurable(node=overlay.file, reason=reason)
        await run.target.monitor.execute(
            "change-backing-file", device=root, image_node_name=overlay.node, backing_file=self.plan.backing_name
        )

    async def let_go(self, run: Run) -> None:
        """
        QEMU 11.1 leaves an image in the middle open for writing, however the job ends, so that nobody else could start on it.
        The human monitor keeps all other options of the node; `blockdev-reopen` resets what it is not given, and cannot be
        asked for one that QEMU has named itself.
        """
        overlay, monitor = self.plan.overlay, run.target.monitor
        await copies.forget(run, self.plan)
        if not self.plan.is_in_the_middle or not run.target.is_live or await self._is_closed(run):
            return
        try:
            reason = await monitor.execute("human-monitor-command", command_line=f'qemu-io {overlay.node} "reopen -r"')
        except QemuRefused as error:
            reason = error.reason
        if not await self._is_closed(run):
            stays = f"{overlay.file} stays open for writing until this QEMU ends, and no other VM can use it meanwhile"
            run.notes.append(f"{stays}: {reason.strip()}")

    async def _is_closed(self, run: Run) -> bool:
        """For writing, or altogether."""
        node = (await run.target.layout()).nodes.get(self.plan.overlay.node or "")
        return node is None or bool(node.info.get("ro", True))

    async def evidence(
        self, record: Record, target: Target | None, use: "Use | None" = None, *, layout: Layout | None = None
    ) -> "Judgement":
        """The overlay's header is looked at."""
        from qmpmerge.recovery.evidence import by_header, judge

        return await judge(record, target, use, layout=layout, kept=self.plan.overlay, decide=by_header)

    @property
    def left_behind(self) -> str | None:
        """Every image shows what it did."""
        return None

    def advice(self, merged: tuple[MergedFile, ...], *, may_be_deleted: bool) -> list[str]:
        """Nothing changes for the VM's next start."""
        stays = f"the VM is started from {self.plan.chain.active.file}, as before"
        return [stays, *(pulled_advice(merged) if may_be_deleted else [])]
