"""
May we? All of it is asked before anything is sent, all that says no is told at once, and every refusal says what to do
instead.

Pure checks of sizes and names are made where the plan is made (`plan`); the others look at QEMU and the headers (`said`), or
at files and processes (`files`).
"""

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from itertools import repeat
from typing import TypeAlias

from qmpmerge import shield
from qmpmerge.chain.chain import Image
from qmpmerge.chain.outcome import Checked, CheckResult, Ending, Estimate
from qmpmerge.chain.plan import Plan
from qmpmerge.checks import files, graph, sight
from qmpmerge.checks.question import Question, Seen, Unseen, process
from qmpmerge.errors import FORCEABLE, Busy, NotWritable, QemuRefused, Refused, refuse
from qmpmerge.images import dependents, space
from qmpmerge.qemu import bitmaps, vmstate
from qmpmerge.qemu.bitmaps import Bitmap
from qmpmerge.targets.target import ChainView, Target
from qmpmerge.value import Value

Ask: TypeAlias = "Callable[[Question], AsyncIterator[Refused | Unseen | Seen]]"


class Answer(Value):
    """What was found out: each check, the space, the bitmaps to be carried over, and what the images hold (`space.Maps`)."""

    checks: tuple[Checked, ...]
    estimate: Estimate
    bitmaps: tuple[Bitmap, ...]
    maps: space.Maps


async def check(
    target: Target,
    view: ChainView,
    plan: Plan,
    *,
    ending: Ending = "pivot",
    force: Collection[str] = (),
    search: Collection[str] = (),
    speed: int = 0,
    dry_run: bool = False,
    estimate: Estimate | None = None,
) -> Answer:
    """
    Refuse what would do harm, but for what `force` names (of `errors.FORCEABLE`). Changes nothing that anyone could see.

    `search` are more folders below which images may be built on those of the chain, `speed` is for the estimate, unless that is
    given. With `dry_run` it is made closely (`space.estimate`), and nothing is sent that writes. Raises one of the refusals of
    `CHECKS`, or SeveralRefusals with all of them.
    """
    pid, opened = process(target, plan)
    maps: space.Maps = {}
    if estimate is None:
        estimate = await estimated(target, plan, maps, speed=speed, closely=dry_run)
    others = await built_on(plan.changed, plan, search)
    question = Question(target, pid, opened, view, plan, ending, others, estimate, dry_run)
    checked: list[Checked] = []
    refusals: list[Refused] = []
    answers = await shield.together(map(_answers, CHECKS.values(), repeat(question)))
    for name, found in zip(CHECKS, answers, strict=True):
        refused = [one for one in found if isinstance(one, Refused)]
        insisting = [refusal for refusal in refused if refusal.name not in FORCEABLE or refusal.name not in force]
        refusals += insisting
        unseen = "; ".join(one.reason for one in found if isinstance(one, Unseen))
        seen = "; ".join(one.what for one in found if isinstance(one, Seen))
        result: CheckResult = "forced" if len(insisting) < len(refused) else "not checked" if unseen else "passed"
        checked.append(Checked(name, result, unseen if result == "not checked" else None, seen or None))
    refuse(refusals)
    if not dry_run:
        await vmstate.check(target.monitor, view.layout.nodes_of(view.disk))  # once more: all this can take seconds
        await target.open_for_writing(question.written)
        await _rewrite_header(question)  # the last, because it writes, if only what is there already
    carried = () if question.keeps else bitmaps.portable(view.layout, plan)
    return Answer(tuple(checked), estimate, carried, maps)


async def _answers(ask: Ask, question: Question) -> list[Refused | Unseen | Seen]:
    return [one async for one in ask(question)]


async def estimated(target: Target, plan: Plan, maps: space.Maps, *, speed: int = 0, closely: bool = True) -> Estimate:
    """`space.estimate`, for the QEMU of this target."""
    pid, _ = process(target, plan)
    live, version = target.is_live, target.monitor.version
    return await space.estimate(plan, live=live, pid=pid, speed=speed, closely=closely, version=version, maps=maps)


async def built_on(images: Sequence[Image], plan: Plan, search: Collection[str] = ()) -> dependents.Look:
    """Look for what is built on these images, in all places where that is done for a plan."""
    from qmpmerge.processes import holders

    below = dependents.folders_above(plan.receiver, plan.chain.active)
    return await dependents.look(images, plan.chain, [*search, *below], holders.qemu_files())


async def _rewrite_header(question: Question) -> None:
    """
    Have QEMU rewrite the overlay's header with the string it has already.

    At the end of an intermediate commit QEMU takes the same path, and a failure there crashes it with the guest; here
    the failure is a clean error.
    """
    overlay = question.plan.overlay
    if overlay is None or not question.rewrites:
        return
    try:
        await question.target.monitor.execute(
            "change-backing-file",
            device=question.view.disk.root,
            image_node_name=overlay.node,
            backing_file=overlay.backing,
        )
    except QemuRefused as error:
        target, name = question.target, question.view.disk.name
        job = (await target.chain(name)).disk.job  # begun since all was checked
        if job is not None:
            raise Busy(disk=name, job=job.id, target=target.name) from None
        raise NotWritable(file=overlay.file, reason=error.reason) from None


CHECKS: dict[str, Ask] = {
    "vm-state": graph.vm_state,
    "not-seen": sight.not_seen,
    "busy": graph.busy,
    "attached": graph.attached,
    "temporary": graph.temporary,
    "shorter-layer": graph.shorter_layer,
    "replaced": files.replaced,
    "doubtful": files.doubtful,
    "disagrees": graph.disagrees,
    "no-format": graph.no_format,
    "backing-string": graph.backing_string,
    "in-use": files.in_use,
    "dependents": files.dependents,
    "shared-base": files.shared_base,
    "no-space": files.no_space,
    "device-too-small": files.device_too_small,
    "cannot-grow": files.cannot_grow,
    "not-writable": files.not_writable,
    "would-lose": graph.would_lose,
    "known-bad": graph.known_bad,
    "flush-unavailable": graph.flush_unavailable,
}
"""
All of them by their refusals' names, in the order in which they are told; they are asked at the same time. Each yields what it
refuses, and where it could not look, why.
"""
