"""
What the doctor has to say: one value for each problem, worst first.
"""

from collections.abc import Iterable
from typing import Literal

from qmpmerge.value import Value

Severity = Literal["harm", "care", "note"]
"""
How bad it is. ``harm``: data or the guest suffers, now or at the next start. ``care``: somebody has to decide or tidy up
before it does. ``note``: nobody has to do anything now.
"""

EXIT_CODES: dict[Severity | None, int] = {"harm": 11, "care": 10, "note": 0, None: 0}
"""What `doctor --exit-code` makes of the worst finding, None being that there is none."""

SEVERITIES: tuple[Severity, ...] = ("harm", "care", "note")


class Finding(Value):
    """
    A problem: `where` is a disk, a job, a node or a file, `message` a sentence about it, `why` it matters.

    `fix` is one line for a shell that mends it, None where there is nothing to run; then `why` says what else to do.
    """

    name: str
    severity: Severity
    where: str
    message: str
    why: str
    fix: str | None = None


class Looked(Value):
    """What was found, and the images that were looked at: the file of each, by its inode or else by its name."""

    findings: tuple[Finding, ...]
    images: frozenset[object]


def sort(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, else in the order in which they were found; nothing is said twice."""
    return tuple(sorted(dict.fromkeys(found), key=lambda finding: SEVERITIES.index(finding.severity)))
