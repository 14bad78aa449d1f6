"""The pages of docs/ that are made from the code, by `scripts/docs`."""

from collections.abc import Callable
from pathlib import Path

from pages import commands, errors

DOCS = Path(__file__).parents[2] / "docs"

PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands.page,
    "errors.md": errors.page,
}
"""Each page by its name, and what makes its text."""
