"""What an earlier merge left is put right before the next one begins."""

from dataclasses import replace

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import Outcome
from qmpmerge.errors import Undecided, Unfinished
from qmpmerge.images import files
from qmpmerge.journal import locks, store
from qmpmerge.journal.record import Witness
from qmpmerge.processes import proc
from qmpmerge.qemu.monitor import Trace
from qmpmerge.recovery import evidence, put_right
from qmpmerge.targets.target import Host


async def settle(host: Host, chain: Chain) -> Outcome | None:
    """
    Before a merge: put right what an earlier one of the chain left, where that is beyond doubt.

    Returns its outcome where it had happened, None where there was nothing or it had not. Raises Unfinished.
    """
    outcome = None
    for told in store.about(chain):
        if told.is_abandoned:
            outcome = await _settled(told, host) or outcome
    return outcome


async def resume(image: str, *, trace: Trace | None = None) -> Outcome | None:
    """The same for an image whose name is gone, or whose chain cannot be opened as it is."""
    told = store.beside(image)
    if told is None:
        return None
    async with put_right.carrier(told, trace) as host:
        return await _settled(told, host)


async def _settled(told: Witness, host: Host | None) -> Outcome | None:
    carrier = host if host is not None and _is_carrier(told, host) else None
    try:
        with locks.held(told.chain[told.base]) as lock:
            judged = await evidence.judge(told, carrier)
            if judged.way == "repoint" or (judged.way != "leave" and carrier is None and _runs(told)):
                raise _unfinished(told, judged.reasons)
            recovery = await put_right.put_right(told, judged, carrier)
            put_right.clear_note(lock, told, judged)
    except Undecided as error:
        raise _unfinished(told, error.evidence) from None
    if judged.way != "finish":
        return None
    verdict = "pivoted" if told.plan.pivots else "merged"
    hints = ("an earlier run had merged them; what remained was done now", *recovery.hints)
    after = Chain(tuple(map(_now, told.plan.result)))
    return Outcome(verdict, told.disk, told.chain, after, told.job, recovery.merged, hints=hints)


def _now(image: Image) -> Image:
    return replace(image, inode=files.inode(image.file))


def _is_carrier(told: Witness, host: Host) -> bool:
    return host.is_live and told.is_live and (told.qemu is None or told.qemu == proc.process(host.pid or 0))


def _runs(told: Witness) -> bool:
    """Whether the QEMU that carried it out runs, though we have no session with it."""
    return told.is_live and told.qemu is not None and told.qemu.is_alive


def _unfinished(told: Witness, reasons: "tuple[str, ...] | list[str]") -> Unfinished:
    image = told.chain.active.file
    return Unfinished(image=image, found="; ".join(reasons), path=image)
