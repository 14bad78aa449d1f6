"""
The sessions on the pages: each page's blocks of ``console`` are typed into one fresh shell, in their order, on real QEMUs, and
what is seen then is what stands there.

    $ qmpmerge disks vm1        what begins with a dollar is typed; with "> ", what goes on with it
    ...                         what is seen, where three dots stand for any lines
    # vm1 writes a file         what happens elsewhere, see `Home.event`

What is typed and not shown, and has to succeed: a line in a comment (``<!-- $ ls -->``), what stands on another page below a
title (``<!-- first: PAGE # TITLE -->``), and each command that is a cell of a table on the pages `TYPED`.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rig.home import SHOWN, Home, home

from pages import DOCS

TYPED = {"phrasebook.md"}
FIRST = re.compile(r"<!-- first: (\S+) # (.+) -->")
HIDDEN = re.compile(r"<!-- ([$#]) (.+) -->")
CELL = re.compile(r"\| `(qmpmerge [^`]+)` \|")
ANSWER = re.compile(r"\[y/N\] (\w*)$", re.MULTILINE)

VOLATILE = (
    (r"#block\d+", "#block"),
    (r"\bqmpmerge-[0-9a-f]{8}\b", "NODE"),
    (r"\b\d+(\.\d+)?\s+m?s\b", "SECONDS"),
    (r"^ *\d+\.\d{6} ", "MOMENT "),
    (
        r"\b\d+(\.\d+)?\s+[KGT]iB",
        "SIZE",
    ),  # what the format itself takes, and the host's disk; what a guest wrote is MiB
    (r"^(\S+ +)\d+  \w+ +(?=/)", r"\1PID USER "),
    (r"\bpid\s+\d+", "PID"),
    (r"\b[\d.]+ \w+ of [\d.]+ \w+", "SOME of ALL"),
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\b", "TIME"),
    (r"\bchecks\s+\d+ of \d+ passed\n", "CHECKS\n"),
    (
        r"^(?:\S+ \S+:)? *not checked +that nobody else uses the images \(in-use\): [^:]+ does not show\n",
        "",
    ),  # of who is not root
    (r"\s+", " "),  # where a line is wrapped, and how wide a column is, depends on these
)
"""What differs from one run to the next, and what it is compared as."""


@dataclass(frozen=True)
class Step:
    """What is typed, in one line or more, or happens; the page's lines from `begin` to before `end` are what is seen."""

    where: str
    typed: list[str]
    begin: int
    end: int
    is_event: bool = False
    is_unseen: bool = False
    """Nothing of it is shown here, and it has to succeed."""


def pages() -> list[str]:
    """The names of those that have any."""
    return sorted(
        path.name for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"] if steps(path.name, read(path.name))
    )


def read(name: str) -> list[str]:
    return _path(name).read_text().splitlines()


def write(name: str, lines: list[str]) -> None:
    _path(name).write_text("\n".join(lines) + "\n")


def _path(name: str) -> Path:
    return DOCS.parent / name if name == "README.md" else DOCS / name


def steps(name: str, lines: list[str]) -> list[Step]:
    """All of a page."""
    return [*_steps(name, lines)]


def _steps(name: str, lines: list[str]) -> Iterator[Step]:
    number, is_inside = 0, False
    while number < len(lines):
        line, where = lines[number], f"{name}:{number + 1}"
        number += 1
        if line.startswith("```"):
            is_inside = line == "```console"
        elif is_inside:
            assert line.startswith(("$ ", "# ")), f"{where}: who says this?"
            begin = number
            while lines[begin].startswith("> "):
                begin += 1
            end = begin
            while not lines[end].startswith(("$ ", "# ", "```")):
                end += 1
            typed = [one[2:] for one in lines[number - 1 : begin]]
            yield Step(where, typed, begin, end, is_event=line.startswith("# "))
            number = end
        elif other := FIRST.fullmatch(line):
            yield from (replace(step, begin=number, end=number, is_unseen=True) for step in section(*other.groups()))
        elif hidden := HIDDEN.fullmatch(line):
            yield Step(where, [hidden[2]], number, number, is_event=hidden[1] == "#", is_unseen=True)
        elif name in TYPED and line.startswith("|"):
            yield from (Step(where, [one], number, number, is_unseen=True) for one in CELL.findall(line))


def section(name: str, title: str) -> list[Step]:
    """What stands on a page below a title, up to the next one of its level."""
    lines = read(name)
    (begin,) = (number for number, line in enumerate(lines) if re.fullmatch(rf"##+ {re.escape(title)}", line))
    level = len(lines[begin].partition(" ")[0])
    following = (number for number in range(begin + 1, len(lines)) if re.match(rf"#{{2,{level}}} ", lines[number]))
    end = next(following, len(lines))
    return [step for step in steps(name, lines) if begin < step.begin < end]


def play(name: str) -> list[tuple[Step, list[str], list[str]]]:
    """Type a page: each of its steps, what stands on the page, and what was seen."""
    lines = read(name)
    with home() as here:
        return [
            (step, lines[step.begin : step.end], _done(here, step, lines[step.begin : step.end]))
            for step in steps(name, lines)
        ]


def _done(here: Home, step: Step, shown: list[str]) -> list[str]:
    if step.is_event:
        here.event(step.typed[0])
        return []
    code, seen = here.type(step.typed, ANSWER.findall("\n".join(shown)))
    assert not step.is_unseen or code in (0, 7), f"{step.where}: `{step.typed[0]}` ends with {code}: {seen}"
    if step.typed == ["qmpmerge vms"]:  # others may run here
        seen = "".join(line for line in seen.splitlines(keepends=True) if line.startswith("NAME ") or SHOWN in line)
    return [] if step.is_unseen else seen.splitlines()


def is_as_shown(shown: list[str], seen: list[str]) -> bool:
    """But for what is volatile."""
    parts = "\n".join(["", *shown, ""]).split("\n...\n")
    pattern = ".*".join(re.escape(same(part)) for part in parts)
    return re.fullmatch(pattern, same("\n".join(seen))) is not None


def same(text: str) -> str:
    """What a text is compared as."""
    for pattern, word in VOLATILE:
        text = re.sub(pattern, word, f"{text}\n", flags=re.MULTILINE)
    return text.strip()


def difference(step: Step, shown: list[str], seen: list[str]) -> str:
    told = difflib.unified_diff(shown, seen, "on the page", "now", n=9, lineterm="")
    return "\n".join([f"{step.where}: $ {step.typed[0]}", *told, "if it is right now: scripts/docs --sessions"])


def renewed(name: str) -> list[str]:
    """The page's lines, with what is seen now wherever something else stands there."""
    lines = read(name)
    for step, shown, seen in reversed(play(name)):
        if not is_as_shown(shown, seen):
            lines[step.begin : step.end] = seen
    return lines
