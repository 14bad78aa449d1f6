"""What nobody foresaw: a bug of ours."""

import sys
import traceback

from qmpmerge.cli import streams
from qmpmerge.cli.commands import group
from qmpmerge.cli.render.visible import visible

EXIT_CODE = 1
HINT = (
    "this is a bug, please report it with the traceback, and with what `--record FILE` writes where it comes again; what it "
    "may have left `qmpmerge doctor TARGET` shows"
)


def show(error: BaseException, *, as_json: bool) -> int:
    """The traceback and a sentence on stderr; with --json the one object on stdout has them. Returns the exit code."""
    lines = [visible(line) for line in "".join(traceback.format_exception(error)).rstrip("\n").split("\n")]
    message = visible(traceback.format_exception_only(error)[-1].strip())
    if as_json:
        from qmpmerge.cli.render.json import JsonOutput

        output = JsonOutput(sys.stdout, sys.stderr, command=group.typed())
        output.mistake("bug", name="internal", message=message, hint=HINT, facts={"traceback": lines})
    else:
        streams.complain("\n".join([*lines, f"bug: {message}", f"hint: {HINT}"]) + "\n")
    return EXIT_CODE
