"""The command that carries out a plan."""

import shlex

from qmpmerge.chain.plan import CommitPlan, Plan
from qmpmerge.targets.target import Target


def command(target: Target, disk: str, plan: Plan, *, with_base: bool = False) -> str:
    """For a shell; layers by their indexes. `with_base` names a base also where it is the one that is meant without."""
    words = ["qmpmerge", plan.direction, target.name, *([disk] if target.is_live else [])]
    commits = isinstance(plan, CommitPlan)
    if with_base or plan.base_index > (1 if commits else 0):
        words += ["--base", str(plan.base_index)]
    top = plan.top if commits else plan.overlay
    if top is not None and top is not plan.chain.active:
        words += ["--top", str(plan.chain.index(top))]
    return shlex.join([*words, *(word for place in target.allowed for word in ("--allow", place))])
