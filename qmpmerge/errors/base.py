"""
What can go wrong, sorted by what the caller does next.

    Error
     +-- Untouched                      nothing was changed
     |    +-- Refused            3      a check said no; the hint says what to do instead
     |    +-- Unreachable        4      no session with QEMU could be made
     +-- Failed                  5      the job ran and failed: the old chain is in use and right
     +-- Unknown                 6      the outcome is not proven: ask QEMU again
     +-- StillRunning            7      we stopped waiting, the job goes on
     +-- Postponed               7      a disk was not begun in time, or what was begun was taken back: it is as it was
     +-- Cancelled             130      the job was cancelled, or never started: the old chain is in use

An error is a sentence plus its facts: the class holds the sentence and the hint, the constructor keeps the facts as
fields. People read ``str(error)`` and ``error.hint``, tests and JSON read ``error.name`` and ``error.facts``.

Every verdict and its exit code stand in `EXIT_CODES`, here and nowhere else.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, dataclass_transform

EXIT_CODES = {
    "merged": 0,
    "pivoted": 0,
    "pulled": 0,
    "kept": 0,
    "ready": 0,
    "held": 0,
    "planned": 0,
    "unchanged": 0,
    "created": 0,
    "done": 0,
    "refused": 3,
    "unreachable": 4,
    "failed": 5,
    "unknown": 6,
    "running": 7,
    "postponed": 7,
    "cancelled": 130,
}
"""Verdict to exit code. 1 is a bug of ours (a traceback), 2 is a usage error (click's)."""

EXIT_MEANINGS = {
    0: "the disks are as asked",
    1: "a bug of qmpmerge: a traceback on stderr; `qmpmerge doctor` shows what it has left",
    2: "the command line is wrong; the disks are untouched",
    3: "the disks are untouched; the hint says what to do instead",
    4: "the disks are untouched, since no session could be made",
    5: "the job ran and failed; the old chain is in use and right",
    6: "the outcome is not proven; run `qmpmerge doctor`",
    7: "we stopped waiting: the job goes on, and the command to follow it is printed, or the disk is as it was (`postponed`)",
    130: "Ctrl-C, or a no to the question whether to merge; the old chain is in use",
}
"""What each exit code says of the disks."""

WORST = (1, 6, 5, 4, 3, 130, 7, 0)
"""Exit codes of several outcomes of one command, the worst first. A usage error (2) is found before there is any outcome."""


def worst(codes: Iterable[int]) -> int:
    """The one exit code of several outcomes, which are in `WORST`; 0 where there is none."""
    return min(codes, key=WORST.index, default=0)


FORCEABLE = (
    "dependents",
    "doubtful",
    "in-use",
    "known-bad",
    "libvirt",
    "no-format",
    "no-space",
    "not-seen",
    "would-lose",
)
"""
What `--force` takes: the refusals about which a user can rightly know better than we do.

An image that is built on ours may be rubbish, a reader may be a backup that is wanted, what we may not look at may be known
to the user, a crash may be fixed in this very QEMU, space may be on its way (the job waits for it), what would be lost may be
worthless, and what differs may have been written. The others say that the merge would write wrong data, crash QEMU or fail:
nobody can know better.
"""


@dataclass_transform(eq_default=False, kw_only_default=True)
class Error(Exception):
    """
    Base of all our errors. What a subclass annotates are its facts, given by keyword, as in a dataclass: they are its
    attributes, `repr` shows them, and they come along where an error is copied, or pickled for another process. The hint is
    a note of the exception too, so that a traceback ends with it. Two errors are equal only where they are one.

    Not real dataclasses: to make fifty of those takes longer than all else that `qmpmerge disks` imports of ours.
    """

    verdict: ClassVar[str] = "unknown"
    sentence: ClassVar[str] = ""
    advice: ClassVar[str] = ""
    fact_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.fact_names = (*cls.fact_names, *cls.__dict__.get("__annotations__", ()))  # noqa: RUF063 - inspect takes 10 ms

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        unknown = facts.keys() - set(self.fact_names)
        missing = [name for name in self.fact_names if name not in facts and not hasattr(type(self), name)]
        if unknown or missing:
            raise TypeError(f"{type(self).__name__}: missing {missing}, unexpected {sorted(unknown)}")
        vars(self).update(facts)
        if self.hint:
            self.add_note(f"hint: {self.hint}")

    def __reduce__(self) -> "tuple[object, ...]":
        return _made_again, (type(self),), vars(self)  # an exception would be made of what was given by position

    def __repr__(self) -> str:
        facts = (f"{name}={getattr(self, name)!r}" for name in self.fact_names)
        return f"{type(self).__name__}({', '.join(facts)})"

    @property
    def name(self) -> str:
        """The class name as users write it: ``ShorterLayer`` is ``shorter-layer``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower()

    @property
    def exit_code(self) -> int:
        """The exit code of the verdict, from `EXIT_CODES`."""
        return EXIT_CODES[self.verdict]

    @property
    def parts(self) -> "Sequence[Error]":
        """The errors that this one stands for, itself where it stands for nothing else."""
        return (self,)

    @property
    def document(self) -> dict[str, object]:
        """Name, message, hint and facts, as JSON shows them: None for what there is nothing of."""
        facts = {name: None if value == "" else value for name, value in self.facts.items()}
        return {"name": self.name, "message": str(self), "hint": self.hint or None, "facts": facts}

    @property
    def facts(self) -> dict[str, object]:
        """The facts by name, for JSON and for tests."""
        return {name: getattr(self, name) for name in self.fact_names}

    @property
    def hint(self) -> str:
        """What to do next, one sentence; empty where there is nothing to say. Facts in its commands are quoted for a shell."""
        words = self._words()
        quoted = {name: value if name in _TYPED else shlex.quote(str(value)) for name, value in words.items()}
        parts = self.advice.split("`")  # every other one is a command
        return "`".join(part.format_map(quoted if number % 2 else words) for number, part in enumerate(parts))

    def __str__(self) -> str:
        return self.sentence.format_map(self._words())

    def _words(self) -> dict[str, object]:
        return {name: _in_words(value) for name, value in self.facts.items()}


def _made_again(kind: type[Error]) -> Error:
    return kind.__new__(kind)


_TYPED = frozenset({"option", "command", "cure", "pull", "below"})
"""Facts that are words of ours for a shell already."""


def _in_words(value: object) -> object:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    return value


class Untouched(Error):
    """Nothing was changed: all of this is found out before anything is sent."""


class Refused(Untouched):
    """A check said no."""

    verdict = "refused"


class Unreachable(Untouched):
    """No session with a QEMU could be made, so nothing was sent."""

    verdict = "unreachable"


class Unknown(Error):
    """
    The outcome is not proven.

    After a lost connection or a missing reply nobody can say whether a command took effect: it may even run later.
    The only cure is to ask QEMU again, and never to send the command again blindly.
    """

    verdict = "unknown"
    advice = (
        "run `qmpmerge doctor {target}`: QEMU may have finished the job, and this shows what it did and what is left; where "
        "that QEMU is gone, `qmpmerge recover` on the folder of its images, before the VM is started again"
    )


class Failed(Error):
    """The job ran and failed. The old chain is in use and right; running the command again is safe."""

    verdict = "failed"


class SeveralRefusals(Refused):
    """More than one check said no: all are told at once, so that they can be dealt with at once."""

    refusals: list[Refused]
    sentence = "{count} checks say no: {sentences}"
    advice = "{hints}"

    @property
    def parts(self) -> "Sequence[Error]":
        """The refusals, in the order of the checks."""
        return self.refusals

    @property
    def facts(self) -> dict[str, object]:
        """Each refusal with its name, message, hint and facts."""
        return {"refusals": [refusal.document for refusal in self.refusals]}

    def _words(self) -> dict[str, object]:
        sentences = "; ".join(f"{refusal.name}: {refusal}" for refusal in self.refusals)
        hints = "; ".join(f"{refusal.name}: {refusal.hint}" for refusal in self.refusals)
        return {"count": len(self.refusals), "sentences": sentences, "hints": hints}


def refuse(refusals: Sequence[Refused]) -> None:
    """Raise what was found: nothing, the one refusal as it is, or SeveralRefusals."""
    if len(refusals) > 1:
        raise SeveralRefusals(refusals=list(refusals))
    for refusal in refusals:
        raise refusal
