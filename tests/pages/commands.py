"""docs/commands.md: every command with its usage, text, arguments and options, as click knows them."""

import inspect
import textwrap

import click

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
    rows = [f"| {_code(record[0])} | {cell(record[1])} |" for record in records if record is not None]
    return "\n".join([f"| {title} | |", "|---|---|", *rows])


def _code(label: str) -> str:
    return f"`{cell(label)}`"


def cell(text: str) -> str:
    """As a cell of a table."""
    return text.replace("|", r"\|")
