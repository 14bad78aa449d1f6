"""
The other direction: a chain is shortened by a merge down as well as by a pull up. Pure, as `plan`.
"""

from qmpmerge.chain.plan import CommitPlan, Plan, PullPlan, between


def other_way(plan: Plan) -> Plan:
    """
    The plan in the other direction by which the chain gets as short.

    Of a merge below the active image the same images leave, into the one above. Else what becomes one image becomes one, under
    the name of its other end: so an image that a pull leaves alone is not written to by the merge either. Not of an empty plan.
    """
    lowest = plan.base_index
    if isinstance(plan, PullPlan):
        return between("commit", plan.chain, lowest + 1, plan.chain.index(plan.overlay))
    if plan.overlay is not None:
        return between("pull", plan.chain, lowest, plan.chain.index(plan.top))
    return between("pull", plan.chain, lowest - 1, len(plan.chain) - 1)


def sparing(plan: Plan) -> Plan:
    """
    The pull that shortens the chain where others need what `plan` would write to: it keeps base where anything is left to be
    pulled above that, and none of them sees other data. Not of an empty plan.
    """
    chain, lowest, highest = plan.chain, plan.base_index, len(plan.chain) - 1
    if isinstance(plan, CommitPlan):
        highest = min(highest, chain.index(plan.top))
    found = between("pull", chain, lowest, highest) if lowest < highest else other_way(plan)
    return between("pull", chain, 0, len(chain) - 1) if found.refusals else found
