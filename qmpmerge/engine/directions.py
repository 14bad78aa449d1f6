"""Which operation carries out a plan."""

from qmpmerge.chain.plan import CommitPlan, Plan, PullPlan
from qmpmerge.engine import commit
from qmpmerge.engine.operation import Operation


def operation(plan: Plan) -> Operation:
    """The operation that carries out this plan; that of a pull is imported where there is one."""
    if isinstance(plan, PullPlan):
        from qmpmerge.engine import pull

        return pull.Pull(plan)
    assert isinstance(plan, CommitPlan), "there are two directions"
    return commit.operation(plan)
