"""docs/commands.md: every command with its usage, text, arguments and options, as click knows them."""

import inspect
import re
import textwrap

import click

from pages.tables import table
from qmpmerge.cli.commands.group import FILES, cli
from qmpmerge.cli.commands.grouped import Grouped

WIDTH = 120

INTRODUCTION = """\
# Commands

Made from the commands themselves by `scripts/docs`; `qmpmerge COMMAND --help` shows the same.

"""


def page() -> str:
    """The whole page."""
    own = f"{INTRODUCTION}{text_of(cli)}\n\n{_paragraph(cli.epilog or '')}"
    return "\n\n".join([own, *(_section(name) for name in FILES)]) + "\n"


def overview() -> str:
    """A line a command: the first example of its help, and what it is for."""
    rows = [(f"[`{examples(name)[0].strip()}`](docs/commands.md#{name})", short(name)) for name in FILES]
    return table("command", "", rows=rows)


def examples(name: str) -> list[str]:
    """The commands that its help shows."""
    listed = re.search(r"^Examples?:\n((?:  .*\n?)+)", inspect.cleandoc(command(name).help or ""), re.MULTILINE)
    assert listed is not None, f"the help of {name} has no example"
    return re.findall(r"qmpmerge (?:[^ )>|]+ ?)+", listed[1])


def short(name: str) -> str:
    """What it is for, in a sentence."""
    return command(name).get_short_help_str(limit=WIDTH)


def command(name: str) -> Grouped:
    """One of `FILES`."""
    found = cli.get_command(click.Context(cli), name)
    assert isinstance(found, Grouped), name
    return found


def context(name: str) -> click.Context:
    """As where the command is run."""
    return click.Context(command(name), click.Context(cli, **cli.context_settings), info_name=name)


def text_of(told: click.Command) -> str:
    """What its help says, in Markdown; what stands after a \\b, line by line."""
    paragraphs = inspect.cleandoc(told.help or "").split("\n\n")
    return "\n\n".join(_lines(one) if one.startswith("\b\n") else _paragraph(one) for one in paragraphs)


def _lines(paragraph: str) -> str:
    title, _, rest = paragraph.removeprefix("\b\n").partition("\n")
    if not title.endswith(":"):
        title, rest = "", paragraph.removeprefix("\b\n")
    return f"{title}\n\n```\n{inspect.cleandoc(rest)}\n```".lstrip()


def _paragraph(text: str) -> str:
    words = " ".join(text.split()).replace("<", "&lt;").replace("*", r"\*")
    return textwrap.fill(words, WIDTH, break_long_words=False, break_on_hyphens=False)


def _section(name: str) -> str:
    ctx = context(name)
    usage = f"```\nqmpmerge {name} {' '.join(command(name).collect_usage_pieces(ctx))}\n```"
    groups = [_group(title, options, ctx) for title, options in command(name).groups(ctx)]
    return "\n\n".join([f"## {name}", usage, text_of(command(name)), *groups])


def _group(title: str, options: list[click.Option], ctx: click.Context) -> str:
    records = [option.get_help_record(ctx) for option in options]
    return table(title, "", rows=[(f"`{record[0]}`", record[1]) for record in records if record is not None])
