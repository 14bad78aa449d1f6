"""docs/share/man/man1: a manual page for qmpmerge and one for each command, from the same help as docs/commands.md."""

import inspect
import re
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import click

from pages.commands import command, context
from pages.roff import bold, filled, item, plain, prose, usage, verbatim
from qmpmerge import __version__
from qmpmerge.cli.commands.group import FILES, cli
from qmpmerge.doctor import findings
from qmpmerge.errors import EXIT_CODES, EXIT_MEANINGS

CHANGELOG = Path(__file__).parents[2] / "debian/changelog"

SECTIONS = {"Example": "EXAMPLES", "Examples": "EXAMPLES", "Exit codes": "EXIT STATUS"}
"""Titles of lists in the help, and what they are called here."""

ABOUT_QEMU = ("qemu-img(1)", "qemu-storage-daemon(1)", "qemu-qmp-ref(7)")


def overview() -> str:
    """qmpmerge.1."""
    about, lines = inspect.cleandoc(cli.help or "").split("\n\n\b\n")
    target, _, _ = (cli.epilog or "").partition(" Besides ")
    ctx = click.Context(cli, **cli.context_settings)
    options = [one for one in cli.get_params(ctx) if isinstance(one, click.Option)]
    pages = [f"qmpmerge-{name}(1)" for name in FILES]
    parts = [
        *_head("qmpmerge", about, "COMMAND [OPTIONS] TARGET..."),
        ".SH DESCRIPTION",
        prose(about, target),
        ".SH COMMANDS",
        *(item(bold(name), command(name).get_short_help_str(limit=200)) for name in FILES),
        ".SH OPTIONS",
        *_options(options, ctx),
        ".SH EXAMPLES",
        verbatim(lines),
        ".SH EXIT STATUS",
        *(item(str(code), text) for code, text in exit_codes()),
        *_see_also(*pages, *ABOUT_QEMU),
    ]
    return "\n".join(parts) + "\n"


def page(name: str) -> str:
    """qmpmerge-NAME.1."""
    paragraphs = inspect.cleandoc(command(name).help or "").split("\n\n")
    ctx = context(name)
    parts = [
        *_head(f"qmpmerge {name}", paragraphs[0], " ".join(command(name).collect_usage_pieces(ctx))),
        ".SH DESCRIPTION",
        "\n.PP\n".join(_paragraph(one) for one in paragraphs if _title(one) is None),
        ".SH OPTIONS",
        *(line for title, options in command(name).groups(ctx) for line in (f".SS {title}", *_options(options, ctx))),
        *(f".SH {_title(one)}\n{_listed(one)}" for one in paragraphs if _title(one) is not None),
        ".PP",
        prose("qmpmerge(1) has the exit codes that all commands share."),
        *_see_also("qmpmerge(1)", *ABOUT_QEMU),
    ]
    return "\n".join(parts) + "\n"


def exit_codes() -> Iterator[tuple[int, str]]:
    """Each with its verdicts and what it says of the disks."""
    for code, meaning in EXIT_MEANINGS.items():
        verdicts = ", ".join(f"`{verdict}`" for verdict, its in EXIT_CODES.items() if its == code)
        yield code, f"{verdicts}: {meaning}" if verdicts else meaning[0].upper() + meaning[1:]
    for severity, code in sorted(findings.EXIT_CODES.items(), key=lambda one: one[1]):
        if code:
            yield code, f"Of `doctor --exit-code`: `{severity}` is the worst that was found"


def _head(name: str, about: str, synopsis: str) -> list[str]:
    _, _, last = CHANGELOG.read_text().partition("\n -- ")
    date = parsedate_to_datetime(last.split("\n")[0].partition("> ")[2]).date()
    title = name.replace(" ", "-")
    short = " ".join(about.split()).removesuffix(".")
    return [
        r".\" Made from the help by scripts/docs.",
        f'.TH {plain(title.upper())} 1 {date} "qmpmerge {__version__}" "QEMU disk images"',
        ".SH NAME",
        filled(f"{title} - {short[0].lower()}{short[1:]}"),
        ".SH SYNOPSIS",
        f"{bold(name)} {usage(synopsis)}",
    ]


def _title(paragraph: str) -> str | None:
    """The section for it where it is a list with a title."""
    first, _, _ = paragraph.removeprefix("\b\n").partition("\n")
    return SECTIONS.get(first.removesuffix(":")) if paragraph.startswith("\b\n") else None


def _listed(paragraph: str) -> str:
    """Such a list without its title; exit codes, which are told in columns, as items."""
    lines = inspect.cleandoc(paragraph.removeprefix("\b\n").partition("\n")[2])
    if _title(paragraph) == "EXAMPLES":
        return verbatim(lines)
    return "\n".join(item(code, text) for code, text in re.findall(r"^(\d+) +(.*(?:\n +.*)*)", lines, re.MULTILINE))


def _paragraph(paragraph: str) -> str:
    return verbatim(paragraph.removeprefix("\b\n")) if paragraph.startswith("\b\n") else prose(paragraph)


def _options(options: Iterable[click.Option], ctx: click.Context) -> Iterator[str]:
    for record in (option.get_help_record(ctx) for option in options):
        if record is not None:
            label = re.sub(r"--?[A-Za-z-]+", lambda one: bold(one[0]), record[0])
            yield item(label, record[1])


def _see_also(*pages: str) -> list[str]:
    last = len(pages) - 1
    references = (one.rstrip(")").partition("(") for one in pages)
    lines = (
        f".BR {plain(name)} ({section}){',' if number < last else ''}"
        for number, (name, _, section) in enumerate(references)
    )
    return [".SH SEE ALSO", *lines]
