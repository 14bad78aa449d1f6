"""
What a line that failed was meant to be: other tools' names of our commands, words in the wrong order, slips of the finger.

Nothing is guessed and done: it is told, as a line to type. Nothing here is imported before a line has failed.
"""

import os
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence

import click

from qmpmerge.cli.commands.group import FILES, cli
from qmpmerge.errors import DiskNeeded, NoSuchTarget, Unreachable
from qmpmerge.errors.nearest import nearest

ELSEWHERE = {
    "vms": ("list", "ls", "ps", "vm"),
    "disks": ("list", "ls", "domblklist", "domblkinfo", "query-block"),
    "chain": ("info", "backing-chain", "snapshot-list", "snapshots", "layers"),
    "snapshot": ("snapshot-create-as", "snapshot-create", "blockdev-snapshot-sync", "snap", "create"),
    "commit": ("blockcommit", "block-commit", "merge"),
    "pull": ("blockpull", "block-stream", "stream", "rebase"),
    "jobs": ("blockjob", "status", "query-jobs", "query-block-jobs"),
    "doctor": ("check", "fsck", "repair"),
    "clean": ("cleanup", "prune", "rm", "delete"),
}
"""What virsh, qemu-img, QMP and people call our commands; of several the first that takes the rest of the line is meant."""

HABITS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("--active", "--async", "--keep-relative", "--verbose", "--wait", "--domain", "--path"), ()),
    **dict.fromkeys(("--atomic", "--disk-only", "--info", "--no-metadata"), ()),
    "--abort": ("cancel",),
    "--bandwidth": ("--speed", "{}M"),
    "--delete": ("--merged-files", "delete"),
    "--diskspec": ("{}",),
    "--reuse-external": ("--reuse",),
}
"""What virsh's options are here, {} being their value: nothing where it is so anyway, or where the value stands for itself."""


LESS = {"vms": "disks", "disks": "chain"}
"""What shows of a VM, or of a disk, what the other command shows of all."""


def hint(error: click.ClickException, line: Sequence[str]) -> str | None:
    """What is said beside the usage error in a line (without `qmpmerge`); None where there is no more to say."""
    context = getattr(error, "ctx", None)
    if context is None or not line:
        return None
    name, *rest = [*line[1:], "--help"] if line[0] == "help" else line
    if context.command is not cli:
        return _told("that is", _first_that_parses(_put_right(name, rest)))
    if name in FILES or name.startswith("-"):
        return None
    return _renamed(name, rest) or _misspelt(name, rest) or _without_command(name, rest)


def explained(error: NoSuchTarget | DiskNeeded) -> NoSuchTarget | DiskNeeded:
    """The same, with the line that was meant: where another argument is what TARGET should be, or where DISK was left out."""
    context = click.get_current_context(silent=True)
    names = [str(one.name) for one in context.command.params if isinstance(one, click.Argument)] if context else []
    if context is None or len(names) < 2 or names[0] != "target":
        return error
    name, *rest = sys.argv[1:]
    first, second = (_place(context, rest, argument) for argument in names[:2])
    if isinstance(error, DiskNeeded):
        if first is None or names[1] != "disk" or second is not None:
            return error
        line = [name, *rest[: first + 1], error.known[0], *rest[first + 1 :]]
        return DiskNeeded(target=error.target, known=error.known, command=_line(line))
    if first is None or second is None or not _is_target(rest[second]):
        return error
    rest[first], rest[second] = rest[second], rest[first]
    return NoSuchTarget(target=error.target, command=_line([name, *rest]))


def _place(context: click.Context, words: Sequence[str], argument: str) -> int | None:
    """Where the argument stands in a line that was understood; an option may have the same word for its value."""
    value, mark = context.params.get(argument), "\0"
    for place in (place for place, word in enumerate(words) if word == value):
        marked = [*words[:place], mark, *words[place + 1 :]]
        if context.command.make_parser(context).parse_args(marked)[0].get(argument) == mark:
            return place
    return None


def _is_target(word: str) -> bool:
    """Whether there is a socket or a VM of this name: a disk can be called by its image's file too."""
    from qmpmerge.targets import live

    try:
        return stat.S_ISSOCK(os.stat(word).st_mode)
    except (OSError, ValueError):
        pass
    try:
        live.find(word)
    except NoSuchTarget:
        return False
    except Unreachable:  # there is one, or more than one
        return True
    return True


# --- lines ----------------------------------------------------------------------------------------------------------


def _line(words: Sequence[str]) -> str:
    return shlex.join(["qmpmerge", *words])


def _told(before: str, words: Sequence[str] | None) -> str | None:
    return f"{before} `{_line(words)}`" if words else None


def _first_that_parses(lines: Iterator[list[str]]) -> list[str] | None:
    return next(filter(_parses, lines), None)


def _parses(line: Sequence[str]) -> bool:
    """Whether a command takes the words, which all but `vms` need; nothing is done."""
    name, *rest = line
    command = cli.get_command(click.Context(cli), name)
    if command is None or not {"-h", "--help"}.isdisjoint(rest) or not (rest or name == "vms"):
        return False
    try:
        command.make_context(name, rest)
    except click.ClickException:
        return False
    return True


def _translated(words: Sequence[str]) -> list[str]:
    """The words without virsh's options, or with ours in their place."""
    found: list[str] = []
    left = list(words)
    while left:
        option, equals, value = left.pop(0).partition("=")
        if option not in HABITS:
            found.append(option + equals + value)
            continue
        meant = HABITS[option]
        if "{}" in "".join(meant) and not equals:
            value = left.pop(0) if left else ""
        disk, _, file = value.partition(",file=")
        value = f"{disk}={file.partition(',')[0]}" if file else value
        found += [one.format(value) for one in meant] if meant or not value else [value]
    return found


# --- a command that is none -----------------------------------------------------------------------------------------


def _renamed(name: str, rest: Sequence[str]) -> str | None:
    """What another tool calls so."""
    from qmpmerge.operations.control import VERBS

    words = _translated(rest)
    names = [ours for ours, others in ELSEWHERE.items() if name.casefold() in others]
    lines = [[ours, *words] for ours in names]
    if name in VERBS:
        lines.append(["job", *words[:2], name, *words[2:]])
    if name == "blockjob":
        what = {"--pivot": "pivot", "--speed": "speed"}
        lines += [["job", *(what.get(word, word) for word in words)], ["jobs", *words[:1]]]
    if not lines:
        return None
    if not set(names) <= set(FILES):
        return "data is moved down here, never up: see `qmpmerge commit --help`"
    found = _first_that_parses(iter(lines))
    return _told("that is", found) or f"that is {lines[0][0]}: see `qmpmerge {lines[0][0]} --help`"


def _misspelt(name: str, rest: Sequence[str]) -> str | None:
    close = nearest(name, [*FILES, *(other for others in ELSEWHERE.values() for other in others)])
    if close is None:
        return None
    if close not in FILES:
        return _renamed(close, rest)
    line = _first_that_parses(iter([[close, *rest]])) or [close, "--help"]
    return f"did you mean `{_line(line)}`?"


def _without_command(name: str, rest: Sequence[str]) -> str | None:
    """A TARGET in the place of the command."""
    if rest and rest[0] in FILES:
        return _told("the command comes first, as in", _first_that_parses(iter([[rest[0], name, *rest[1:]]])))
    from qmpmerge.targets.open import is_image

    command = "chain" if is_image(name) else "doctor" if os.path.isdir(name) else "disks" if _is_target(name) else None
    if command is not None:
        return f"a command comes first, as in `{_line([command, name])}`"
    return "a command comes first: see `qmpmerge --help`" if "/" in name else None


# --- a command that does not take its words -------------------------------------------------------------------------


def _put_right(name: str, rest: Sequence[str]) -> Iterator[list[str]]:
    """What may have been meant, the likeliest first."""
    words = _translated(rest)
    if words != rest:
        yield [name, *words]
    if name == "job":
        yield from ([name, *line] for line in _with_verb_in_place(words))
    if name in LESS:
        yield [LESS[name], *words]
    if name == "snapshot":
        yield from ([name, *line] for line in _with_assignments(words))


def _with_verb_in_place(words: Sequence[str]) -> Iterator[list[str]]:
    from qmpmerge.operations.control import VERBS

    for place, verb in enumerate(words):
        first, *others = (word for number, word in enumerate(words) if number != place) if len(words) > 1 else ("",)
        if verb in VERBS and others:
            swapped = not _is_target(first) and _is_target(others[0])
            target, job = (others[0], first) if swapped else (first, others[0])
            yield [target, job, verb, *others[1:]]


def _with_assignments(words: Sequence[str]) -> Iterator[list[str]]:
    """TARGET first; and ``vda=FILE`` where ``vda FILE`` stands."""
    plain = [word for word in words if "=" not in word and not word.startswith("-")]
    if len(plain) == 1:
        yield [plain[0], *(word for word in words if word is not plain[0])]
    if len(words) == 3 and len(plain) == 3:
        yield [words[0], f"{words[1]}={words[2]}"]
