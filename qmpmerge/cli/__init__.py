"""The command line: parse, call, render."""

import gc
import io
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from qmpmerge.cli import interrupts, streams

if TYPE_CHECKING:
    import click


COLLECT_AFTER = 100_000
"""New objects before the collector looks through them; Python's own 700 costs a sixth of a short command's time."""


def main() -> None:
    """The `qmpmerge` command."""
    _speak_utf8()
    interrupts.note()
    streams.take()
    gc.set_threshold(COLLECT_AFTER)
    import click

    from qmpmerge.cli.commands.group import cli

    if "_QMPMERGE_COMPLETE" in os.environ:
        from qmpmerge.cli import shells

        shells.register()
    try:
        code = cli.main(prog_name="qmpmerge", standalone_mode=False)
    except click.ClickException as error:
        _usage(error)
        code = error.exit_code
    except click.Abort:
        code = 130
    except SystemExit as ended:  # click's way to end a completion
        code = ended.code
    except Exception as error:
        from qmpmerge.cli import bug

        code = bug.show(error, as_json=_wants_json())
    _leave(code if isinstance(code, int) else 0)


def _speak_utf8() -> None:
    """
    Start anew in Python's UTF-8 mode where the locale is another one.

    QMP and JSON carry names as UTF-8. In Latin-1 the name of an image that QEMU tells would be that of another file, and in
    ASCII that of none.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode and sys.executable:
        os.execv(sys.executable, [sys.orig_argv[0], "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606


def _leave(code: int) -> NoReturn:
    """Exit without taking the interpreter apart, which takes an eighth of a short command's time and frees nothing."""
    streams.settle(as_json=_wants_json())
    os._exit(code)


def _wants_json() -> bool:
    return "--json" in sys.argv


def _usage(error: "click.ClickException") -> None:
    """A usage error as click shows it; with --json as the one object on stdout that a program waits for."""
    from qmpmerge.cli import words

    hint = words.hint(error, sys.argv[1:])
    words.keep_to_our_guess(error, hint)
    if _wants_json():
        from qmpmerge.cli.commands import group
        from qmpmerge.cli.render.json import JsonOutput

        command = group.typed()
        advice = hint or (f"see `qmpmerge {command} --help`" if command else "see `qmpmerge --help`")
        output = JsonOutput(sys.stdout, sys.stderr, command=command)
        output.mistake("usage", name="usage", message=error.format_message(), hint=advice, facts={})
        return
    from qmpmerge.cli.render.page import Page

    shown = io.StringIO()
    error.show(shown)
    lines = [*shown.getvalue().expandtabs(4).rstrip("\n").split("\n"), *([f"hint: {hint}"] if hint else [])]
    streams.complain("".join(map(Page(sys.stderr).wrapped, lines)))
