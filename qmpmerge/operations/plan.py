"""
Plan: both ways to a shorter chain side by side, a merge down (`commit`) and a pull up, and which of them to take. Nothing is
changed.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

from qmpmerge import given
from qmpmerge.chain.chain import Chain
from qmpmerge.chain.layer import LayerName
from qmpmerge.chain.other_way import other_way
from qmpmerge.chain.outcome import Checked, Estimate
from qmpmerge.chain.plan import CommitPlan, Direction, Plan
from qmpmerge.checks import check
from qmpmerge.checks.question import process
from qmpmerge.engine import proof
from qmpmerge.engine.request import Request
from qmpmerge.errors import Error, Refused
from qmpmerge.given import Paths
from qmpmerge.images.space import Maps
from qmpmerge.operations import commit
from qmpmerge.qemu.blockgraph import DiskName
from qmpmerge.targets.command import command
from qmpmerge.targets.target import ChainView, Target
from qmpmerge.value import Value

CLEARLY_LESS = 0.9
"""Of what the other way copies, for that to count: a little is no reason to pause a guest, or to change what it starts from."""


class Sharer(Value):
    """Who needs `file` besides this chain: the `image` of this name, which is built on it, or a `process` that has it open."""

    file: str
    kind: Literal["image", "process"]
    name: str


class Way(Value):
    """
    One of the two. `run` is the command, for a shell. `pauses_guest` for the milliseconds of a pivot; `start_from` is the image
    that the VM is started from afterwards. A way with `refusals` cannot be gone, and has no `checks`.
    """

    direction: Direction
    run: str
    after: Chain
    estimate: Estimate
    pauses_guest: bool
    start_from: str
    keeps_launch_path: bool
    checks: tuple[Checked, ...] = ()
    refusals: tuple[Error, ...] = ()


class Ways(Value):
    """
    Both ways, the merge first; none where there is nothing to merge. `shared` are those who need what the merge would write to
    or take away, `not_seen` says where they could not be looked for. `choice` is the way to take, None where both are refused,
    for this `reason`.
    """

    disk: str
    before: Chain
    ways: tuple[Way, ...] = ()
    shared: tuple[Sharer, ...] = ()
    not_seen: tuple[str, ...] = ()
    choice: Direction | None = None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """``planned``, or ``unchanged`` where there is nothing to merge."""
        return "planned" if self.ways else "unchanged"

    def typed(self, more: str) -> "Ways":
        """The same, with more options in the commands."""
        ways = [replace(way, run=f"{way.run} {more}".rstrip()) for way in self.ways]
        return replace(self, ways=tuple(ways))


async def plan(
    target: Target,
    disk: DiskName | None = None,
    *,
    base: LayerName | None = None,
    top: LayerName | None = None,
    shallow: bool = False,
    keep: int | None = None,
    speed: int | None = None,
    force: Collection[str] = (),
    search: Paths = (),
) -> Ways:
    """
    What `commit` with these options would do, and what the pull would by which the chain gets as short (`other_way`): all is
    looked at as by their dry runs, and nothing is changed. What speaks against a way is in it, and is not raised.

    `speed` is for the time that it takes, bytes a second.
    Raises NoSuchDisk, DiskNeeded, NoDisk, ToolMissing, NoSuchLayer, BaseAboveTop, BaseIsTop, OptionsConflict, SeveralImages.
    """
    forced, folders = given.forced(force), given.paths(search)
    asked = Request(
        base=base, top=top, shallow=shallow, keep=keep, speed=speed, force=forced, search=folders, dry_run=True
    )
    view = await target.chain(disk)
    down = asked.plan(view.chain, view.disk.name)
    if down.is_empty:
        proof.unchanged(view)
        return Ways(view.disk.name, view.chain, reason="there is nothing to merge")
    up, maps = other_way(down), Maps()
    into = view.chain.index(up.receiver)
    pulling = replace(asked, direction="pull", base=up.base_index or None, top=into, shallow=False, keep=None)
    ways = await _way(target, view, down, asked, maps), await _way(target, view, up, pulling, maps)
    shared, unseen = await _shared(target, down, folders)
    choice, reason = choose(*ways, is_shared=bool(shared), is_seen=not unseen)
    return Ways(view.disk.name, view.chain, ways, shared, unseen, choice, reason)


def choose(down: Way, up: Way, *, is_shared: bool, is_seen: bool) -> tuple[Direction | None, str]:
    """Which way to take, and why: the first of these rules that says so."""
    refused = [way for way in (down, up) if way.refusals]
    if len(refused) == 2:
        return None, "both are refused"
    if refused:
        other = up if refused[0] is down else down
        names = ", ".join(error.name for error in refused[0].refusals)
        return other.direction, f"{refused[0].direction} is refused ({names})"
    if is_shared or not is_seen:
        others = "others need" if is_shared else "it could not be seen whether others need"
        return "pull", f"{others} what commit would write to or take away"
    for one, other in ((down, up), (up, down)):
        if _copies_clearly_less(one, other):
            return one.direction, "it copies less"
    if up.keeps_launch_path and not down.keeps_launch_path:
        return "pull", "the VM is started from the same image as before"
    return "commit", "it gives back the space of what leaves the chain"


def _copies_clearly_less(one: Way, other: Way) -> bool:
    less, more = one.estimate.copy, other.estimate.copy
    return less is not None and more is not None and less < CLEARLY_LESS * more


async def _way(target: Target, view: ChainView, planned: Plan, request: Request, maps: Maps) -> Way:
    estimate = await check.estimated(target, planned, maps, speed=request.speed or 0)
    names_base = isinstance(planned, CommitPlan) and planned.base_is_named
    way = Way(
        direction=planned.direction,
        run=command(target, view.disk.name, planned, with_base=names_base),
        after=planned.result,
        estimate=estimate,
        pauses_guest=planned.pivots and target.is_live,
        start_from=planned.result.active.file,
        keeps_launch_path=not planned.pivots,
    )
    try:
        known = replace(request, estimate=estimate)
        outcome = await commit.carry_out(target, view.disk.name, known, lambda progress: None)
    except Refused as refusal:
        return replace(way, refusals=tuple(refusal.parts))
    return replace(way, checks=outcome.checks)


async def _shared(target: Target, planned: Plan, search: Sequence[str]) -> tuple[tuple[Sharer, ...], tuple[str, ...]]:
    """Who needs what the plan writes to or takes away, and where they could not be looked for."""
    look = await check.built_on(planned.changed, planned, search)
    images = [Sharer(one.image, "image", one.file) for one in look.dependents]
    unseen = [f"{image.label} is no file on this host" for image in planned.changed if not image.has_path]
    processes, blind = await _users(target, planned)
    return (*images, *processes), (*look.unseen, *unseen, *blind)


async def _users(target: Target, planned: Plan) -> tuple[list[Sharer], list[str]]:
    from qmpmerge.processes import holders

    pid, _ = process(target, planned)
    if pid is None:
        return [], ["which process has the images open is not known"]
    files = [image.file for image in planned.changed if image.has_path]
    return [Sharer(user.file, "process", str(user)) for user in await holders.lasting(files, excluding=[pid])], []
