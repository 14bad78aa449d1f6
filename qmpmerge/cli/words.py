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

from qmpmerge.cli import elsewhere
from qmpmerge.cli.commands.group import FILES, cli
from qmpmerge.errors import DiskNeeded, NoSuchTarget, Unreachable
from qmpmerge.errors.nearest import nearest, slips

LESS = {"vms": "disks", "disks": "chain"}
"""What shows of a VM, or of a disk, what the other command shows of all."""

FEW_SLIPS = 2
"""Names of commands have many letters in common: `blockcopy` is no `blockjob`."""


def hint(error: click.ClickException, line: Sequence[str]) -> str | None:
    """What is said beside the usage error in a line (without `qmpmerge`); None where there is no more to say."""
    context = getattr(error, "ctx", None)
    if context is None or not line:
        return None
    name, *rest = [*line[1:], "--help"] if line[0] == "help" else line
    if context.command is not cli:
        found = _first_that_parses(line for line in _put_right(name, rest) if line != [name, *rest])
        is_virsh = elsewhere.translated(name, rest) != rest
        return (_as_virsh_has_it(found) if is_virsh else _told("that is", found)) or _example(error, name, rest)
    if name in FILES:
        return None
    if name.startswith("-"):
        return _with_command_first(line)
    return _renamed(name, rest) or _misspelt(name, rest) or _without_command(name, rest)


def keep_to_our_guess(error: click.ClickException, hint: str | None) -> None:
    """In the place of click's, which are of any option with some letters in common, of hidden ones too."""
    if not isinstance(error, click.NoSuchOption) or error.possibilities is None:
        return
    params = [] if error.ctx is None else error.ctx.command.get_params(error.ctx)
    shown = [name for one in params if isinstance(one, click.Option) and not one.hidden for name in one.opts]
    close = None if hint else nearest(error.option_name, shown)
    error.possibilities[:] = [close] if close else []


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


# --- a command that is none -----------------------------------------------------------------------------------------


def _renamed(name: str, rest: Sequence[str]) -> str | None:
    """What another tool calls so."""
    from qmpmerge.operations.control import VERBS

    if name.casefold() in elsewhere.OTHERWISE:
        return elsewhere.OTHERWISE[name.casefold()]
    if name == "rebase" and "-u" in rest:
        return "`qemu-img rebase -u` moves no data, and looks at none: there is nothing like it here"
    words = elsewhere.translated(name, rest)
    names = [ours for ours, others in elsewhere.COMMANDS.items() if name.casefold() in others]
    lines = [[ours, *words] for ours in names]
    if name in VERBS:
        lines.append(["job", *words[:2], name, *words[2:]])
    if name == "blockjob":
        what = {"--pivot": "pivot", "--speed": "speed"}
        lines += [["job", *(what.get(word, word) for word in words)], ["jobs", *words[:1]]]
    if not lines:
        return None
    found = _first_that_parses(iter(lines))
    return _as_virsh_has_it(found) or f"that is {lines[0][0]}: see `qmpmerge {lines[0][0]} --help`"


def _misspelt(name: str, rest: Sequence[str]) -> str | None:
    known = [*FILES, *elsewhere.OTHERWISE, *(other for others in elsewhere.COMMANDS.values() for other in others)]
    close = nearest(name, known)
    if close is None or slips(name.casefold(), close) > FEW_SLIPS:
        return None
    if close not in FILES:
        return _renamed(close, rest)
    line = _first_that_parses(iter([[close, *rest]])) or [close, "--help"]
    return f"did you mean `{_line(line)}`?"


def _with_command_first(line: Sequence[str]) -> str | None:
    """Options that stand before the command."""
    place = next((place for place, word in enumerate(line) if not word.startswith("-")), len(line))
    moved = [*line[place:], *line[:place]] if place < len(line) and line[place] in FILES else []
    return _told("the command comes first, as in", _first_that_parses(iter([moved] if moved else [])))


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
    if name == "snapshot" and "-l" in rest:  # which qemu-img lists the snapshots with that are inside of an image
        yield ["chain", *(word for word in rest if word != "-l"), "--details"]
    words = elsewhere.translated(name, rest)
    if words != rest:
        yield [name, *words]
    if name == "job":
        yield from ([name, *line] for line in _with_verb_in_place(words))
    if name in LESS:
        yield [LESS[name], *words]
    if name == "snapshot":
        yield from ([name, *line] for line in _with_assignments(words))
    for number in [word for word in words if word.isdecimal()] if name in ("commit", "pull") else ():
        yield [name, *(word for word in words if word is not number), "--speed", f"{number}M"]  # as virsh takes it


def _with_verb_in_place(words: Sequence[str]) -> Iterator[list[str]]:
    from qmpmerge.operations.control import VERBS

    verbs = [elsewhere.VERBS.get(word, word) for word in words]
    given = [(place, word if word in VERBS else nearest(word, VERBS)) for place, word in enumerate(verbs)]
    for place, verb in sorted(given, key=lambda one: words[one[0]] not in VERBS):
        first, *others = (word for number, word in enumerate(words) if number != place) if len(words) > 1 else ("",)
        if verb is not None and others:
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


# --- more than a line -------------------------------------------------------------------------------------------------


def _as_virsh_has_it(words: Sequence[str] | None) -> str | None:
    """The line, and where virsh would cancel the job when its time has passed, one that does."""
    told = _told("that is", words)
    if not words or "--timeout" not in words:
        return told
    place = words.index("--timeout")
    line = _line([*words[:place], *words[place + 2 :]])
    cancels = f"`timeout -s INT {shlex.join(words[place + 1 : place + 2])} {line}` cancels it then"
    return f"{told}, which leaves the job to QEMU after that time (exit code 7); {cancels}"


def _example(error: click.ClickException, name: str, rest: Sequence[str]) -> str | None:
    """What the line lacks, where nobody can know what was meant."""
    if name == "job" and "speed" in rest:
        return _told("as in", _first_that_parses(iter([[name, *rest, "50M"]])))
    if name == "job" and isinstance(error, click.MissingParameter):
        return "TARGET, ID and VERB are needed, as in `qmpmerge job vm1 vda cancel`"
    if name == "snapshot" and not {"-a", "-c", "-d"}.isdisjoint(rest):
        return "a snapshot is an overlay here: those inside of an image are made and removed by `qemu-img snapshot`"
    if name == "snapshot" and isinstance(error, click.BadParameter) and error.param and error.param.name == "overlays":
        return f"`{_line(['disks', error.ctx.params['target']])}` shows what DISK can be" if error.ctx else None
    return None
