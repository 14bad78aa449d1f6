"""The proof: a fresh discovery must show what was planned, or the outcome is *unknown*."""

import contextlib
import shlex
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image, told_apart
from qmpmerge.chain.outcome import Checked, Estimate, MergedFile, Outcome, Policy, Verdict
from qmpmerge.chain.plan import Plan
from qmpmerge.chain.state import State
from qmpmerge.errors import NoSuchDisk, NotProven, QemuRefused, SeveralImages
from qmpmerge.images import files, lengths, nbd
from qmpmerge.journal import stash
from qmpmerge.qemu.bitmaps import snapshots
from qmpmerge.targets import identity
from qmpmerge.targets.target import ChainView

if TYPE_CHECKING:
    from qmpmerge.engine.request import Request
    from qmpmerge.engine.run import Run


async def prove(run: "Run", verdict: Verdict, expected: Chain) -> Outcome:
    """A fresh look at graph and headers must show what was expected, else the outcome is unknown."""
    try:
        view = await view_after(run, expected)
    except NoSuchDisk:
        if not await _is_closed(run, expected):
            raise
        found, left = expected, []
    else:
        found = await _spelt_as_planned(run, expected, view.chain)
        left = [node for node in run.old_nodes if node in view.layout.nodes and verdict != "kept"]
    if not _is_shown(run, expected, found):
        raise _not_proven(run, expected, found)
    _see_names(run)
    _see_lengths(run, found)
    if expected is run.plan.result:
        await _see_header_on_server(run)
    run.log("proved", "graph and headers show {chain}", chain=str(found))
    merged = run.finish(State.KEPT if verdict == "kept" else State.DONE)
    hints = [*_advice(run, verdict, merged), *run.notes]
    if left:
        hints.append(f"still open in QEMU, in use by somebody else: {', '.join(left)}")
    return _outcome(run, verdict, found, tuple(hints), merged)


async def _is_closed(run: "Run", expected: Chain) -> bool:
    """
    Whether nothing of the disk is open any more because nobody used it: the last node with a name was that of its old active
    image, and nodes without one go with what is above them. Then there is no graph to look at, and no guest that could be on
    the wrong image: a job that was seen to end without an error has copied everything, which is made durable.
    """
    names = {run.plan.top.node, expected.active.node}
    if not (run.has_ended_well and run.operation.pivots and expected is run.plan.result) or None in names:
        return False
    if not names.isdisjoint((await run.target.layout()).nodes):
        return False
    if expected.active.has_path:
        try:
            with contextlib.suppress(PermissionError):  # QEMU may be somebody else, and has flushed it
                files.sync(expected.active.file)
        except OSError:
            return False
    run.notes.append(f"nobody used {run.disk.name}, and QEMU has closed it")
    return True


async def prove_old_chain(run: "Run") -> None:
    """See that the chain is what it was before. Raises NotProven."""
    after = await view_after(run, run.plan.chain)
    if not after.chain.same_files(run.plan.chain):
        raise _not_proven(run, run.plan.chain, after.chain)


async def see_old_chain(run: "Run") -> None:
    """See that nothing was switched; which file an image is may not be known. Raises NotProven."""
    after = (await view_after(run, run.plan.chain)).chain
    if len(after) != len(run.plan.chain) or not all(map(Image.may_be, after, run.plan.chain)):
        raise _not_proven(run, run.plan.chain, after)


async def view_after(run: "Run", expected: Chain) -> ChainView:
    """The disk as it is now. Where its device was unplugged meanwhile, only the node of its active image has a name."""
    try:
        return await run.target.chain(run.name_after(expected), known=run.known)
    except NoSuchDisk:
        if expected.active.node is None:
            raise
        return await run.target.chain(expected.active.node, known=run.known)


async def _see_header_on_server(run: "Run") -> None:
    """
    Of an overlay on the network QEMU tells what it has written, not what its server has kept. Raises NotProven.
    """
    overlay = run.plan.overlay
    if overlay is None or overlay.has_path:
        return
    header = await nbd.header(overlay)
    if header is None:
        run.notes.append(f"the header of {overlay.file} could not be read back from its server")
    elif header.backing != run.plan.backing_name:
        found = f"{overlay.file} (backing {header.backing}) on its server, which may have lost what QEMU wrote"
        raise NotProven(target=run.target.name, expected=told_apart(run.plan.result, run.plan.result)[0], found=found)


def _is_shown(run: "Run", expected: Chain, found: Chain) -> bool:
    if not found.same_files(expected):
        return False
    overlay = run.plan.overlay
    if overlay is None or expected is not run.plan.result:
        return True
    image, base = found[run.plan.base_index + 1], run.plan.base
    if base is None:
        return not image.backing
    return _leads_to_base(run, image, base) and image.backing_format in (base.format, run.base_driver)


def _leads_to_base(run: "Run", overlay: Image, base: Image) -> bool:
    """Whether the header names base, by the string that was planned or by another path to the same file."""
    name = overlay.backing
    if name is None or name == run.plan.backing_name:
        return name is not None
    if not (base.has_path and overlay.has_path and base.inode is not None) or base.slice is not None:
        return False
    folders = backing.folders(overlay) if backing.is_path(name) else ()
    return bool(folders) and all(backing.leads_from(folder, name, base) for folder in folders)


async def _spelt_as_planned(run: "Run", expected: Chain, found: Chain) -> Chain:
    """
    Who starts a job without `backing-file` has QEMU write an absolute path over a relative one. It is mended where QEMU can:
    it records the overlay's own format for base (`change-backing-file`). Raises HeaderNotDurable.
    """
    overlay, base, name = run.plan.overlay, run.plan.base, run.plan.backing_name
    if overlay is None or base is None or name is None:
        return found
    if expected is not run.plan.result or not _is_shown(run, expected, found):
        return found
    written = found[run.plan.base_index + 1].backing
    if written == name:
        return found
    reason = ""
    if overlay.format == base.format == run.base_driver:
        try:
            await run.target.monitor.execute(
                "change-backing-file", device=run.disk.root, image_node_name=overlay.node, backing_file=name
            )
        except QemuRefused as error:
            reason = f" ({error.reason})"
        else:
            await run.operation.make_durable(run)
            return (await view_after(run, expected)).chain
    command = ["qemu-img", "rebase", "-u", "-f", overlay.format, "-F", base.format, "-b", name, overlay.file]
    run.notes.append(
        f"{overlay.file} names its backing file as {written} now, not as {name}{reason}: with the VM off "
        f"`{shlex.join(command)}` mends it"
    )
    return found


def _not_proven(run: "Run", expected: Chain, found: Chain) -> NotProven:
    words = told_apart(expected, found)
    return NotProven(target=run.target.name, expected=words[0], found=words[1])


def _see_names(run: "Run") -> None:
    """QEMU uses what it has open; the next start opens names. Raises NotUnderItsName."""
    for image in run.plan.named:
        astray = identity.astray(image, run.target.pid)
        if astray is not None:
            raise identity.unproven(astray, run.target, run.plan)


def _see_lengths(run: "Run", found: Chain) -> None:
    """And a raw file shows the next start no more than it has. Raises NotProven."""
    short = lengths.cut(found)
    if short is not None:
        told = f"{short.file} with {short.size} bytes, where QEMU believes {short.needed}: somebody has cut it off"
        raise NotProven(target=run.target.name, expected=str(found), found=told)


def _advice(run: "Run", verdict: Verdict, merged: tuple[MergedFile, ...]) -> list[str]:
    base = run.plan.receiver.file
    if verdict == "kept":
        return [f"{base} held all data at the moment it was let go; the guest writes to the overlay"]
    return run.operation.advice(merged, may_be_deleted=run.may_be_deleted)


def merged_files(planned: Plan, policy: Policy, spared: Mapping[int, str], *, verified: bool) -> tuple[MergedFile, ...]:
    """
    The images that the chain loses, base first, each still in its place, and what is to become of it: those that are `spared`,
    by their indexes, stay for the reasons there, and only what will be `verified` is deleted.
    """
    from qmpmerge.journal.spared import NOT_ALL_COMPARED

    chain = planned.chain
    able = stash.names_away(chain, planned.base_index, chain.index(planned.top))
    merged = []
    for image in planned.merged:
        obstacle = spared.get(chain.index(image))
        action = policy if chain.index(image) in able and obstacle is None else "keep"
        if action == "delete" and not verified:
            action, obstacle = "stash", NOT_ALL_COMPARED
        if image.data is not None:
            merged.append(MergedFile(image.data.file, "delete" if action == "delete" else "keep", image.data.file))
        merged.append(MergedFile(image.file, action, image.file, obstacle))
    return tuple(merged)


def unchanged(view: ChainView) -> Outcome:
    """
    The outcome where there is nothing to merge. What users may take for layers is no image of the chain: internal snapshots
    are told. Raises SeveralImages where layers lie where nobody has looked.
    """
    active = view.chain.active
    node = view.layout.nodes[active.node or ""]
    hidden = [child for edge, child in node.children.items() if edge.startswith("children.")]
    if hidden:
        images = [view.layout.opened_as(child) or child for child in hidden]
        raise SeveralImages(disk=view.disk.name, driver=node.driver, images=images)
    hints = [
        f"{told} is no image of the chain: `qemu-img snapshot -d NAME {shlex.quote(image.file)}` removes it, with the VM off"
        for image in view.chain.images
        for told in snapshots(view.layout, (image,))
    ]
    return Outcome("unchanged", view.disk.name, view.chain, view.chain, hints=tuple(hints))


def planned(
    disk: str,
    plan: Plan,
    request: "Request",
    checked: tuple[Checked, ...],
    estimate: Estimate,
    merged: tuple[MergedFile, ...],
) -> Outcome:
    """The outcome of a merge that was only looked at; one that does not switch leaves the chain as it is."""
    after = plan.result if request.ending == "pivot" else plan.chain
    merged = merged if request.ending == "pivot" else ()
    return Outcome("planned", disk, plan.chain, after, merged=merged, checks=checked, estimate=estimate)


def _outcome(
    run: "Run", verdict: Verdict, after: Chain, hints: tuple[str, ...], merged: tuple[MergedFile, ...] = ()
) -> Outcome:
    return Outcome(
        verdict=verdict,
        disk=run.disk.name,
        before=run.plan.chain,
        after=after,
        job=run.seen if verdict in ("ready", "held", "running") else None,
        merged=merged,
        copied=run.copied,
        seconds=time.monotonic() - run.started,
        hints=hints,
        verified=run.is_all_verified,
        paused_seconds=run.paused_seconds,
        checks=run.checks,
    )


def held(run: "Run") -> Outcome:
    """The outcome of what was to be held: the ways on."""
    command = shlex.join(["qmpmerge", "job", run.target.name, run.job])
    hint = f"nothing is switched until `{command} follow`, or the same command without --hold; `{command} cancel` takes it back"
    if run.operation.pivots:
        hint = f"every write goes to both images until `{command} pivot`, or `keep`, or `cancel`"
    left = [run.operation.left_behind] if run.operation.left_behind is not None else []
    return _outcome(run, "ready" if run.operation.pivots else "held", run.plan.chain, (hint, *left, *run.notes))


def left(run: "Run") -> Outcome:
    """What is known where the job goes on without us."""
    return _outcome(run, "running", run.plan.chain, tuple(run.notes))
