"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    """As a cell of a table."""
    return text.replace("|", r"\|")


def table(*heads: str, rows: Iterable[Sequence[str]]) -> str:
    """A row a line; cells are Markdown."""
    lines = [" | ".join(heads), "|".join("---" for _ in heads), *(" | ".join(map(cell, row)) for row in rows)]
    return "\n".join(f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines)
