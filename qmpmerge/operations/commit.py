"""
Merge: what is asked for, what was begun before, what is refused; then the engine carries it out.

What an earlier qmpmerge has begun is gone on with from where it stands. What carries out is imported where something is to
be: a dry run, which somebody waits for, does without.
"""

import contextlib
import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpmerge import given
from qmpmerge.chain.chain import Image
from qmpmerge.chain.layer import LayerName
from qmpmerge.chain.other_way import other_way
from qmpmerge.chain.outcome import Ending, MergedFile, OtherWay, Outcome, Policy
from qmpmerge.chain.plan import Direction, Plan, PullPlan
from qmpmerge.checks import check
from qmpmerge.checks.check import Answer
from qmpmerge.checks.question import process
from qmpmerge.engine import earlier, log, proof, time_limit
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.engine.pace.progress import Report, unreported
from qmpmerge.engine.request import Request
from qmpmerge.errors import NoSuchLayer, OptionsConflict, Refused
from qmpmerge.given import Paths
from qmpmerge.images import files
from qmpmerge.journal import locks, store
from qmpmerge.journal.locks import Lock
from qmpmerge.processes import limits
from qmpmerge.qemu import bitmaps as dirty
from qmpmerge.qemu import jobs, vmstate
from qmpmerge.qemu.blockgraph import DiskName
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.command import command
from qmpmerge.targets.target import ChainView, Target

if TYPE_CHECKING:
    from qmpmerge.engine.pace.converge import Converge
    from qmpmerge.engine.run import Run
    from qmpmerge.journal.record import Record


async def commit(
    target: Target,
    disk: DiskName | None = None,
    *,
    base: LayerName | None = None,
    top: LayerName | None = None,
    shallow: bool = False,
    keep: int | None = None,
    ending: Ending = "pivot",
    speed: int | None = None,
    verify: bool | None = None,
    merged_files: Policy = "stash",
    pause: bool = True,
    force: Collection[str] = (),
    search: Paths = (),
    dry_run: bool = False,
    agreed: Sequence[Outcome] | None = None,
    converge: "Converge | None" = None,
    report: Report | None = None,
    timeout: float | None = None,
    patience: Patience | None = None,
    polite: float | None = None,
) -> Outcome:
    """
    Merge the images above `base` up to `top` into `base`; by default the whole chain, the guest moving onto its base. One
    that lies in another folder must be named, or have its folder searched. Both are what `Chain.find` takes: an index from 1
    (-1 is the active image), a path, or a word as the command takes it. With `keep` the newest so many overlays above the base
    stay, and what lies below them is merged: nothing where there are no more. `disk` can be left out where one disk has layers.
    `ending` is how it ends (`chain.outcome.Ending`); what was held is gone on with by the same call without it.

    `verify` compares what base shows with what top shows, in another process, before anything is switched; None does so
    where it is cheap, True does so for an active merge while the guest is paused. `merged_files` says what becomes of
    them; to delete them they must be compared. `pause` lets the guest stand still for the milliseconds of the pivot:
    without it nobody can tell which image is right if QEMU and we die during it. `force` and `search` are those of
    `checks.check`. `speed` is bytes a second, 0 for unlimited; without one a job that is at work stays as fast as it is.
    `timeout` is seconds, after which StillRunning is raised and the job goes on; `patience` says more than that, in its
    place. `converge` allows to slow down or pause a guest that writes faster than the job copies. With `polite`, the monitor
    is released for so many seconds between two polls; the two do not go together.

    Dirty bitmaps of merged images are carried over to the base.

    `agreed` are outcomes of dry runs: a merge by which the guest would move onto its base (a pivot) is begun only if it is
    what one of them tells, of the very same files; without it any is.

    A job of an earlier qmpmerge that does this very thing is taken over, and what it has done already is only proved.

    Cancelling the task cancels the job and waits until the old chain is back; from the switch to the proof it waits. What
    `report` raises does the same, and is raised then; a job that somebody else has begun is only left.

    What an earlier merge of the chain left unfinished is put right first, where that is beyond doubt. If that was this
    very merge, its outcome is returned.

    Raises subclasses of Refused before anything is sent, of Failed when the job failed, of Unknown when the outcome
    could not be proved, StillRunning, TimeUp, TimedOut.
    """
    request = Request(
        base=base,
        top=top,
        shallow=shallow,
        keep=keep,
        ending=ending,
        speed=speed,
        verify=verify,
        merged_files=merged_files,
        pause=pause,
        force=given.forced(force),
        search=given.paths(search),
        dry_run=dry_run,
        agreed=agreed,
        converge=converge,
        polite=polite,
        patience=patience or Patience(timeout),
    )
    return await carry_out(target, disk, request, report)


async def carry_out(target: Target, disk: DiskName | None, request: Request, report: Report | None) -> Outcome:
    """Do what is asked for, a commit or a pull: see there."""
    with contextlib.ExitStack() as stack:
        async with time_limit.in_time(request.patience):
            with target.looking(only=request.dry_run):
                begun = await _Beginning(target, request, report or unreported, stack).of(disk)
        if isinstance(begun, Outcome):
            return begun
        from qmpmerge.engine import go

        return await go.go(begun)


async def would_pivot(
    target: Target,
    disk: DiskName | None = None,
    *,
    base: LayerName | None = None,
    top: LayerName | None = None,
    shallow: bool = False,
    keep: int | None = None,
) -> bool:
    """
    Whether `commit` would begin a merge by which the guest moves onto its base; not where one is at work already.

    Raises NoSuchDisk, DiskNeeded, NoDisk, ToolMissing, NoSuchLayer, BaseAboveTop, BaseIsTop.
    """
    view = await target.chain(disk)
    planned = Request(base=base, top=top, shallow=shallow, keep=keep).plan(view.chain, view.disk.name)
    return planned.pivots and earlier.under_way(view, planned) is None


class _Beginning:
    """From what is asked for to a run, with its locks on `stack`; or to an outcome, where nothing is left to be run."""

    def __init__(self, target: Target, request: Request, report: Report, stack: contextlib.ExitStack) -> None:
        self._target = target
        self._request = request
        self._report = report
        self._stack = stack

    async def of(self, disk: DiskName | None) -> "Run | Outcome":
        view = await self._target.chain(disk)
        log.headers("before", view.chain)
        limits.refuse_few(len(view.chain))
        records = store.believed(store.about(view.chain))
        if self._request.dry_run:
            if records:
                from qmpmerge.engine import resume

                await resume.foresee(self._target, view, records)
            return await self._begun(view, records)
        view = await earlier.without_concluded(self._target, view, records, self._report)
        request = self._request
        for record in records:
            meant = record.is_what(lambda chain: request.plan(chain, view.disk.name))
            if meant and record.is_done(view.chain):
                return await self._ended_unseen(view, record)
        return await (self._settled(view, disk, records) if records else self._begun(view, records))

    async def _ended_unseen(self, view: ChainView, record: "Record") -> "Run":
        """The very merge that is asked for was made by an earlier qmpmerge, and nobody has proved it yet."""
        planned = record.as_called_now(view.chain)
        return await self._resumed(view, planned, self._locked(record.plan), earlier.as_left(record))

    async def _settled(self, view: ChainView, disk: DiskName | None, records: "list[Record]") -> "Run | Outcome":
        """What an earlier merge left is put right first; that may be all there was to do."""
        from qmpmerge.engine import resume  # most chains have no record

        settled = await resume.settle(self._target, view, records)
        if settled.outcome is not None and settled.outcome.direction != self._request.direction:
            settled.outcome = None  # not what was asked for
        if settled.changed:
            view, records = await self._target.chain(disk), settled.left
        try:
            begun = await self._begun(view, records)
        except NoSuchLayer:
            if settled.outcome is None:
                raise
            return settled.outcome  # the layer was merged away by what was just finished
        is_all = isinstance(begun, Outcome) and begun.verdict == "unchanged"
        return settled.outcome or begun if is_all else begun

    def _unchanged(self, view: ChainView, planned: Plan) -> Outcome:
        outcome = proof.unchanged(view)
        built_on = () if self._target.is_live else _built_on(view.chain.active, planned.direction)
        return replace(outcome, hints=(*outcome.hints, *_misunderstood(planned), *built_on))

    async def _begun(self, view: ChainView, records: "list[Record]") -> "Run | Outcome":
        """The merge that is asked for: resumed where its job is at work, else checked; an outcome where that is all."""
        request = self._request
        planned = request.plan(view.chain, view.disk.name)
        if planned.is_empty:
            return self._unchanged(view, planned)
        self._refuse_what_does_not_go_together(planned, view)
        lock = self._locked(planned)
        job = None if request.dry_run else earlier.under_way(view, planned)
        if job is not None:
            return await self._taken_over(view, planned, lock, job, earlier.of_job(records, job))
        answer = await self._checked(view, planned)
        if not request.dry_run and request.agreed is not None:
            request.refuse_not_agreed(planned, self._foreseen(view, planned)[0])
        await earlier.refuse_suspect(self._target, planned, lock.note.suspect)
        if request.dry_run:
            other = await self._other_way(view, planned, answer)
            merged, hints = self._foreseen(view, planned)
            outcome = proof.planned(view.disk.name, planned, request, answer.checks, answer.estimate, merged)
            return replace(outcome, other_way=other, hints=hints)
        from qmpmerge.engine import directions
        from qmpmerge.engine.run import Run

        operation = directions.operation(planned)
        run = Run.begin(self._target, operation, request, lock, view=view, report=self._report)
        run.bitmaps, run.checks = answer.bitmaps, answer.checks
        run.notes += dirty.left_behind(view.layout, planned)
        return run

    def _foreseen(self, view: ChainView, planned: Plan) -> tuple[tuple[MergedFile, ...], tuple[str, ...]]:
        """What is to become of the merged files, and what else there is to say of them."""
        from qmpmerge.journal import spared

        request, is_pull = self._request, isinstance(planned, PullPlan)
        policy, doubts = request.policy(planned), spared.doubts(planned)
        hints = spared.unchecked(planned, doubts)
        found = spared.Spared({})
        if is_pull or doubts or "dependents" in request.force:  # else a commit was refused for less
            places = {planned.chain.index(image): image.file if image.has_path else None for image in planned.merged}
            asked: Policy = "stash" if policy == "keep" else policy  # what is left alone users may delete themselves
            pid = process(self._target, planned)[0]
            found = spared.by_plan(
                planned, asked, places.get, doubts, verified=not doubts, search=request.search, pid=pid
            )
            free = [planned.chain[index].file for index in places if index not in found.reasons]
            if free and is_pull:
                hints.append(f"nobody else is seen to need {', '.join(free)} (looked at {found.looked_at})")
        if is_pull:
            hints += dirty.left_behind(view.layout, planned)
        return proof.merged_files(planned, policy, found.reasons, verified=not doubts), tuple(hints)

    async def _taken_over(self, view: ChainView, planned: Plan, lock: Lock, job: Job, record: "Record | None") -> "Run":
        record = earlier.as_left(record)
        earlier.refuse_displaced(self._target, view, record, planned)
        run = await self._resumed(view, planned, lock, record)
        self._report(earlier.going_on(view, job, record, self._request.speed))
        if self._request.speed is not None:
            await jobs.set_speed(self._target.monitor, job, self._request.speed)
        # Whoever has started the job was not refused for them, so what can come along does.
        run.bitmaps = dirty.portable(view.layout, run.plan)
        return run

    async def _resumed(self, view: ChainView, planned: Plan, lock: Lock, record: "Record | None") -> "Run":
        """What is there already is not checked again, but for the state of the VM."""
        await vmstate.check(self._target.monitor, view.layout.nodes_of(view.disk))
        from qmpmerge.engine import directions
        from qmpmerge.engine.run import Run

        operation = directions.operation(planned)
        return Run.resume(self._target, operation, self._request, lock, view=view, record=record, report=self._report)

    def _locked(self, planned: Plan) -> Lock:
        return self._stack.enter_context(locks.taken_for(planned))

    def _refuse_what_does_not_go_together(self, planned: Plan, view: ChainView) -> None:
        request = self._request
        request.refuse_ending_of(planned)
        if not self._target.is_live:
            request.refuse_offline()
        elif request.verify is True and not request.pause and planned.pivots:
            raise OptionsConflict(options=["--verify", "--no-pause"])
        if request.compares is True:
            from qmpmerge.engine import safeguards

            safeguards.refuse_encrypted(planned, view.layout)

    async def _checked(self, view: ChainView, planned: Plan) -> Answer:
        request = self._request
        answer = await check.check(
            self._target,
            view,
            planned,
            ending=request.ending,
            force=request.force,
            search=request.search,
            speed=request.speed or 0,
            dry_run=request.dry_run,
            estimate=request.estimate,
        )
        checks = [{"name": one.name, "result": one.result, "reason": one.reason} for one in answer.checks]
        log.step(
            "checked",
            "nothing speaks against {plan}",
            about=view.disk.name,
            target=self._target.name,
            plan=str(planned.result),
            checks=checks,
        )
        return answer

    async def _other_way(self, view: ChainView, planned: Plan, answer: Answer) -> OtherWay | None:
        """None where it would be refused."""
        other = other_way(planned)
        if other.refusals or self._request.ending != "pivot" or self._request.estimate is not None:
            return None
        estimate = await check.estimated(self._target, other, answer.maps)
        try:
            await check.check(self._target, view, other, search=self._request.search, dry_run=True, estimate=estimate)
        except Refused:
            return None
        return OtherWay(command(self._target, view.disk.name, other), other.receiver.file, estimate.copy)


def _misunderstood(planned: Plan) -> Iterator[str]:
    """Who knows merges takes the base of a pull for what is pulled."""
    if planned.direction == "pull" and planned.base is not None:
        why = f"a pull leaves its base as it is, and nothing lies above {planned.base.name} to be pulled"
        yield f"{why}: name the image below it for the base, or none"


def _built_on(image: Image, direction: Direction) -> Iterator[str]:
    """Who names an image of a chain that is off means its disk, where `active` is told the same."""
    from qmpmerge.images import overlays

    try:
        leaves = overlays.above(image.file, os.path.dirname(image.file)).leaves if image.has_path else {}
    except OSError:
        return
    for file in leaves:
        if files.inode(file) != image.inode:
            yield f"{file} is built on it: `{shlex.join(['qmpmerge', direction, file])}`"
