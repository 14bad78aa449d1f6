"""
Ctrl-C while a command gets ready: nothing was begun, so there is nothing to cancel yet, and nobody who could say so.

Python's own KeyboardInterrupt comes out of whatever is being imported, or is lost in a callback of that. So it is only noted,
and whoever begins the work looks here first.
"""

import signal
from types import FrameType

_noted = False


def note() -> None:
    """From now on note it; not where we were started to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _note)


def _note(_number: int, _frame: FrameType | None) -> None:
    global _noted
    _noted = True


def is_noted() -> bool:
    """Whether there was one."""
    return _noted


def raise_now() -> None:
    """Raise KeyboardInterrupt where it was noted, and from now on."""
    if signal.getsignal(signal.SIGINT) is _note:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _noted:
        raise KeyboardInterrupt
