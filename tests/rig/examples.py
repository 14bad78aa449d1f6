"""The examples of the library's pages and docstrings, as programs that can be run."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import qmpmerge

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs/library.md")
FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PROMISED = re.compile(r"# prints (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A part of a page or of a docstring."""

    where: str
    text: str

    @property
    def promised(self) -> list[str]:
        """What lines begin with that it prints, among others and in this order, as its comments ``# prints LINE`` say."""
        return PROMISED.findall(self.text)

    @property
    def program(self) -> str:
        """All of it, where a docstring leaves out the import, and the function that awaits."""
        if "import qmpmerge" in self.text:
            return self.text
        if "await " not in self.text:
            return f"import qmpmerge\n\n{self.text}"
        body = textwrap.indent(self.text, "    ")
        return f"import asyncio\nimport qmpmerge\n\n\nasync def main() -> None:\n{body}\n\nasyncio.run(main())\n"


def on_pages() -> Iterator[Example]:
    for page in PAGES:
        for number, program in enumerate(FENCED.findall(page.read_text()), 1):
            yield Example(f"{page.name} {number}", program)


def files_of(page: str) -> dict[str, str]:
    """The files of the project that a page shows, by their names, which are the titles of blocks."""
    return dict(TITLED.findall((ROOT / "docs" / page).read_text()))


def in_docstrings() -> Iterator[Example]:
    """The indented parts, of the package, and of what is public in it, that name `qmpmerge`."""
    for where, documented in public():
        for number, part in enumerate(indented(inspect.getdoc(documented) or ""), 1):
            if "qmpmerge." in part:
                yield Example(f"{where} {number}", part)


def public() -> Iterator[tuple[str, object]]:
    for module in (qmpmerge, qmpmerge.sync, qmpmerge.errors):
        yield module.__name__, module
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                yield from ((f"{module.__name__}.{name}.{one}", method) for one, method in vars(value).items())


def indented(text: str) -> Iterator[str]:
    """The parts of a docstring that stand further to the right than the rest."""
    for part in re.findall(r"(?:^(?: {4}.*)?\n)+", text + "\n", re.MULTILINE):
        if part.strip():
            yield textwrap.dedent(part).strip() + "\n"
