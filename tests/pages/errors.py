"""Errors, refusals, exit codes and findings, from the classes, from `doctor.catalogue`, and from the tests' marks of harm."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator

from rig.harms import marked

import qmpmerge
from pages.tables import table
from qmpmerge.doctor import findings as doctor
from qmpmerge.doctor.catalogue import MEANINGS
from qmpmerge.errors import EXIT_CODES, FORCEABLE, Error, Failed, Refused, Unknown, Unreachable, Untouched
from qmpmerge.errors.base import EXIT_MEANINGS, WORST

BRANCHES = (Untouched, Refused, Unreachable, Failed, Unknown)

TESTED = (
    "Of each there is a test in which the harm happens to a plain QEMU or qemu-img, next to one in which it does not."
)

WITHOUT_OUTCOME = {1: "bug", 2: "usage"}
"""Verdicts that no class has: a traceback, and click's."""


def exit_codes() -> str:
    """A table of all of them, and which of several counts."""
    verdicts = [*((verdict, code) for code, verdict in WITHOUT_OUTCOME.items()), *EXIT_CODES.items()]
    found = {
        code: f"`doctor --exit-code`: the worst that was found is `{bad}`" for bad, code in doctor.EXIT_CODES.items()
    }
    rows = [
        (str(code), ", ".join(f"`{verdict}`" for verdict, its in verdicts if its == code), meaning)
        for code, meaning in sorted({**found, **EXIT_MEANINGS}.items())
    ]
    worst = f"Where one command has several outcomes, the worst counts: {', '.join(map(str, WORST))}."
    return f"{table('exit', 'verdicts', 'what it says', rows=rows)}\n\n{worst}"


def refusals() -> str:
    """Those whose harm a test shows, and all others."""
    harms = marked()
    kinds = sorted((kind for kind in concrete() if kind.verdict == "refused"), key=name_of)
    checked = [_error(kind, harms[name_of(kind)]) for kind in kinds if name_of(kind) in harms]
    others = [_error(kind) for kind in kinds if name_of(kind) not in harms]
    return "\n\n".join(["## What would be ruined", TESTED, *checked, "## All others", *others])


def ended() -> str:
    """The errors of all other verdicts, a section each."""
    kinds = sorted(concrete(), key=lambda kind: (EXIT_CODES[kind.verdict], name_of(kind)))
    verdicts = dict.fromkeys(kind.verdict for kind in kinds if kind.verdict != "refused")
    return "\n\n".join(_section(verdict, [kind for kind in kinds if kind.verdict == verdict]) for verdict in verdicts)


def findings() -> str:
    """All that the doctor finds."""
    rows = [(f"`{name}`", ", ".join(bad), what, fix) for name, (bad, what, fix) in MEANINGS.items()]
    return table("finding", "how bad", "what it means", "what fixes it", rows=rows)


def forceable() -> str:
    """What `--force` takes, as a sentence has it."""
    *others, last = (f"[`{name}`](#{_refusal(name)})" for name in FORCEABLE)
    return f"{', '.join(others)} and {last}"


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


def _section(verdict: str, kinds: Iterable[type[Error]]) -> str:
    return "\n\n".join([f"## `{verdict}`: exit code {EXIT_CODES[verdict]}", *map(_error, kinds)])


def _error(kind: type[Error], harm: str = "") -> str:
    name = name_of(kind)
    paragraphs = [" ".join(one.split()) for one in inspect.cleandoc(kind.__doc__ or "").split("\n\n")]
    facts = [f"* says: {kind.sentence}"]
    facts += [f"* hint: {kind.advice}"] if kind.advice else []
    facts += [f"* without this check: {harm}"] if harm else []
    facts += [f"* `--force {force}` goes on" for force in FORCEABLE if _refusal(force) == name]
    return "\n\n".join([f"### {name}", *paragraphs, "\n".join(facts)])


def _refusal(force: str) -> str:
    """The refusal that a word of `--force` lets pass; one of them has another name."""
    return {"libvirt": "libvirt-managed"}.get(force, force)
