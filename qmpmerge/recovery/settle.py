"""What an earlier merge left is put right before the next one begins."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import Outcome
from qmpmerge.errors import Undecided, Unfinished
from qmpmerge.images import files
from qmpmerge.journal import locks, store
from qmpmerge.journal.record import Record
from qmpmerge.processes import proc
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.monitor import Trace
from qmpmerge.recovery import evidence, put_right
from qmpmerge.targets.target import ChainView, Host


@dataclass
class Settled:
    """
    What came of it: the `outcome` of a merge that had happened, the records that are `left` (their jobs go on, or somebody
    is at work on them), and whether anything was `changed`.
    """

    outcome: Outcome | None = None
    left: list[Record] = field(default_factory=list)
    changed: bool = False


async def settle(host: Host, view: ChainView, records: Sequence[Record]) -> Settled:
    """
    Before a merge: put right what an earlier one of the chain left, where that is beyond doubt. Raises Unfinished, Locked.
    """
    settled = Settled()
    for record in records:
        if not record.is_abandoned:
            settled.left.append(record)
            continue
        way, outcome = await _settled(record, host, None if settled.changed else view.layout)
        if way == "leave":
            settled.left.append(record)
        else:
            settled.changed = True
        settled.outcome = outcome or settled.outcome
    return settled


async def resume(image: str, *, trace: Trace | None = None) -> Outcome | None:
    """The same for an image whose name is gone, or whose chain cannot be opened as it is. Raises RecordNotBelieved too."""
    found = store.beside(image)
    if found is None:
        return None
    (record,) = store.believed([found])
    async with put_right.carrier(record, trace) as host:
        return (await _settled(record, host, None))[1]


async def _settled(record: Record, host: Host | None, layout: Layout | None) -> tuple[evidence.Way, Outcome | None]:
    carrier = host if host is not None and _is_carrier(record, host) else None
    try:
        with locks.taken_for(record.plan) as lock:
            judged = await evidence.judge(record, carrier, layout=layout)
            if judged.way == "repoint" or (judged.way != "leave" and carrier is None and _runs(record)):
                raise _unfinished(record, judged.reasons)
            recovery = await put_right.put_right(record, judged, carrier)
            if judged.way != "leave":
                lock.forget_record()
    except Undecided as error:
        raise _unfinished(record, error.evidence) from None
    if judged.way != "finish":
        return judged.way, None
    verdict = "pivoted" if record.plan.pivots else "merged"
    hints = ("an earlier run had merged them; what remained was done now", *recovery.hints)
    after = Chain(tuple(map(_now, record.plan.result)))
    return judged.way, Outcome(verdict, record.disk, record.chain, after, record.job, recovery.merged, hints=hints)


def _now(image: Image) -> Image:
    return replace(image, inode=files.inode(image.file))


def _is_carrier(record: Record, host: Host) -> bool:
    return host.is_live and record.is_live and (record.qemu is None or record.qemu == proc.process(host.pid or 0))


def _runs(record: Record) -> bool:
    """Whether the QEMU that carried it out runs, though we have no session with it."""
    return record.is_live and record.qemu is not None and record.qemu.is_alive


def _unfinished(record: Record, reasons: Sequence[str]) -> Unfinished:
    image = record.chain.active.file
    return Unfinished(image=image, found="; ".join(reasons), path=image)
