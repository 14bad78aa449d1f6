"""What each refusal is there for: the README's table, whose every row is a test in which the harm happens."""

from collections.abc import Callable
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])
HARMS: dict[str, str] = {}


def harm(refusal: str, happens: str) -> Callable[[Test], Test]:
    """Mark a test that does without the check, and in which this happens."""

    def marked(test: Test) -> Test:
        HARMS[refusal] = happens
        return test

    return marked
