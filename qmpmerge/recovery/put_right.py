"""Put names and headers right, as the evidence says."""

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from qmpmerge.chain.outcome import MergedFile, files_advice, launch_advice
from qmpmerge.chain.state import State
from qmpmerge.errors import CannotRecover, CommandError, FlushUnavailable, ImageUnreadable, NotDurable, Unreachable
from qmpmerge.images import files, qemuimg
from qmpmerge.journal import merged_files, store
from qmpmerge.journal.record import Record
from qmpmerge.qemu import flush, jobs
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.qemu.monitor import Trace
from qmpmerge.recovery.evidence import Judgement
from qmpmerge.targets.target import Host


@dataclass(frozen=True)
class Recovery:
    """
    What became of one merge that was not finished, or of none.

    `verdict` is ``done``, ``planned`` (a dry run), ``running`` (a job is at work), or ``unchanged``. `right` is the image to
    start the VM from, `reasons` why, `merged` what was done with the merged files, where the merge was finished.
    """

    verdict: str
    image: str
    right: str | None
    action: str
    reasons: tuple[str, ...] = ()
    merged: tuple[MergedFile, ...] = ()
    hints: tuple[str, ...] = ()


@contextlib.asynccontextmanager
async def carrier(record: Record, trace: Trace | None) -> AsyncIterator[Host | None]:
    """A session with the QEMU that carried the merge out; None where it is gone, as a private daemon always is."""
    if not record.is_live or (record.qemu is not None and not record.qemu.is_alive):
        yield None
        return
    from qmpmerge.targets.live import live  # only here a door is needed

    async with contextlib.AsyncExitStack() as stack:
        try:
            host: Host | None = await stack.enter_async_context(
                live(record.target, force=frozenset({"libvirt"}), trace=trace)
            )
        except Unreachable:
            if record.qemu is not None:
                raise
            host = None
        yield host


async def put_right(record: Record, judged: Judgement, host: Host | None) -> Recovery:
    """Do what was judged. Raises CannotRecover."""
    image = record.chain.active.file
    merged: list[MergedFile] = []
    hints: list[str] = []
    try:
        if judged.way == "leave":
            hints.append(f"`qmpmerge job {record.target} {record.job} follow` goes on with it")
        elif judged.way == "finish":
            merged, hints = await finish(record, host)
            hints = [*_advice(record, merged), *hints]
        else:
            await undo(record, judged)
    except OSError as error:
        raise CannotRecover(file=error.filename or image, reason=error.strerror or str(error)) from None
    verdict = "running" if judged.way == "leave" else "done"
    return Recovery(
        verdict, image, judged.right, action_of(judged, record), judged.reasons, tuple(merged), tuple(hints)
    )


def _advice(record: Record, merged: list[MergedFile]) -> list[str]:
    launch = launch_advice(record.plan.base.file, merged[-1]) if record.plan.pivots else []
    return [*launch, *files_advice(merged)]


def action_of(judged: Judgement, record: Record) -> str:
    """For what was done, and for what would be."""
    return {
        "back": "the merge did not happen, the old chain keeps its names",
        "finish": "the merge had happened, what was left over is its files",
        "repoint": f"{record.chain[min(record.top + 1, len(record.chain))].name} goes back to its old backing file",
        "leave": "a job is at work",
    }[judged.way]


async def finish(record: Record, host: Host | None) -> tuple[list[MergedFile], list[str]]:
    """The new chain is right: make it durable, then deal with the merged files. Raises OSError, CannotRecover."""
    await _make_durable(record, host)
    if host is not None:
        with contextlib.suppress(CommandError):
            await jobs.dismiss(host.monitor, record.job)
        await host.close(_left_open(record, await host.layout()))
    record = store.mark(replace(record, state=State.PROVED))
    store.sync(record)
    merged, hints = await merged_files.finish(record)
    store.remove(record)
    return merged, hints


def _left_open(record: Record, layout: Layout) -> list[str]:
    """The nodes of the merged images, where they still are those and no others of the same name."""
    top, base = record.plan.top, record.chain[record.base]
    nodes = layout.between(top.node or "", base.node or "")
    files_there = {os.path.basename(str(layout.nodes[node].info.get("file"))) for node in nodes}
    return nodes if top.name in files_there else []


async def _make_durable(record: Record, host: Host | None) -> None:
    overlay = record.plan.overlay
    for image in (record.chain[record.base], *([overlay] if overlay is not None else [])):
        try:
            if host is not None and overlay is not None:
                await flush.flush(host.monitor, image)
            elif host is None and files.is_regular(image.file):
                files.sync(image.file)
        except (NotDurable, FlushUnavailable) as error:
            raise CannotRecover(file=image.file, reason=error.reason) from None


async def undo(record: Record, judged: Judgement) -> None:
    """The old chain is right: give it its names, and where need be its header, back. Raises OSError, CannotRecover."""
    for index in range(record.base + 1, record.top + 1):
        if record.place(index) is None and record.chain[index].inode is not None:
            raise CannotRecover(file=record.chain[index].file, reason="it is neither there nor under its stashed name")
        merged_files.give_back(record, index)
    overlay = record.plan.overlay
    if judged.way == "repoint" and overlay is not None and overlay.backing is not None:
        try:
            await qemuimg.repoint(overlay.file, overlay.backing, record.plan.top.format)
        except ImageUnreadable as error:
            raise CannotRecover(file=overlay.file, reason=error.reason) from None
        files.sync(overlay.file)
    store.remove(record)
