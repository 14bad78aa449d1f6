"""
The question before a guest is moved onto its base, which nothing takes back: the plan is shown, and carried out if the user
says so.

While it stands nothing is locked and no session is open: a monitor serves one client, and an hour may pass. So what is carried
out must be the plan that was shown; where the chain is another one by then, its plan is shown.
"""

import functools
import io
import os
import termios
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from qmpmerge.cli import streams
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
    """Whether somebody sits at a terminal: one of the three streams is on it, wherever the others lead."""
    return _terminal() is not None


@functools.cache
def _terminal() -> tuple[int, int] | None:
    """
    Where an answer is read from and a question is written to. Our own terminal, as of ssh and sudo: what is piped in is no
    answer, and who sends stderr elsewhere has still to see what is asked.
    """
    if not any(map(os.isatty, range(3))):
        return None
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:  # one that is not ours, as a service may have for its output, is asked only if it can answer
        return (0, 2) if os.isatty(0) and os.isatty(2) else None
    return terminal, terminal


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
    """Ask the user, who can be asked, about what is shown. Raises Cancelled for all but a yes."""
    from qmpmerge.cli.render.text import TextOutput

    source, sink = _terminal() or (0, 2)
    screen = streams.text(sink)
    show(TextOutput(screen, screen))
    while (answer := _answer(question, source, screen)) not in YES:
        if answer in NO:
            raise Cancelled
        question = AGAIN


def _answer(question: str, source: int, screen: TextIO) -> bytes:
    """What was answered, lower case and without its newline; b"" for no more than Enter, Ctrl-C or a terminal that is gone."""
    try:
        termios.tcflush(source, termios.TCIFLUSH)  # what was typed before the question stands is no answer
        screen.write(question)
        answer = io.FileIO(source, closefd=False).readline()
    except (KeyboardInterrupt, OSError, termios.error):
        answer = b""
    if not answer.endswith(b"\n"):
        screen.write("\n")
        return b""
    return answer.strip().lower()
