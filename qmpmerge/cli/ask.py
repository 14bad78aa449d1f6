"""
The question before a guest is moved onto its base, which nothing takes back: the plan is shown, and carried out if the user
says so.

While it stands nothing is locked and no session is open: a monitor serves one client, and an hour may pass. So what is carried
out must be the plan that was shown; where the chain is another one by then, its plan is shown.
"""

import sys
import termios
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qmpmerge.cli.render.visible import visible
from qmpmerge.errors import Cancelled, NotAgreed, Refused

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Outcome
    from qmpmerge.cli.render.output import Output

CHOICE = "[y/N] "
QUESTION = f"Merge, and have the VM use {{base}} from now on? {CHOICE}"
AGAIN = f"Please answer y or n {CHOICE}"

YES, NO = (b"y", b"yes"), (b"n", b"no", b"")


def can_be_asked() -> bool:
    """Whether somebody sits at a terminal, sees what is shown and can answer. Results may go elsewhere."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def before(
    plan: "Callable[[Output], Outcome | None]", merge: "Callable[[Output, Sequence[Outcome]], str]"
) -> "Callable[[Output], str]":
    """
    `merge`, after the user has agreed to what `plan` shows; None where it has nothing to ask.

    `merge` gets the plans to which the user has agreed, and raises NotAgreed before it begins another one. Raises Cancelled.
    """

    def asked(output: "Output") -> str:
        was_refused = False
        while True:
            agreed: list[Outcome] = []
            try:
                planned = plan(output)
            except Refused:  # what an earlier run has begun is gone on with, whatever stands against a new merge
                if was_refused:
                    raise
                was_refused = True
            else:
                agreed = [_agreed(planned)] if planned is not None else []
            try:
                return merge(output, agreed)
            except NotAgreed:
                if agreed:
                    output.note("the images have changed since; what would be done now:")

    return asked


def _agreed(planned: "Outcome") -> "Outcome":
    """The plan, if the user wants it. Raises Cancelled."""
    question = QUESTION.format(base=visible(planned.after.active.name))
    confirm(lambda screen: screen.commit(planned), question)
    return planned


def confirm(show: "Callable[[Output], None]", question: str) -> None:
    """Ask the user about what is shown. Raises Cancelled for all but a yes."""
    from qmpmerge.cli.render.text import TextOutput

    show(TextOutput(sys.stderr, sys.stderr))
    while (answer := _answer(question)) not in YES:
        if answer in NO:
            raise Cancelled
        question = AGAIN


def _answer(question: str) -> bytes:
    """What was answered, lower case and without its newline; b"" for no more than Enter, Ctrl-C or a terminal that is gone."""
    try:
        termios.tcflush(sys.stdin, termios.TCIFLUSH)  # what was typed before the question stands is no answer
        sys.stderr.write(question)
        answer = sys.stdin.buffer.readline()
    except (KeyboardInterrupt, OSError):
        answer = b""
    if not answer.endswith(b"\n"):
        sys.stderr.write("\n")
        return b""
    return answer.strip().lower()
