"""
The steps of a merge up to the switch: until then everything can be taken back.
"""

import time
from dataclasses import dataclass, field

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import Ending, Policy
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.engine.converge import Converge
from qmpmerge.engine.patience import Patience
from qmpmerge.engine.progress import Report
from qmpmerge.engine.rates import Watch
from qmpmerge.guest.deadman import Switch
from qmpmerge.journal.locks import Lock
from qmpmerge.journal.record import Witness
from qmpmerge.qemu import jobs
from qmpmerge.qemu.bitmaps import Bitmap
from qmpmerge.qemu.blockgraph import Disk
from qmpmerge.qemu.flush import flush as flush_flush
from qmpmerge.targets.target import ChainView, Host


@dataclass
class Merge:
    """
    One merge under way: the values that every step needs.

    `suspect` is the error of an earlier merge into the same base: what the base shows must be compared. `is_started`
    says that QEMU has confirmed the start, `let_go` that the overlay is kept, `switching` that the switch has begun.
    """

    host: Host
    disk: Disk
    plan: CommitPlan
    ending: Ending
    report: Report
    patience: Patience
    old_nodes: list[str]
    base_driver: str
    job: str
    verify: bool | None = None
    suspect: str | None = None
    is_started: bool = True
    let_go: bool = False
    switching: bool = False
    verified: bool = False
    base_is_durable: bool = False
    policy: Policy = "stash"
    pauses: bool = True
    witness: Witness | None = None
    guard: Switch | None = None
    paused_ms: float | None = None
    notes: list[str] = field(default_factory=list)
    converge: Converge | None = None
    watch: Watch = field(default_factory=Watch)
    copied: int | None = None
    bitmaps: tuple[Bitmap, ...] = ()
    started: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float | None:
        """Until when we wait, in `time.monotonic` seconds."""
        return self.patience.deadline

    def name_after(self, expected: Chain) -> str:
        """What the disk is called once its active image may have changed."""
        return self.disk.drive or self.disk.qdev or expected.active.node or expected.active.file

    async def flush(self, image: Image) -> bool:
        """As `durable.flush` does."""
        return await flush_flush(self.host.monitor, image, opened=self.host.opened.get(image.node or ""))


def begin(
    host: Host,
    view: ChainView,
    planned: CommitPlan,
    ending: Ending,
    report: Report,
    patience: Patience,
    verify: bool | None = None,
    *,
    policy: Policy = "stash",
    pauses: bool = True,
) -> Merge:
    """The values of a merge whose job is to be started, or runs already."""
    return Merge(
        host=host,
        disk=view.disk,
        plan=planned,
        ending=ending,
        report=report,
        patience=patience,
        old_nodes=view.layout.between(planned.top.node or "", planned.base.node or ""),
        base_driver=view.layout.nodes[planned.base.node or ""].driver,
        verify=True if policy == "delete" else verify,
        policy=policy,
        pauses=pauses,
        job=view.disk.job.id if view.disk.job else jobs.job_id(view.disk.name),
    )


@dataclass
class Begun:
    """A merge to be run, under its lock. `speed` is None where its job is there already."""

    merge: Merge
    lock: Lock
    speed: int | None = None
