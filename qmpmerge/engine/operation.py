"""What operations on a chain differ in. All else (states, record, limits, lost sessions) is `run` and `go`, for all of them."""

from typing import TYPE_CHECKING, ClassVar, Protocol

from qmpmerge.chain.outcome import MergedFile, Verdict
from qmpmerge.chain.plan import Plan
from qmpmerge.journal.record import Record
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Doorbell
from qmpmerge.targets.target import Target

if TYPE_CHECKING:
    from qmpmerge.engine.run import Run
    from qmpmerge.recovery.evidence import Judgement, Use


class Operation(Protocol):
    """
    One operation: which plan it carries out, and what it does in the states in which operations differ.

    `verdict` is that of an outcome that is proved, `job_type` what QEMU calls its jobs, `counts` what it counts of one (see
    `Progress`), `decisions` are the states of the job in which it waits for us, `holds_at` is that in which it can be held: all
    is copied, and nothing switched. `pivots` says that the guest moves to another image.
    """

    verdict: ClassVar[Verdict]
    job_type: ClassVar[str]
    counts: ClassVar[str]
    decisions: ClassVar[frozenset[str]]
    holds_at: ClassVar[str]
    pivots: ClassVar[bool]

    @property
    def plan(self) -> Plan:
        """What it carries out."""
        ...

    async def start(self, run: "Run") -> None:
        """PLANNED to COPYING: ask for the job. Raises Refused, and what a lost session raises."""
        ...

    async def safeguards(self, run: "Run", doorbell: Doorbell, job: Job) -> None:
        """
        COPYING to SAFE: all that must be so before anything is switched.

        Raises Displaced, CutShort, NotDurable, NotVerified or BitmapsNotCarried with the job taken back.
        """
        ...

    async def switch(self, run: "Run", doorbell: Doorbell, job: Job) -> Job | None:
        """
        SAFE to SWITCHING, and through it: the job is told to end, and returned as it ended. From where it can no longer be
        taken back it does not heed a cancellation.

        Raises Displaced, CutShort or RecordFailed with the job taken back.
        """
        ...

    async def end_of(self, run: "Run", doorbell: Doorbell, job: Job | None) -> Job | None:
        """The job as it has ended, where QEMU has it still or what it left tells; else None, and only the proof can tell."""
        ...

    async def make_durable(self, run: "Run") -> None:
        """After the switch, what the proof needs to be durable. Raises HeaderNotDurable."""
        ...

    async def let_go(self, run: "Run") -> None:
        """After the job, however it has ended: what it has left in use in QEMU."""
        ...

    async def relink(self, run: "Run") -> None:
        """After a crash that left the new chain in use: a header that was left behind is written. Raises CannotRecover."""
        ...

    async def evidence(
        self, record: Record, target: Target | None, use: "Use | None" = None, *, layout: Layout | None = None
    ) -> "Judgement":
        """How `record` was left, as `recovery.evidence.judge` looks at it. Raises Undecided, and what asking QEMU raises."""
        ...

    @property
    def left_behind(self) -> str | None:
        """What the user should know of one that is held, or was taken back, once the job has copied something."""
        ...

    def advice(self, merged: tuple[MergedFile, ...], *, may_be_deleted: bool) -> list[str]:
        """What the user should know after an outcome that is proved, and how to delete what left, where it may be."""
        ...
