"""The states of a merge as a table, from the texts in `chain.state`."""

import ast
import inspect
from collections.abc import Iterator

from pages.tables import table
from qmpmerge.chain import state
from qmpmerge.chain.state import NEXT, State


def meanings() -> str:
    """Each state, what it means, and what may follow."""
    rows = [(f"`{name}`", text, ", ".join(f"`{there}`" for there in after(State[name]))) for name, text in _texts()]
    return table("state", "what it means", "what may follow", rows=rows)


def after(one: State) -> list[str]:
    """What may follow it, in the order of the states."""
    return [there.name for there in State if there in NEXT[one]]


def _texts() -> Iterator[tuple[str, str]]:
    """The states with the texts below them, which Python throws away."""
    (body,) = (one.body for one in ast.parse(inspect.getsource(state)).body if isinstance(one, ast.ClassDef))
    for name, text in zip(body, body[1:], strict=False):
        if isinstance(name, ast.Assign) and isinstance(name.targets[0], ast.Name) and isinstance(text, ast.Expr):
            yield name.targets[0].id, inspect.cleandoc(ast.literal_eval(text.value)).replace("\n", " ")
