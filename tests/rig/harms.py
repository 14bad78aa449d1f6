"""What each refusal is there for, as docs/refusals.md tells it: every harm is a test in which it happens."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])


def harm(refusal: str, happens: str) -> Callable[[Test], Test]:
    """Mark a test that does without the check `refusal`, and in which this happens."""
    return lambda test: test


def marked() -> dict[str, str]:
    """
    All marks of the suite, by their refusals' names, whichever of its files this process has imported; several of one are
    told in the order of their files.
    """
    calls = [
        call
        for file in sorted(Path(__file__).parents[1].rglob("test_*.py"))
        for test in ast.parse(file.read_text()).body
        if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef)
        for call in test.decorator_list
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == harm.__name__
    ]
    happens: dict[str, list[str]] = {}
    for call in calls:
        refusal, words = map(ast.literal_eval, call.args)
        happens.setdefault(refusal, []).append(words)
    return {refusal: "; ".join(dict.fromkeys(words)) for refusal, words in happens.items()}
