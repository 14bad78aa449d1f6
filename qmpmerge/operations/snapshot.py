"""
Overlays (external snapshots) on one or more disks, all or nothing.

The files are made by us, never over an existing one: QEMU's own `blockdev-snapshot-sync` overwrites whatever is there and
writes absolute backing names. Then each is opened as a node, and one `transaction` puts them all on top.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from dataclasses import replace

from qmpmerge import given, shield
from qmpmerge.chain.chain import Chain, told_apart
from qmpmerge.checks.files import held, led_astray
from qmpmerge.engine import earlier, log
from qmpmerge.engine.pace.progress import unreported
from qmpmerge.errors import (
    FileExists,
    NotProven,
    OptionsConflict,
    refuse,
    unproven,
)
from qmpmerge.folder import File
from qmpmerge.images import notes
from qmpmerge.images.files import is_device
from qmpmerge.journal import store
from qmpmerge.operations import overlay
from qmpmerge.operations.orders import Order, of_disk
from qmpmerge.processes import proc
from qmpmerge.qemu import vmstate
from qmpmerge.qemu.blockgraph import Layout
from qmpmerge.targets import identity
from qmpmerge.targets.target import Target
from qmpmerge.value import Value


class Overlay(Value):
    """
    An overlay that is now the active image of `disk`: its absolute path, its node, and the `backing` string in its header. The
    VM must be started from it from now on, and not from `backing_file`, which is the image below it. `ask` is what a launch
    script can name to `active` for years: the lowest image of the chain that is a file. `hint` is what else is to be known.
    After a dry run there is no node, and nothing of it is true yet.
    """

    disk: str
    file: str
    node: str | None
    backing_file: str
    hint: str = ""
    ask: str = ""
    backing: str = ""


async def snapshot(
    target: Target,
    files: Mapping[str, str | os.PathLike[str]],
    *,
    reuse: bool = False,
    dry_run: bool = False,
    quiesce: bool | str | os.PathLike[str] = False,
    force: Collection[str] = (),
) -> tuple[Overlay, ...]:
    """
    Put a new overlay on each disk of `files` (disk to path of the file to be made), on all of them or on none.

    The backing name is written relative where the overlay lies in the folder of the image below it. With `reuse` the overlays
    are there already, files or block devices, with headers that name the image below; they must hold nothing of their own. A
    `dry_run` checks all that can be checked, and changes nothing. With `quiesce` the guest's filesystems are frozen for the
    moment of the snapshot: by the guest agent whose socket QEMU's configuration tells, or that is at this path. `force` can
    hold ``in-use``: who else has an active image open may see it.

    Raises VmState, RecordNotBelieved, FileExists, CannotCreate, NotAnOverlay, OverlayNotEmpty, NotWritable, Busy, Temporary,
    Replaced, InUse, BackingString, QemuRefused, NoAgent, AgentFailed; NotProven when a fresh look does not show the overlays.
    """
    forced = given.forced(force)
    layout = await (target.layout() if dry_run else _without_ended_jobs(target, files))
    nodes = [node for disk in files for node in layout.nodes_of(layout.find(disk, target.name))]
    await vmstate.check(target.monitor, nodes)
    _refuse_unknown(target, layout, files)
    await _refuse_used(target, layout, files, forced)
    orders = [await of_disk(target, layout, disk, os.fspath(file), reuse) for disk, file in files.items()]
    _refuse_twice(orders)
    _refuse_replaced(target, layout, orders)
    socket = await _agent(target, quiesce)
    rivals = [await overlay.rival(target, order) for order in orders]
    if dry_run:
        for order in orders:
            overlay.see_creatable(order) if not order.is_reused else None
        made = tuple(map(_planned, orders))
    else:
        made = await shield.finished(_carry_out(target, layout, orders, socket))
    return tuple(
        replace(one, hint="; ".join(filter(None, (one.hint, rival)))) for one, rival in zip(made, rivals, strict=True)
    )


async def _without_ended_jobs(target: Target, disks: Iterable[str]) -> Layout:
    """A merge of ours that ended while nobody looked keeps no disk busy."""
    layout = await target.layout()
    if not any(job.ours and job.status == "concluded" for job in layout.jobs):
        return layout
    for disk in disks:
        view = await target.view(layout, disk)
        records = store.believed(store.about(view.chain))
        await earlier.without_concluded(target, view, records, unreported)
    return await target.layout()


def _refuse_unknown(target: Target, layout: Layout, disks: Iterable[str]) -> None:
    """What an earlier merge has left must not be buried. Raises RecordNotBelieved."""
    chains = [layout.find(disk, target.name).chain for disk in disks]
    store.believed([found for chain in chains if chain is not None for found in store.about(chain)])


async def _refuse_used(target: Target, layout: Layout, disks: Iterable[str], force: Collection[str]) -> None:
    """What becomes a backing file is taken not to change any more. Raises InUse, SeveralRefusals."""
    if "in-use" in force or not target.is_live or target.pid is None:
        return
    from qmpmerge.processes import holders

    chains = [layout.find(disk, target.name).chain for disk in disks]
    active = [chain.active.file for chain in chains if chain is not None and chain.active.has_path]
    refuse(list(held(active, await holders.lasting(active, excluding=[target.pid]))))


def _refuse_replaced(target: Target, layout: Layout, orders: list[Order]) -> None:
    """QEMU opens the image that it has written to again by its name, to read it only. Raises Replaced, NotReopenable."""
    for order in orders:
        astray = identity.astray(order.below, target.pid)
        if astray is not None:
            raise identity.refusal(astray, target)
        if (lost := led_astray(layout, order.below, target.pid)) is not None:
            raise lost


def _refuse_twice(orders: list[Order]) -> None:
    roots = [order.disk.root for order in orders]
    paths = [proc.identity(order.file) or order.file for order in orders]
    for order in orders:
        if roots.count(order.disk.root) > 1:
            raise OptionsConflict(options=[f"{other.disk.name}={other.file}" for other in orders])
        if paths.count(proc.identity(order.file) or order.file) > 1:
            raise FileExists(file=order.file)


async def _agent(target: Target, quiesce: bool | str | os.PathLike[str]) -> str | None:
    if not isinstance(quiesce, bool):
        return os.fspath(quiesce)
    if not quiesce:
        return None
    from qmpmerge.guest import agentsocket  # only --quiesce needs it

    return await agentsocket.find(target.monitor)


async def _carry_out(target: Target, layout: Layout, orders: list[Order], agent: str | None) -> tuple[Overlay, ...]:
    async with contextlib.AsyncExitStack() as undo:
        files = [overlay.found(order) if order.is_reused else overlay.made(order) for order in orders]
        made = [await undo.enter_async_context(file) for file in files]
        unnoted = [undo.enter_context(overlay.noted(order, file)) for order, file in zip(orders, made, strict=True)]
        for order, file in zip(orders, made, strict=True):
            await undo.enter_async_context(overlay.opened(target, layout, order, file))
        await _see_empty(orders)
        async with _quiet(agent):
            _refuse_replaced(target, layout, orders)  # again, as late as can be
            await _transaction(target, orders)
            undo.pop_all()  # from here on the guest writes to the overlays, whatever the agent says
    _forget(orders)
    proved = await _prove(target, orders, made)
    for one in proved:
        log.step(
            "snapshot",
            "{file} is the active image now, and was {was}",
            about=one.disk,
            target=target.name,
            file=one.file,
            was=one.backing_file,
        )
    return tuple(replace(one, hint=hint) for one, hint in zip(proved, unnoted, strict=True))


async def _see_empty(orders: list[Order]) -> None:
    """Nobody else can write any more to what was there already."""
    for order in orders:
        if order.is_reused:
            from qmpmerge.operations import reuse

            await reuse.see_empty(order.disk.name, order.file)


def _forget(orders: list[Order]) -> None:
    """What was noted about an earlier image of the name, which was merged away; of a new file it is forgotten as it is made."""
    for order in orders:
        if order.is_reused:
            with contextlib.suppress(OSError):
                notes.forget(order.file)


async def _transaction(target: Target, orders: list[Order]) -> None:
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": order.below.node, "overlay": order.node}} for order in orders
    ]
    await target.monitor.execute("transaction", actions=actions)


@contextlib.asynccontextmanager
async def _quiet(agent: str | None) -> AsyncIterator[None]:
    if agent is None:
        yield
        return
    from qmpmerge.guest.freeze import frozen

    with log.held():  # a terminal that takes nothing would keep them frozen
        async with frozen(agent):
            yield


async def _prove(target: Target, orders: list[Order], made: list[File]) -> tuple[Overlay, ...]:
    """Every disk's chain must be what it was with the overlay on top, in the graph and in the overlay's header."""
    for order, file in zip(orders, made, strict=True):
        assert order.disk.chain is not None
        with unproven(target.name, f"{order.file} as the active image"):
            view = await target.chain(order.node)
        active = replace(view.chain.active, file=order.file, backing=order.backing, inode=file.inode)
        expected = Chain((*order.disk.chain, active))
        odd = [oddity for oddity in view.oddities if oddity.file == order.file]
        if not view.chain.same_files(expected) or view.chain.active.backing != order.backing or odd:
            words = told_apart(expected, view.chain)
            raise NotProven(target=target.name, expected=words[0], found=words[1])
    return tuple(replace(_planned(order), node=order.node) for order in orders)


def _planned(order: Order) -> Overlay:
    return Overlay(order.disk.name, order.file, None, order.below.file, ask=_lasting(order), backing=order.backing)


def _lasting(order: Order) -> str:
    assert order.disk.chain is not None
    there = [image.file for image in order.disk.chain if image.has_path and not is_device(image.file)]
    return next(iter(there), order.file)
