"""
What of the documents is made from code and data, by `scripts/docs`: whole pages, pictures, and parts of pages that are
written by hand. There a part stands between two lines, the first of which names it::

    <!-- made by scripts/docs: exit-codes -->
    <!-- end -->
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pages import commands, errors, pictures, speed, states

DOCS = Path(__file__).parents[2] / "docs"

PARTS: dict[str, Callable[[], str]] = {
    "commands": commands.overview,
    "exit-codes": errors.exit_codes,
    "errors": errors.ended,
    "findings": errors.findings,
    "forceable": errors.forceable,
    "refusals": errors.refusals,
    "speed-gaps": speed.gaps,
    "speed-live": speed.live,
    "speed-machine": speed.machine,
    "speed-offline": speed.offline,
    "speed-summary": speed.summary,
    "states": states.meanings,
}
"""Each part by its name, and what makes its text."""

_PART = re.compile(r"^(<!-- made by scripts/docs: (\S+) -->\n).*?^(?=<!-- end -->$)", re.MULTILINE | re.DOTALL)


def parts(name: str) -> list[str]:
    """The names of a page's parts."""
    return [part for _, part in _PART.findall((DOCS / name).read_text())]


def filled(name: str) -> str:
    """A page with its parts as the code has them; KeyError for a part that is none."""
    return _PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]()}\n\n", (DOCS / name).read_text())


def _with_parts() -> list[str]:
    return [name for name in ("../README.md", *(page.name for page in sorted(DOCS.glob("*.md")))) if parts(name)]


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands.page,
    "pictures/chain.svg": pictures.chain,
    "pictures/speed.svg": pictures.bars,
    "pictures/states.svg": pictures.states,
    **{name: partial(filled, name) for name in _with_parts()},
}
"""Each page by its path from docs/, and what makes its text."""
