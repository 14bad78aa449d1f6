"""What is written down before the job is started."""

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpmerge.chain.outcome import Policy
from qmpmerge.chain.plan import Plan
from qmpmerge.journal import record, stash
from qmpmerge.journal.record import Record
from qmpmerge.processes import proc

if TYPE_CHECKING:
    from qmpmerge.engine.run import Run


def of_run(run: "Run", path: str) -> Record:
    """The record of this run, to lie at `path`; of one that was begun before, with what its record knows."""
    plan, target = run.plan, run.target
    policy = run.request.policy(plan)
    base, top = plan.base_index, plan.chain.index(plan.top)
    new = Record(
        path=path,
        target=_address(target.name),
        disk=run.disk.name,
        device=run.disk.drive or run.disk.qdev or "",
        job=run.job,
        chain=plan.chain,
        direction=plan.direction,
        base=base,
        top=top,
        policy=policy,
        qemu=proc.process(target.pid) if target.pid is not None else None,
        tool=proc.process(os.getpid()),
        is_live=target.is_live,
        since=time.time(),
        old_nodes=run.old_nodes,
        base_driver=run.base_driver,
        away={} if policy == "keep" else stash.names_away(plan.chain, base, top),
        before=record.looks(plan.chain, _quiet(plan, base, top)),
    )
    return new if run.record is None else _continued(new, run.record)


def _quiet(plan: Plan, base: int, top: int) -> range:
    """The merged images, and what is pulled into, as far as no guest writes to them, which the active image is for."""
    end = top + 1 if plan.direction == "pull" else top
    return range(base + 1, min(end, len(plan.chain) - 1) + 1)


def _continued(new: Record, known: Record) -> Record:
    """
    It knows the files by their inodes. Where the job was told to complete, maybe, the name stays away until it is known
    what came of it. What only a record says is of the chain is not deleted.
    """
    away, before = {**new.away, **known.away}, {**new.before, **known.before}
    policy: Policy = "stash" if new.policy == "delete" and not known.chain.same_files(new.chain) else new.policy
    return replace(
        new,
        policy=policy,
        chain=known.chain,
        away=away,
        before=before,
        state=known.state,
        was_left_ready=known.was_left_ready,
        seen=known.seen,
        since=known.since,
    )


def _address(target: str) -> str:
    """What the user called the target, so that it means the same from every folder."""
    path = target.removeprefix("unix:")
    return os.path.abspath(path) if os.path.lexists(path) else target
