"""
Overlays (external snapshots) on one or more disks, all or nothing.

The files are made by us, never over an existing one: QEMU's own `blockdev-snapshot-sync` overwrites whatever is there and
writes absolute backing names. Then each is opened as a node, and one `transaction` puts them all on top.
"""

import contextlib
import os
import shlex
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from qmpmerge import folder, shield
from qmpmerge.chain import backing
from qmpmerge.chain.chain import ELSEWHERE, Chain, Image, told_apart
from qmpmerge.checks import sight
from qmpmerge.checks.files import held, led_astray
from qmpmerge.engine import earlier
from qmpmerge.errors import (
    BackingString,
    Busy,
    CannotCreate,
    FileExists,
    NotProven,
    NotSeen,
    OptionsConflict,
    QemuRefused,
    Temporary,
    Untouched,
    refuse,
    unproven,
)
from qmpmerge.folder import File
from qmpmerge.images import files, notes, qemuimg
from qmpmerge.journal import store
from qmpmerge.processes import proc
from qmpmerge.qemu import vmstate
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.targets import identity
from qmpmerge.targets.target import Target


@dataclass(frozen=True)
class Overlay:
    """
    An overlay that is now the active image of `disk`: its absolute path and its node. The VM must be started from it from
    now on, and not from `instead_of`, which is the image below it. `hint` is what the user should know besides.
    """

    disk: str
    file: str
    node: str
    instead_of: str
    hint: str = ""


@dataclass(frozen=True)
class _Order:
    """One overlay to make: on which disk, where, with which backing string in its header."""

    disk: Disk
    below: Image
    file: str
    backing: str
    node: str


async def snapshot(
    target: Target,
    files: Mapping[str, str | os.PathLike[str]],
    *,
    relative: bool = False,
    agent: str | os.PathLike[str] | None = None,
    force: Collection[str] = (),
) -> tuple[Overlay, ...]:
    """
    Put a new overlay on each disk of `files` (disk to path of the file to be made), on all of them or on none.

    The backing name is written relative where the overlay lies in the folder of the image below it, or where `relative`
    asks for it. `agent` is the socket of the guest agent: the guest's filesystems are frozen for the moment of the
    snapshot. `force` can hold ``in-use``: who else has an active image open may see it.

    Raises VmState, RecordNotBelieved, FileExists, CannotCreate, Busy, Temporary, Replaced, InUse, BackingString, QemuRefused,
    AgentFailed; NotProven when a fresh look does not show the overlays.
    """
    layout = await _without_ended_jobs(target, files)
    nodes = [node for disk in files for node in layout.nodes_of(layout.find(disk, target.name))]
    await vmstate.check(target.monitor, nodes)
    _refuse_unknown(target, layout, files)
    await _refuse_used(target, layout, files, force)
    orders = [_order(target, layout, disk, os.fspath(file), relative) for disk, file in files.items()]
    _refuse_twice(orders)
    _refuse_replaced(target, layout, orders)
    return await shield.finished(_carry_out(target, layout, orders, os.fspath(agent) if agent is not None else None))


async def _without_ended_jobs(target: Target, disks: Iterable[str]) -> Layout:
    """A merge of ours that ended while nobody looked keeps no disk busy."""
    layout = await target.layout()
    if not any(job.ours and job.status == "concluded" for job in layout.jobs):
        return layout
    for disk in disks:
        view = await target.view(layout, disk)
        records = store.believed(store.about(view.chain))
        await earlier.without_concluded(target, view, records, lambda progress: None)
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


def _refuse_replaced(target: Target, layout: Layout, orders: list[_Order]) -> None:
    """QEMU opens the image that it has written to again by its name, to read it only. Raises Replaced, NotReopenable."""
    for order in orders:
        astray = identity.astray(order.below, target.pid)
        if astray is not None:
            raise identity.refusal(astray, target)
        if (lost := led_astray(layout, order.below, target.pid)) is not None:
            raise lost


def _order(target: Target, layout: Layout, name: str, file: str, relative: bool) -> _Order:
    disk = layout.find(name, target.name)
    assert disk.chain is not None, "find() returns disks with an image only"
    if disk.job is not None:
        raise Busy(disk=disk.name, job=disk.job.id, target=target.name)
    below = disk.chain.active
    if identity.is_temporary(below):
        raise Temporary(disk=disk.name, file=below.file)
    path = os.path.abspath(file)
    _refuse_unseen(target, disk.name, below, path)
    if os.path.lexists(path):
        raise FileExists(file=path)
    return _Order(disk, below, path, _backing(below, path, relative), f"qmpmerge-{uuid.uuid4().hex[:8]}")


def _refuse_unseen(target: Target, disk: str, below: Image, path: str) -> None:
    """The image below must be one that we can name, and the overlay's folder the one that QEMU sees under its name."""
    again = f"snapshot pid:{target.pid} {shlex.quote(f'{disk}={path}')}"
    folder = os.path.dirname(path)
    seen = None if target.pid is None else proc.identity(proc.as_seen_by(target.pid, folder))
    if below.is_elsewhere:
        reason, cure = sight.whereabouts(below, target.pid, again)
        raise NotSeen(unseen=[below.file.removeprefix(ELSEWHERE)], reason=reason, cure=cure)
    why = sight.doubtful(below, is_seen=target.pid is not None and bool(proc.open_files(target.pid)))
    if why is not None:
        raise NotSeen(unseen=[below.file], reason=why[0], cure=why[1])
    if seen is not None and seen != proc.identity(folder):
        cure = sight.inside(target.pid or 0, again)
        raise NotSeen(unseen=[folder], reason="QEMU sees another folder under this name", cure=cure)


def _backing(below: Image, path: str, relative: bool) -> str:
    """The string for the new header; it must lead to the image below from where the overlay will really be."""
    if not below.has_path:
        return below.file
    if below.slice is not None:
        return backing.json_name(below, path)
    folder = os.path.realpath(os.path.dirname(path))
    if not relative and folder != os.path.dirname(os.path.realpath(below.file)):
        return below.file
    name = os.path.relpath(os.path.realpath(below.file), folder)
    if ":" in name.split("/", 1)[0]:
        name = f"./{name}"  # `a:b` would be read as a protocol
    if not backing.leads_from(folder, name, below):
        raise BackingString(overlay=path, backing=name, reason="it does not lead to the present image")
    return name


def _refuse_twice(orders: list[_Order]) -> None:
    roots = [order.disk.root for order in orders]
    paths = [order.file for order in orders]
    for order in orders:
        if roots.count(order.disk.root) > 1:
            raise OptionsConflict(options=[f"{other.disk.name}={other.file}" for other in orders])
        if paths.count(order.file) > 1:
            raise FileExists(file=order.file)


async def _carry_out(target: Target, layout: Layout, orders: list[_Order], agent: str | None) -> tuple[Overlay, ...]:
    async with contextlib.AsyncExitStack() as undo:
        made = [await undo.enter_async_context(_file(order)) for order in orders]
        unnoted = [undo.enter_context(_note(order, file)) for order, file in zip(orders, made, strict=True)]
        for order, file in zip(orders, made, strict=True):
            await undo.enter_async_context(_node(target, layout, order, file))
        async with _quiet(agent):
            _refuse_replaced(target, layout, orders)  # again, as late as can be
            await _transaction(target, orders)
            undo.pop_all()  # from here on the guest writes to the overlays, whatever the agent says
    proved = await _prove(target, orders, made)
    return tuple(replace(overlay, hint=hint) for overlay, hint in zip(proved, unnoted, strict=True))


@contextlib.asynccontextmanager
async def _file(order: _Order) -> AsyncIterator[File]:
    """The overlay's file, made with the owner and mode of the image below; removed again when the block fails."""
    made = _make_empty(order)
    try:
        await qemuimg.create_overlay(
            made, size=order.below.virtual_size, backing=order.backing, backing_format=order.below.format
        )
        _make_durable(made)
        yield made
    except Untouched:
        with contextlib.suppress(OSError):
            made.remove()
        raise


def _make_durable(made: File) -> None:
    """What the guest flushes to it is worth nothing if a power cut takes its name."""
    assert made.folder is not None, "it was made in one"
    try:
        made.sync()
        made.folder.sync()
    except OSError as error:
        raise CannotCreate(file=made.path, reason=error.strerror or str(error)) from None


@contextlib.contextmanager
def _note(order: _Order, made: File) -> Iterator[str]:
    """
    A note beside an image in another folder where its overlay is, for who starts the VM; taken away again when the block
    fails. Killed in between, the overlay is empty, and a start from it shows what the image below does.

    Yields why there is no note; empty where there is one, or none is needed.
    """
    try:
        if order.below.has_path and notes.is_needed(order.below.file, order.file):
            notes.put_on(order.below.file, order.file)
    except OSError as error:
        yield (
            f"it could not be noted beside {order.below.file} that {order.file} was put on it ({error.strerror or error}): "
            f"`qmpmerge active` finds that only from {order.file}"
        )
        return
    try:
        yield ""
    except Untouched:
        with contextlib.suppress(OSError):
            notes.take_away(order.below.file, [made.inode[1]])
        raise


def _make_empty(order: _Order) -> File:
    try:
        place, name = folder.split(order.file)
        made = place.create(name)
    except FileExistsError:
        raise FileExists(file=order.file) from None
    except OSError as error:
        raise CannotCreate(file=order.file, reason=error.strerror or str(error)) from None
    with contextlib.suppress(OSError):  # a base on the network, or in a place that we may not see
        model = os.stat(order.below.file)
        made.allow((model.st_mode & 0o777) | 0o600)
        made.belong(model)
    with contextlib.suppress(OSError):
        notes.forget(order.file)
    return made


@contextlib.asynccontextmanager
async def _node(target: Target, layout: Layout, order: _Order, file: File) -> AsyncIterator[None]:
    """
    The overlay as a node, with the cache settings of the image below; closed again when the block fails. QEMU opens it by its
    name, and the guest must not write to another file: Replaced.
    """
    _see(file)
    told = layout.nodes[order.below.node or ""].info
    cache = {key: bool(told.get("cache", {}).get(key, False)) for key in ("direct", "no-flush")}
    try:
        await target.monitor.execute(
            "blockdev-add",
            driver="qcow2",
            node_name=order.node,
            backing=None,
            cache=cache,
            discard="unmap",
            detect_zeroes=told.get("detect_zeroes", "off"),
            file={"driver": "file", "filename": order.file, "cache": cache, "discard": "unmap"},
        )
        _see(file)
        if identity.is_open(Image(file.path, "qcow2", 0, inode=file.inode), target.pid) is False:
            raise identity.swapped(file.path)
        yield
    except Untouched:
        await _close(target, order)
        raise


async def _close(target: Target, order: _Order) -> None:
    """A file that QEMU has open is not to be removed. Raises NotProven where it has it still."""
    try:
        await target.monitor.execute("blockdev-del", node_name=order.node)
    except QemuRefused as error:
        expected = f"{order.file} closed again"
        with unproven(target.name, expected):
            if order.node in (await target.layout()).nodes:
                raise NotProven(target=target.name, expected=expected, found=str(error)) from None


def _see(file: File) -> None:
    """That its name still leads to it. Raises Replaced."""
    if files.inode(file.path) != file.inode:
        raise identity.swapped(file.path)


async def _transaction(target: Target, orders: list[_Order]) -> None:
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": order.below.node, "overlay": order.node}} for order in orders
    ]
    await target.monitor.execute("transaction", actions=actions)


@contextlib.asynccontextmanager
async def _quiet(agent: str | None) -> AsyncIterator[None]:
    if agent is None:
        yield
        return
    from qmpmerge.guest.freeze import frozen  # only --quiesce needs it

    async with frozen(agent):
        yield


async def _prove(target: Target, orders: list[_Order], made: list[File]) -> tuple[Overlay, ...]:
    """Every disk's chain must be what it was with the overlay on top, in the graph and in the overlay's header."""
    for order, file in zip(orders, made, strict=True):
        assert order.disk.chain is not None
        with unproven(target.name, f"{order.file} as the active image"):
            view = await target.chain(order.node)
        overlay = replace(view.chain.active, file=order.file, backing=order.backing, inode=file.inode)
        expected = Chain((*order.disk.chain, overlay))
        odd = [oddity for oddity in view.oddities if oddity.file == order.file]
        if not view.chain.same_files(expected) or view.chain.active.backing != order.backing or odd:
            words = told_apart(expected, view.chain)
            raise NotProven(target=target.name, expected=words[0], found=words[1])
    return tuple(Overlay(order.disk.name, order.file, order.node, order.below.label) for order in orders)
