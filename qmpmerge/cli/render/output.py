"""
What a command says: results to stdout, everything else to stderr.

Work code reports values, someone else draws. `Output` is what the commands call; `TextOutput` and `JsonOutput` are the two
renderers. Nothing outside these modules prints.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Outcome
    from qmpmerge.engine.pace.progress import Progress
    from qmpmerge.engine.resume import Recovery
    from qmpmerge.errors import Error
    from qmpmerge.images.headers import Oddity
    from qmpmerge.operations.active import Active
    from qmpmerge.operations.clean import Cleaned
    from qmpmerge.operations.examine import Examination
    from qmpmerge.operations.graph import Graph
    from qmpmerge.operations.plan import Ways
    from qmpmerge.operations.snapshot import Overlay
    from qmpmerge.operations.tidy import Tidied, Tidying
    from qmpmerge.processes.vms import Vm
    from qmpmerge.qemu.blockgraph import Disk
    from qmpmerge.qemu.jobs import Job
    from qmpmerge.recording.explained import Explained
    from qmpmerge.recording.replay import Replayed
    from qmpmerge.targets.target import ChainView


class Output(Protocol):
    """One method for each thing that a command can have to say."""

    def vms(self, found: "Sequence[Vm]") -> None:
        """The running QEMUs of this host."""

    def disks(self, found: "Sequence[Disk]", oddities: "Sequence[Oddity]" = ()) -> None:
        """The disks of a target, and what about them deserves a look."""

    def chain(self, view: "ChainView") -> None:
        """The chain of a disk, and problems with it."""

    def graph(self, found: "Graph", *, drawn: str | None) -> None:
        """The block graph; `drawn` is the language of a drawing, ``dot`` or ``mermaid``."""

    def snapshot(self, overlays: "Sequence[Overlay]") -> None:
        """The overlays that were made."""

    def active(self, found: "Active", *, drive: bool) -> None:
        """The image that a VM must be started from; with `drive` as QEMU's option takes it."""

    def commit(self, outcome: "Outcome") -> None:
        """What a merge came to."""

    def plan(self, found: "Ways") -> None:
        """Both ways to a shorter chain."""

    def recovered(self, found: "Sequence[Recovery]") -> None:
        """What became of merges that were not finished."""

    def cleaned(self, found: "Sequence[Cleaned]", *, dry_run: bool) -> None:
        """Which stashed files were removed, and why the others were not."""

    def tidied(self, *done: "Tidied") -> None:
        """Disks of several, each as soon as it is done."""

    def tidy(self, done: "Tidying") -> None:
        """All of them."""

    def jobs(self, found: "Sequence[Job]") -> None:
        """The block jobs of a target."""

    def controlled(self, job_id: str, verb: str, job: "Job | None") -> None:
        """A job after a verb was sent to it; None when it is gone."""

    def doctor(self, report: "Examination") -> None:
        """Problems with several targets, the worst first, and how much was looked at."""

    def explained(self, found: "Sequence[Explained]", *, unread: int) -> None:
        """The commands of a recording, in which so many lines could not be read."""

    def listening(self, path: str) -> None:
        """Where a recording is replayed from now on."""

    def replayed(self, found: "Replayed") -> None:
        """What of a recording was played."""

    def failure(self, error: "Error") -> None:
        """Why a command did not do what was asked."""

    def progress(self, progress: "Progress") -> None:
        """How far a merge is."""

    def note(self, text: str) -> None:
        """Something the user should know meanwhile."""

    def trace(self, entry: "Mapping[str, Any]") -> None:
        """A line of a recording: of the QMP conversation, or a step of ours."""

    def close(self) -> None:
        """End what is being redrawn."""
