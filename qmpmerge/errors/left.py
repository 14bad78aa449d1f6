"""Errors of who did not wait for a merge: its job goes on, was cancelled, or was not begun."""

from typing import TYPE_CHECKING, Any

from qmpmerge.errors.base import Error

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Outcome


class StillRunning(Error, TimeoutError):
    """
    We stopped waiting; the job belongs to QEMU and goes on. `outcome` is what is known of the merge by then, None where that
    is nothing.
    """

    target: str
    job: str
    option: str = ""
    verdict = "running"
    sentence = "job {job} goes on in QEMU"
    advice = "`qmpmerge job {target} {job} follow{option}` waits for it and finishes the merge, `cancel` ends it"

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        self.outcome: Outcome | None = None


class LeftCancelling(StillRunning):
    """We were told to leave at once while the job was being cancelled."""

    sentence = (
        "left while job {job} was being cancelled; whether QEMU does so, or never reads it and goes on, is not known"
    )
    advice = "where `qmpmerge jobs {target}` still shows it, `qmpmerge job {target} {job} follow{option}` stays with it"


class LeftDisplaced(StillRunning):
    """
    The name of the base was taken away or given to another file while the job ran. However the job ends, QEMU opens base by
    its name again: it takes the other file, or aborts where there is none. So the job is left. Facts as of `Replaced`.
    """

    file: str
    found: str
    cure: str
    sentence = (
        "job {job} is left waiting, the old chain in use: QEMU opens {file} by its name when it ends, and {found}"
    )
    advice = (
        "{cure}; while QEMU runs `qmpmerge job {target} {job} follow{option}` goes on with it, and `cancel` ends it"
    )


class Cancelled(Error):
    """The user cancelled; where a job ran its end was seen: the old chain is in use."""

    verdict = "cancelled"
    sentence = "the disks show what they did"
    advice = "run the same command again when you like"


class TimeUp(Cancelled, TimeoutError):
    """The time limit passed before anything was started."""

    seconds: float
    sentence = "not begun within {seconds:g} s; nothing was changed"
    advice = "give it more time (`--timeout`)"


class RecordLeft(Cancelled, TimeoutError):
    """We stopped waiting for storage, with no job under way: it has not made the record durable, which is there still."""

    image: str
    sentence = "the disks show what they did, but the storage does not answer: the record beside {image} was left"
    advice = "see to the storage; then `qmpmerge recover {image}` removes the record, as the same command again does"


class Postponed(Error, TimeoutError):
    """Of several disks one whose turn did not come before the time limit (`tidy`): it is as it was."""

    seconds: float
    verdict = "postponed"
    sentence = "not begun within {seconds:g} s; the disk is as it was"
    advice = "the same command again goes on with it"


class TimedOut(Postponed):
    """Offline nothing goes on without us: what was begun was cancelled at the time limit, and the old chain is right."""

    job: str
    sentence = "job {job} did not end within {seconds:g} s and was cancelled; the disk is as it was"
    advice = "give it more time (`--timeout`): images that no VM uses are begun from the start each time"
