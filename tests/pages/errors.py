"""docs/errors.md: every error and every finding of the doctor, from the classes and from `doctor.catalogue`."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import qmpmerge
from pages.commands import cell
from qmpmerge.doctor.catalogue import MEANINGS
from qmpmerge.errors import EXIT_CODES, FORCEABLE, Error, Failed, Refused, Unknown, Unreachable, Untouched

BRANCHES = (Untouched, Refused, Unreachable, Failed, Unknown)

INTRODUCTION = """\
# Errors, and what the doctor finds

Made from the code by `scripts/docs`. An error has a name, a sentence, a hint, and facts, which are the words in braces here;
its verdict is the exit code. In JSON it is `error`, in the library an exception of `qmpmerge.errors`.
"""


def page() -> str:
    """The whole page."""
    verdicts = dict.fromkeys(kind.verdict for kind in sorted(concrete(), key=lambda kind: EXIT_CODES[kind.verdict]))
    sections = [_section(verdict) for verdict in verdicts]
    return "\n".join([INTRODUCTION, *sections, _findings()])


def below(kind: type[Error]) -> Iterator[type[Error]]:
    """All that are derived from it."""
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


def concrete() -> list[type[Error]]:
    """The errors of the product that are raised: those at the end of a branch, wherever they are defined."""
    for module in pkgutil.walk_packages(qmpmerge.__path__, "qmpmerge."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = dict.fromkeys(kind for kind in below(Error) if kind.__module__.startswith("qmpmerge."))
    return [kind for kind in found if kind not in BRANCHES]


def name_of(kind: type[Error]) -> str:
    """As users write it."""
    return kind.__new__(kind).name


def _section(verdict: str) -> str:
    kinds = sorted((kind for kind in concrete() if kind.verdict == verdict), key=name_of)
    return "\n".join([f"## `{verdict}`: exit code {EXIT_CODES[verdict]}\n", *map(_error, kinds)])


def _error(kind: type[Error]) -> str:
    name = name_of(kind)
    force = _forced_by(name)
    rows = [f"### {name}\n", f"{' '.join(inspect.cleandoc(kind.__doc__ or '').split())}\n", f"* says: {kind.sentence}"]
    rows += [f"* hint: {kind.advice}"] if kind.advice else []
    rows += [f"* `--force {force}` goes on"] if force else []
    return "\n".join(rows) + "\n"


def _forced_by(name: str) -> str:
    """The word of `--force` for a refusal; that of one differs."""
    word = {"libvirt-managed": "libvirt"}.get(name, name)
    return word if word in FORCEABLE else ""


def _findings() -> str:
    rows = [
        f"| `{name}` | {', '.join(bad)} | {cell(what)} | {cell(fix)} |" for name, (bad, what, fix) in MEANINGS.items()
    ]
    head = ["## What the doctor finds\n", "| finding | how bad | what it means | what fixes it |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"
