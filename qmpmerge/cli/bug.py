"""What nobody foresaw: a bug of ours."""

import json
import sys
import traceback

from qmpmerge.cli import streams
from qmpmerge.cli.render.visible import visible

EXIT_CODE = 1
HINT = "this is a bug, please report it with the traceback; what it may have left `qmpmerge doctor` shows"


def show(error: BaseException, *, as_json: bool) -> int:
    """The traceback and a sentence on stderr, with --json one object on stdout too. Returns the exit code."""
    lines = [visible(line) for line in "".join(traceback.format_exception(error)).rstrip("\n").split("\n")]
    message = visible(traceback.format_exception_only(error)[-1].strip())
    text = "\n".join([*lines, f"bug: {message}", f"hint: {HINT}"]) + "\n"
    if not as_json:
        streams.complain(text)
        return EXIT_CODE
    sys.stderr.write(text)
    document = {"name": "internal", "message": message, "hint": HINT, "facts": {"traceback": lines}}
    sys.stdout.write(json.dumps({"schema": 1, "verdict": "bug", "error": document}) + "\n")
    return EXIT_CODE
