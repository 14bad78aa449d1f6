"""
Checks of what QEMU and the headers say, each an async generator of refusals.
"""

from collections.abc import AsyncIterator, Iterator

from qmpmerge.chain import backing
from qmpmerge.chain.backing import is_path, leads_from
from qmpmerge.chain.chain import Image
from qmpmerge.chain.plan import CommitPlan, Plan
from qmpmerge.checks import sight
from qmpmerge.checks.known_bad import found
from qmpmerge.checks.question import Question, Unseen
from qmpmerge.errors import (
    Attached,
    BackingString,
    Busy,
    Disagrees,
    FlushUnavailable,
    KnownBad,
    NoFormat,
    Refused,
    ShorterLayer,
    Temporary,
    VmState,
    WouldLose,
)
from qmpmerge.qemu import bitmaps, details, flush, vmstate
from qmpmerge.qemu.blockgraph import Layout, Parent, qdev_id
from qmpmerge.sockets import typed
from qmpmerge.targets import identity
from qmpmerge.targets.target import Target


async def vm_state(question: Question) -> AsyncIterator[Refused | Unseen]:
    """What is inactive, or open on the other side of a migration, is not to be written to."""
    view = question.view
    try:
        reason = await vmstate.check(question.target.monitor, view.layout.nodes_of(view.disk))
    except VmState as refusal:
        yield refusal
    else:
        if reason:
            yield Unseen(reason)


async def busy(question: Question) -> AsyncIterator[Refused]:
    """QEMU takes one commit job a disk."""
    disk = question.view.disk
    if disk.job is not None:
        yield Busy(disk=disk.name, job=disk.job.id, target=question.target.name, verbs=disk.job.verbs)


async def attached(question: Question) -> AsyncIterator[Refused | Unseen]:
    """
    Who uses a layer past the disk, by the permissions that the job will ask for (block/commit.c, block/mirror.c): nobody may
    read what lies between top and base, and all must let base be written to. Images built on a layer are `dependents`.
    """
    view, plan = question.view, question.plan
    if view.disk.job is not None:
        return  # it has layers for itself, which is `busy`
    if not isinstance(plan, CommitPlan):
        return  # a stream only reads what lies below, and moves whoever uses the image above onto a filter of its own
    base, top = plan.base.node or "", plan.top.node or ""
    nodes = view.disk.nodes
    filters = view.layout.filters_below(view.disk, plan.overlay) if plan.overlay is not None else []
    for node in nodes[nodes.index(filters[0] if filters else top) + 1 : nodes.index(base) + 1]:
        past = view.layout.past(view.disk, node)
        others = [parent for parent in past if parent.kind == "block-backend" or parent.edge != "backing"]
        if any(parent.reads is None for parent in others):
            yield Unseen("QEMU does not tell what others who use these layers need")
        users = [one for one in others if (one.lets_write is False if node == base else one.reads)]
        if users:
            told = [await _told(question.target, view.layout, parent, node) for parent in users]
            names, cures = zip(*told, strict=True)
            file = next((image.file for image in view.chain if image.node == node), node)
            yield Attached(file=file, users=list(names), cure="; ".join(cures))


async def _told(target: Target, layout: Layout, parent: Parent, node: str) -> tuple[str, str]:
    """Who it is, and how it lets go."""
    name, monitor = parent.name, target.monitor
    if parent.kind == "block-driver":
        return f"node {name}", f"take node {name} away (`blockdev-del`, with what is above it)"
    if not name:
        exports = [one["id"] for one in await monitor.execute("query-block-exports") if one["node-name"] == node]
        ends = [("block-export-del", {"id": export}) for export in exports]
        return f"export {', '.join(exports)}", f"end the export: `{typed(monitor.name, *ends)}`"
    device = next((disk.qdev for disk in layout.disks if disk.root == node and disk.drive == name), "") or qdev_id(name)
    return f"device {device}", f"unplug {device} (`{typed(monitor.name, ('device_del', {'id': device}))}`)"


async def temporary(question: Question) -> AsyncIterator[Refused]:
    """The active image of a `snapshot=on` drive."""
    active = question.plan.chain.active
    if identity.is_temporary(active):
        yield Temporary(disk=question.view.disk.name, file=active.file)


async def shorter_layer(question: Question) -> AsyncIterator[Refused]:
    """Found where the plan was made."""
    for refusal in question.plan.refusals:
        if isinstance(refusal, ShorterLayer):
            yield refusal


async def disagrees(question: Question) -> AsyncIterator[Refused | Unseen]:
    """Of what leaves the chain, and of the overlay: base's own header is not touched."""
    chain = question.plan.chain
    touched = {image.file for image in question.relinked}
    for blind in sight.unread(question):
        yield blind
    below = {image.file: beneath.label for beneath, image in zip(chain, chain.images[1:], strict=False)}
    names = {image.file: image.backing for image in chain}
    for odd in question.view.oddities:
        if odd.name == "disagrees" and odd.file in touched:
            yield Disagrees(image=odd.file, header=names[odd.file] or "none", graph=below[odd.file])


async def no_format(question: Question) -> AsyncIterator[Refused | Unseen]:
    """Only of base: what lies above it are overlays, whose first bytes no guest can write."""
    child, base = question.plan.merged[0], question.plan.base
    if base is not None and any(odd.name == "no-format" and odd.file == child.file for odd in question.view.oddities):
        trusting = "; `--force no-format` trusts what this QEMU has taken it for"
        yield NoFormat(image=child.file, backing=child.backing or base.file, instead=trusting)
    for blind in sight.unread(question):
        yield blind


async def backing_string(question: Question) -> AsyncIterator[Refused | Unseen]:
    """The new string must lead to base's inode from every folder from which the present one leads to top."""
    plan = question.plan
    for refusal in plan.refusals:
        if isinstance(refusal, BackingString):
            yield refusal
    overlay, base, name = plan.overlay, plan.base, plan.backing_name
    for blind in sight.unseen(question) if overlay is not None else ():
        yield blind
    if overlay is None or base is None or name is None or not (base.has_path and overlay.has_path):
        return
    if not _leads(overlay, name, base, plan.top):
        yield BackingString(overlay=overlay.file, backing=name, reason="it would not lead to the base from there")


def _leads(overlay: Image, name: str, base: Image, top: Image) -> bool:
    if not is_path(name):  # kept as the base's child has it, or made of what QEMU told
        return backing.leads_to(overlay, name, base) is True
    present = overlay.backing
    known = [folder for folder in backing.folders(overlay) if present and leads_from(folder, present, top)]
    return all(leads_from(folder, name, base) for folder in known or backing.folders(overlay))


async def would_lose(question: Question) -> AsyncIterator[Refused]:
    """
    Internal snapshots, and the dirty bitmaps that cannot be carried over; images that are left alone keep theirs. Of a pull
    those of the image that is pulled into: a stream fills what it shows now, and its snapshots show what lies below, too.
    In both directions the encryption of what is written to an image that has none.
    """
    plan, layout = question.plan, question.view.layout
    lost = list(_decrypted(layout, plan))
    if question.keeps:
        pass
    elif not isinstance(plan, CommitPlan):
        lost += bitmaps.snapshots(layout, plan.written)
    else:
        lost += bitmaps.snapshots(layout, plan.merged)
        for bitmap in bitmaps.of(layout, plan.merged):
            reason = bitmaps.obstacle(layout, plan, bitmap)
            lost += [f"{bitmap} ({reason})"] if reason is not None else []
    if lost:
        yield WouldLose(lost=lost)


def _decrypted(layout: Layout, plan: Plan) -> Iterator[str]:
    if details.encryption(layout, plan.receiver) is None:
        for image in plan.merged:
            if details.encryption(layout, image) is not None:
                yield f"the encryption of {image.file}: {plan.receiver.file}, which gets its data, has none"


def known_bad(question: Question) -> AsyncIterator[KnownBad]:
    """Of this version of QEMU."""
    pivots = question.plan.pivots and not question.keeps
    return found(question.target.monitor, question.view, question.plan, pivots=pivots)


async def flush_unavailable(question: Question) -> AsyncIterator[Refused | Unseen]:
    """An active commit flushes base by itself. It takes a node on the base, which an inactive image must not get."""
    if question.plan.overlay is None:
        return
    if [one async for one in vm_state(question) if isinstance(one, VmState)]:
        yield Unseen("nothing is tried in this state of the VM")
        return
    try:
        await flush.check(question.target.monitor, question.plan.receiver)
    except (FlushUnavailable, Busy) as refusal:
        yield refusal
