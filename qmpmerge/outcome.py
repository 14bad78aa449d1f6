"""
What a merge came to.
"""

from dataclasses import dataclass
from typing import Literal

from qmpmerge.chain import Chain
from qmpmerge.space import Estimate

Ending = Literal["pivot", "keep", "ready"]
"""
How an active merge ends: the guest moves onto base; or it keeps the overlay, base having all data of this moment; or the
job stays ready, mirroring every write, until someone ends it.
"""


@dataclass(frozen=True)
class MergedFile:
    """An image that is no longer part of the chain: what was done with its file, and where it is now."""

    file: str
    action: str = "keep"
    now: str | None = None


@dataclass(frozen=True)
class Checked:
    """
    A check by its refusal's name, and what it came to. `forced` refused, and the user wanted to go on all the same;
    what is not checked could not be, for the `reason`.
    """

    name: str
    result: Literal["passed", "forced", "not checked"]
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """
    What a merge came to; only proved outcomes are made into one.

    `before` and `after` are chains as discovered. `copied` is bytes, None where QEMU does not count them (an intermediate
    merge counts what it walked). `verified` says that base and top were compared before the switch. `paused_ms` is how long
    the guest stood still for the pivot, None where it was not paused. `hints` are sentences for the user, `rungs` those
    about what was done to a guest that wrote as fast as was copied (`converge`). `checks` and `estimate` are what was
    found out before: of a plan that was only looked at.
    """

    verdict: str
    disk: str
    before: Chain
    after: Chain
    job: str | None = None
    merged: tuple[MergedFile, ...] = ()
    copied: int | None = None
    seconds: float = 0.0
    hints: tuple[str, ...] = ()
    verified: bool = False
    paused_ms: float | None = None
    checks: tuple[Checked, ...] = ()
    estimate: Estimate | None = None
    rungs: tuple[str, ...] = ()
