"""
What was begun, and left: how it stands, and the way from there to an end. `commit`, `follow`, `recover` and the same command
again all come in here or through `Run.resume`, with one record.

Whoever died at whatever moment, the record says what was under way and `recovery.evidence` which image is right. What is
done about it can itself be interrupted anywhere and be done again: each step leaves a state that is judged the same way.
"""

import contextlib
import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from qmpmerge import folder
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import MergedFile, Outcome
from qmpmerge.chain.state import State
from qmpmerge.engine import directions, log
from qmpmerge.engine.request import Request
from qmpmerge.engine.run import Run
from qmpmerge.errors import (
    CannotRecover,
    Error,
    FlushUnavailable,
    ImageUnreadable,
    NotDurable,
    QemuRefused,
    Undecided,
    Unfinished,
    Unreachable,
    unproven,
)
from qmpmerge.images import files, qemuimg
from qmpmerge.journal import locks, store
from qmpmerge.journal.locks import Lock
from qmpmerge.journal.record import Record
from qmpmerge.processes import proc
from qmpmerge.qemu import flush, jobs, vmstate
from qmpmerge.qemu.blockgraph import FILTERS, Layout
from qmpmerge.recovery.claims import Vouched, refuse_foreign
from qmpmerge.recovery.evidence import Judgement, Use, Way, see_unused
from qmpmerge.targets.live import live
from qmpmerge.targets.target import ChainView, Target
from qmpmerge.value import Value


class Recovery(Value):
    """
    What became of one merge that was not finished, or of none.

    `verdict` is ``done``, ``planned`` (a dry run), ``running`` (a job is at work), ``unchanged``, or that of the `error` for
    which one of several merges was not put right. `right` is the image to
    start the VM from, `reasons` why, `merged` what was done with the merged files, where the merge was finished.
    """

    verdict: str
    file: str
    start_from: str | None
    message: str
    reasons: tuple[str, ...] = ()
    merged: tuple[MergedFile, ...] = ()
    hints: tuple[str, ...] = ()
    error: Error | None = None


@dataclass
class Settled:
    """
    What came of earlier merges: the `outcome` of one that had happened, the records that are `left` (their jobs go on, or
    somebody is at work on them), and whether anything was `changed`.
    """

    outcome: Outcome | None = None
    left: list[Record] = field(default_factory=list)
    changed: bool = False


_ENDED_BY_ANOTHER = "another qmpmerge has ended the merge meanwhile"

# --- recover ----------------------------------------------------------------------------------------------------------


async def recover(record: Record, use: Use | None, *, allow: Collection[str] = (), dry_run: bool) -> Recovery:
    """
    Bring one merge to an end, as the evidence says, or where that does not decide, as the user does with `use`. The QEMU that
    carried it out is found by the record's word, so it does not vouch for files; `allow` does.

    Raises Undecided, ForeignFile, Locked, Overtaken, InUse, CannotRecover, VmState, and what a session with that QEMU raises.
    """
    async with _carrier(record) as target:
        with locks.taken_for(record.plan) as lock:
            now = store.again(record)
            if now is None:
                return Recovery("unchanged", record.chain.active.file, None, _ENDED_BY_ANOTHER)
            with _headers_told(now):
                judged = await _told(now, directions.operation(now.plan).evidence(now, target, use))
                if target is None:
                    await see_unused(now, judged, None)
                refuse_foreign(now, [judged.way], Vouched(allow=tuple(allow)))
                if dry_run:
                    action = _action(judged, now)
                    return Recovery("planned", now.chain.active.file, judged.right, action, judged.reasons)
                return await _ended(now, judged, target, lock)


@contextlib.contextmanager
def _headers_told(record: Record) -> Iterator[None]:
    """Who watches is told what the headers say before and after, whatever names the files have then."""
    log.headers("before", record.found())
    try:
        yield
    finally:
        log.headers("after", record.found())


async def _told(record: Record, judging: Awaitable[Judgement]) -> Judgement:
    """Tell of what was left, of the evidence, and of what it decides, if it does."""
    top, base = record.plan.top.file, record.plan.receiver.file
    left = "{direction} of {top} into {receiver} was left at {state}"
    of = {"about": record.job, "target": record.target}
    facts = {"direction": record.direction, "top": top, "receiver": base, "state": record.state.name}
    log.step("left", left, **of, **facts)
    try:
        judged = await judging
    except Undecided as error:
        for reason in error.evidence:
            log.step("evidence", "undecided: {reason}", **of, reason=reason)
        raise
    for reason in judged.reasons:
        log.step("evidence", "because {reason}", **of, reason=reason)
    decided = "{action}; {right} is right"
    log.step("decided", decided, **of, way=judged.way, action=_action(judged, record), right=judged.right)
    return judged


@contextlib.asynccontextmanager
async def _carrier(record: Record) -> AsyncIterator[Target | None]:
    """A session with the QEMU that carried the merge out; None where it is gone, as a private daemon always is."""
    if not record.is_live or (record.qemu is not None and not record.qemu.is_alive):
        yield None
        return
    async with contextlib.AsyncExitStack() as stack:
        try:
            session = live(record.target, force=("libvirt",))
            target: Target | None = await stack.enter_async_context(session)
        except Unreachable:
            if record.qemu is not None:
                raise
            target = None
        yield target


# --- the next merge ---------------------------------------------------------------------------------------------------


async def settle(target: Target, view: ChainView, records: Sequence[Record]) -> Settled:
    """
    Before a merge: end what an earlier one of the chain left, where that is beyond doubt. Raises Unfinished, ForeignFile,
    Locked, Overtaken, InUse, VmState.
    """
    settled, vouched = Settled(), Vouched.by(view.chain, target)
    for record in records:
        if not record.is_abandoned:
            settled.left.append(record)
            continue
        way, outcome = await _settled(record, target, None if settled.changed else view.layout, vouched)
        if way == "leave":
            settled.left.append(record)
        else:
            settled.changed = True
        settled.outcome = outcome or settled.outcome
    return settled


async def settle_image(image: str, *, allow: Collection[str] = ()) -> Outcome | None:
    """The same for an image whose name is gone, or whose chain cannot be opened as it is. Raises RecordNotBelieved too."""
    found = store.beside(image)
    if found is None:
        return None
    (record,) = store.believed([found])
    async with _carrier(record) as target:
        return (await _settled(record, target, None, Vouched(allow=tuple(allow))))[1]


async def foresee(target: Target, view: ChainView, records: Sequence[Record]) -> None:
    """See that `settle` would end what was left, and end nothing. Raises Unfinished, ForeignFile, InUse."""
    vouched = Vouched.by(view.chain, target)
    for record in records:
        if record.is_abandoned:
            await _judged(record, target, view.layout, vouched)


async def _settled(
    record: Record, target: Target | None, layout: Layout | None, vouched: Vouched
) -> tuple[Way | None, Outcome | None]:
    """What was done, None where another qmpmerge has done it meanwhile."""
    with locks.taken_for(record.plan) as lock:
        now = store.again(record)
        if now is None:
            return None, None
        if not now.is_abandoned:
            return "leave", None
        judged = await _judged(now, target, layout if now == record else None, vouched)
        recovery = await _ended(now, judged, _carrier_of(now, target), lock)
    return judged.way, _outcome(now, recovery) if judged.way == "finish" else None


def _outcome(record: Record, recovery: Recovery) -> Outcome:
    verdict, result = directions.operation(record.plan).verdict, record.plan.result
    hints = ("an earlier run had merged them; what remained was done now", *recovery.hints)
    after = Chain(tuple(replace(image, inode=files.inode(image.file)) for image in result))
    return Outcome(verdict, record.disk, record.chain, after, merged=recovery.merged, hints=hints)


async def _judged(record: Record, target: Target | None, layout: Layout | None, vouched: Vouched) -> Judgement:
    """What can be ended by itself. Raises Unfinished, ForeignFile, InUse."""
    carrier = _carrier_of(record, target)
    try:
        judged = await directions.operation(record.plan).evidence(record, carrier, layout=layout)
        if judged.way == "repoint" or (judged.way != "leave" and carrier is None and _runs(record)):
            raise _unfinished(record, judged.reasons)
        if carrier is None:
            await see_unused(record, judged, target)
    except Undecided as error:
        raise _unfinished(record, error.evidence) from None
    refuse_foreign(record, [judged.way], vouched)
    return judged


def _carrier_of(record: Record, target: Target | None) -> Target | None:
    """The target, where it is the QEMU that carried the merge out."""
    if target is None or not (target.is_live and record.is_live):
        return None
    return target if record.qemu is None or record.qemu == proc.process(target.pid or 0) else None


def _runs(record: Record) -> bool:
    """Whether the QEMU that carried it out runs, though we have no session with it."""
    return record.is_live and record.qemu is not None and record.qemu.is_alive


def _unfinished(record: Record, reasons: Sequence[str]) -> Unfinished:
    image = record.chain.active.file
    return Unfinished(image=image, found="; ".join(reasons), path=image)


# --- from the evidence to an end --------------------------------------------------------------------------------------


async def _ended(record: Record, judged: Judgement, target: Target | None, lock: Lock) -> Recovery:
    """Do what was judged. Raises CannotRecover, VmState."""
    image = record.chain.active.file
    if target is not None and judged.way != "leave":
        target.monitor.has_acted = True
        known, ours = (await target.layout()).nodes, {image.node for image in record.chain}
        await vmstate.check(target.monitor, [node for name, node in known.items() if name in ours])
    run = Run.resume(target, directions.operation(record.plan), Request(), lock, record=record, state=judged.state)
    merged: tuple[MergedFile, ...] = ()
    try:
        if judged.way == "leave":
            again = shlex.join(["qmpmerge", "job", record.target, record.job, "follow"])
            run.notes.append(f"`{again}` goes on with it")
        elif judged.way == "finish":
            _delete_nothing(run)
            merged = await _finished(run)
            run.notes[:0] = run.operation.advice(merged, may_be_deleted=run.may_be_deleted)
        else:
            await _undone(run, judged)
            left = run.operation.left_behind if judged.way == "back" else None
            run.notes[:0] = [left] if left is not None else []
        if judged.way != "leave" and target is not None:
            await run.operation.let_go(run)
        if judged.way != "leave" and run.record is not None:
            raise CannotRecover(file=image, reason=run.notes[-1])
    except OSError as error:
        raise CannotRecover(file=error.filename or image, reason=error.strerror or str(error)) from None
    verdict = "running" if judged.way == "leave" else "done"
    return Recovery(verdict, image, judged.right, _action(judged, record), judged.reasons, merged, tuple(run.notes))


def _delete_nothing(run: Run) -> None:
    """On a record's word: what was to be is put aside, but for what a pull leaves and nobody has compared, which stays."""
    record = run.record
    if record is not None and record.policy == "delete" and (record.direction == "commit" or run.is_all_verified):
        run.record = replace(record, policy="stash")
        run.notes.append("nothing is deleted on a record's word: what was to be is stashed")


def _action(judged: Judgement, record: Record) -> str:
    """For what was done, and for what would be."""
    return {
        "back": "the merge did not happen, the old chain keeps its names",
        "finish": "the merge had happened, what was left over is its files",
        "repoint": f"{record.chain[min(record.top + 1, len(record.chain))].name} goes back to its old backing file",
        "leave": "its job is there still",
    }[judged.way]


async def _finished(run: Run) -> tuple[MergedFile, ...]:
    """The new chain is right: make it durable, then deal with the merged files. Raises OSError, CannotRecover."""
    await run.operation.relink(run)
    nodes = (await run.carrier.layout()).nodes if run.carrier is not None else {}
    for image in run.plan.written:
        try:
            if image.node not in nodes and files.is_regular(
                image.file
            ):  # where its disk was unplugged QEMU has closed it
                files.sync(image.file)
            elif run.carrier is not None and run.plan.overlay is not None:
                await flush.flush(run.carrier.monitor, image, header_only=image is not run.plan.receiver)
        except (NotDurable, FlushUnavailable) as error:
            raise CannotRecover(file=image.file, reason=error.reason) from None
    if run.carrier is not None:
        with unproven(run.carrier.name, str(run.plan.result)):
            with contextlib.suppress(QemuRefused):
                await jobs.dismiss(run.carrier.monitor, run.job)
            await run.carrier.close(_left_open(run, await run.carrier.layout()))
    run.proved()  # before any file is dealt with
    return run.finish(State.DONE)


def _left_open(run: Run, layout: Layout) -> list[str]:
    """The nodes of the merged images, where they still are those and no others of the same name, and filters above them."""
    plan = run.plan
    filters = [node for node in run.old_nodes if node in layout.nodes and layout.nodes[node].driver in FILTERS]
    nodes = layout.between(plan.top.node or "", plan.base.node if plan.base is not None else None)
    files_there = {os.path.basename(str(layout.nodes[node].info.get("file"))) for node in nodes}
    return [*filters, *nodes] if plan.top.name in files_there else []


async def _undone(run: Run, judged: Judgement) -> None:
    """The old chain is right: give it its names, and where need be its header, back. Raises OSError, CannotRecover."""
    run.give_names_back()
    overlay = run.plan.overlay
    if judged.way == "repoint" and overlay is not None and overlay.backing is not None:
        await _repointed(run, overlay, overlay.backing)
    run.undone()


async def _repointed(run: Run, overlay: Image, backing: str) -> None:
    """The overlay's header gets this backing name back, durably. Raises OSError, CannotRecover."""
    with folder.reading(overlay.file, os.O_RDWR) as file:
        if run.record is not None and not run.record.is_inode(file.inode, overlay):
            reason = "it is another file than the one whose header is to be written"
            raise CannotRecover(file=overlay.file, reason=reason)
        try:
            await qemuimg.repoint(file, backing, run.plan.top.format)
        except ImageUnreadable as error:
            raise CannotRecover(file=overlay.file, reason=error.reason) from None
        file.sync()
