"""
What a merge came to.
"""

import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from qmpmerge.chain.chain import Chain
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.qemu.jobs import Job

ASSUMED_RATE = 200 * 1024 * 1024
"""Bytes a second that a disk of today copies; nobody has measured this one."""


class Estimate(Value):
    """
    Bytes that a merge copies and by how much the image `file` grows at most that they go into, metadata included; None for what
    is not known.

    `free` is what QEMU may still use on its filesystem, of which `reserve` is left for a guest that writes there; `seconds`
    what the copy takes at `rate`, bytes a second; `rate_given` says that it is the user's limit, not an assumption. With
    `at_least` a guest can add to `copy` and `growth` meanwhile. `reason` says why there are no figures. `limited` are the bytes
    that a limit is for, where those are more than what is copied: of a raw image QEMU reads the holes too, and so as slowly.
    `written` are whole clusters of data, which may be far more than `copy` where the image has larger clusters.
    """

    copy: int | None = None
    growth: int | None = None
    free: int | None = None
    rate: int = ASSUMED_RATE
    rate_given: bool = False
    at_least: bool = False
    reason: str | None = None
    file: str = ""
    reserve: int = 0
    limited: int | None = None
    written: int = 0

    @property
    def seconds(self) -> float | None:
        """How long the copy takes at `rate`."""
        if self.copy is None:
            return None
        count = (self.limited or self.copy) if self.rate_given else max(self.copy, self.written)
        return count / self.rate

    @property
    def is_enough(self) -> bool:
        """Whether there is room, as far as is known."""
        return self.growth is None or self.free is None or self.growth + self.reserve <= self.free


Policy = Literal["stash", "delete", "keep"]
"""What becomes of merged files: renamed to NAME.merged; removed, where it was compared; left alone."""

Ending = Literal["pivot", "keep", "hold"]
"""
How an operation ends. With ``pivot`` it is carried out: of an active merge the guest moves onto base. With ``keep``, of an
active merge only, the guest keeps the overlay, base having all data of this moment. With ``hold`` the job is left once all is
copied, and nothing switched, until someone ends it: an active merge is ready then, and mirrors every write, any other is
pending.
"""


Verdict = Literal["merged", "pivoted", "kept", "ready", "held", "pulled", "planned", "unchanged", "running"]
"""
What a merge, or a pull, came to. Of an intermediate merge: ``merged``. Of an active one how it has ended (see `Ending`). What
is held is ``ready`` where it is an active merge, and ``held`` otherwise.
``planned`` is a dry run, ``unchanged``: there was nothing to do; ``running`` goes on without us.
"""


class MergedFile(Value):
    """
    An image that is no longer part of the chain: what was done with its file, and where it is now. `obstacle` is why it was
    not deleted, where it was to be; of a pull that is only looked at, who needs it, or what else it is to be kept for.
    """

    file: str
    action: Literal["stash", "delete", "keep", "gone"] = "keep"
    now: str | None = None
    obstacle: str | None = None


CheckResult = Literal["passed", "forced", "not checked"]


class Checked(Value):
    """
    A check by its refusal's name, and what it came to. `forced` refused, and the user wanted to go on all the same;
    what is not checked could not be, or not wholly, for the `reason`. `scope` says how much was, where that matters.
    """

    name: str
    result: CheckResult
    reason: str | None = None
    scope: str | None = None


class OtherWay(Value):
    """As short a chain in the other direction: the command, the image that grows, bytes to copy (None where nobody looked)."""

    run: str
    file: str
    copy: int | None = None


class Outcome(Value):
    """
    What a merge came to; only proved outcomes are made into one, and what is known where the job goes on without us
    (``running``, see `StillRunning`).

    `before` and `after` are chains as discovered; of what is ``running`` nobody has looked, and `after` is the old chain.
    `job` is the one that is at work, as it was seen last, None where there is none any more. `copied` is bytes: of an active
    merge what the job has copied, of an intermediate one what the merged images held, of a pull what was shown of them; None
    where nobody has counted.
    `verified` says that base and top were compared before the switch. `paused_seconds` is how long the guest stood still for
    the pivot, None where it was not paused. `hints` are sentences for the user, `converge` those about what was done to a guest
    that wrote as fast as was copied. `checks` are what was found out before, none where an earlier qmpmerge has begun;
    `estimate` and `other_way` are those of a plan that was only looked at.
    """

    verdict: Verdict
    disk: str
    before: Chain
    after: Chain
    job: "Job | None" = None
    merged: tuple[MergedFile, ...] = ()
    copied: int | None = None
    seconds: float = 0.0
    hints: tuple[str, ...] = ()
    verified: bool = False
    paused_seconds: float | None = None
    checks: tuple[Checked, ...] = ()
    estimate: Estimate | None = None
    converge: tuple[str, ...] = ()
    other_way: OtherWay | None = None

    @property
    def pivots(self) -> bool:
        """Whether the VM is started from another image afterwards."""
        return not self.after.active.same_as(self.before.active)

    @property
    def direction(self) -> Literal["commit", "pull"]:
        """Which of the two it is the outcome of, where something was done."""
        return "pull" if self.verdict == "pulled" else "commit"


def launch_advice(base: str, old: MergedFile) -> str:
    """What a pivot means for the next start of the VM."""
    ask = f" (for scripts: `qmpmerge active {shlex.quote(base)}`)" if base.startswith("/") else ""
    stale = {
        "keep": f": {old.file} still opens, and shows older data",
        "gone": f": nothing is called {old.file}, and its file, wherever it is, still opens and shows older data",
    }
    return f"start the VM from {base} from now on{ask}{stale.get(old.action, '')}"


def pulled_advice(merged: Sequence[MergedFile]) -> list[str]:
    """What can be done with the files that a pull has left where they were, too: they may be anybody's."""
    left = [file.now for file in merged if file.action == "keep" and file.now and file.now.startswith("/")]
    command = shlex.join(["qmpmerge", "doctor", *left])
    who = f"`{command}` tells who is built on what was left, or uses it (overlays in folders elsewhere with `--search FOLDER`)"
    stashed = [file for file in merged if file.action != "keep"]
    return [*files_advice(stashed), *([f"{who}: what nobody needs can be deleted"] if left else [])]


def files_advice(merged: Sequence[MergedFile]) -> list[str]:
    """What can be done with the merged files."""
    folders = dict.fromkeys(os.path.dirname(file.now) for file in merged if file.action == "stash" and file.now)
    if folders:
        command = " ".join(["qmpmerge clean", *map(shlex.quote, folders)])
        return [f"`{command}` deletes what was renamed, once nobody needs it"]
    if any(file.action == "keep" for file in merged):
        return ["the merged files can be deleted once no other image is built on them"]
    return []
