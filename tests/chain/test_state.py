"""The table of states: every state has its contract and its ways out, and nothing leads back over the point of no return."""

import ast
import inspect

from qmpmerge.chain import state
from qmpmerge.chain.state import NEXT, RECORDED, State

LAST = {State.DONE, State.UNDONE, State.KEPT, State.LEFT}


def test_each_state_has_its_contract_and_its_row() -> None:
    (enum,) = (node for node in ast.parse(inspect.getsource(state)).body if isinstance(node, ast.ClassDef))
    kinds = [type(node.value if isinstance(node, ast.Expr) else node) for node in enum.body[1:]]
    assert kinds == [ast.Assign, ast.Constant] * len(State)
    assert set(NEXT) == set(State)
    assert {known for known in State if not NEXT[known]} == LAST


def reachable(start: State) -> set[State]:
    seen: set[State] = set()
    rest = [start]
    while rest:
        for follower in NEXT[rest.pop()] - seen:
            seen.add(follower)
            rest.append(follower)
    return seen


def test_every_state_can_be_reached_and_none_twice() -> None:
    assert reachable(State.PLANNED) == set(State) - {State.PLANNED}
    assert all(known not in reachable(known) for known in State)


def test_nothing_is_undone_once_it_was_seen_to_be_done() -> None:
    assert reachable(State.SWITCHED) == {State.PROVED, State.DONE}
    assert State.COPYING not in reachable(State.SWITCHING)
    assert LAST.isdisjoint(RECORDED)
