"""JSON for programs: exactly one object on stdout, progress as one object a line on stderr. Fields are only ever added."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from qmpmerge.blockgraph import Disk
    from qmpmerge.errors import Error
    from qmpmerge.findings import Finding
    from qmpmerge.hosts import ChainView
    from qmpmerge.jobs import Job, Progress
    from qmpmerge.outcome import Outcome
    from qmpmerge.processes import Vm
    from qmpmerge.snapshots import Overlay

SCHEMA = 1


class JsonOutput:
    """Renders to two streams; `quiet` leaves out progress and notes."""

    def __init__(self, out: TextIO, err: TextIO, *, quiet: bool = False) -> None:
        self._out = out
        self._err = err
        self._quiet = quiet

    def vms(self, found: "Sequence[Vm]") -> None:
        """The running QEMUs."""
        keys = ("name", "pid", "user", "monitors", "libvirt")
        self._print({"vms": [{key: getattr(vm, key) for key in keys} for vm in found]})

    def disks(self, found: "Sequence[Disk]") -> None:
        """The disks; an empty drive has no file."""
        self._print({"disks": [_disk(disk) for disk in found]})

    def chain(self, view: "ChainView") -> None:
        """The images, base first."""
        images = [
            {
                "index": index,
                "node": image.node,
                "file": image.file,
                "format": image.format,
                "virtual_size": image.virtual_size,
                "allocated": image.allocated,
                "backing": image.backing,
                "backing_format": image.backing_format,
                "active": image is view.chain.active,
            }
            for index, image in enumerate(view.chain, 1)
        ]
        oddities = [{"name": odd.name, "file": odd.file, "message": odd.message} for odd in view.oddities]
        self._print({"disk": view.disk.name, "images": images, "oddities": oddities})

    def snapshot(self, overlays: "Sequence[Overlay]") -> None:
        """The overlays that were made."""
        made = [{"disk": overlay.disk, "file": overlay.file, "node": overlay.node} for overlay in overlays]
        self._print({"verdict": "created", "overlays": made})

    def commit(self, outcome: "Outcome") -> None:
        """What a merge came to; `copied` is null where QEMU does not count it."""
        self._print(
            {
                "verdict": outcome.verdict,
                "disk": outcome.disk,
                "job": outcome.job,
                "before": outcome.before.files,
                "after": outcome.after.files,
                "merged": [
                    {"file": merged.file, "action": merged.action, "now": merged.now} for merged in outcome.merged
                ],
                "copied": outcome.copied,
                "seconds": round(outcome.seconds, 3),
                "verified": outcome.verified,
                "hints": list(outcome.hints),
                "converge": list(outcome.rungs),
            }
        )

    def jobs(self, found: "Sequence[Job]") -> None:
        """The block jobs."""
        self._print({"jobs": [_job(job) for job in found]})

    def steered(self, job_id: str, job: "Job | None") -> None:
        """The job as it is now, null when it is gone."""
        self._print({"verdict": "done", "id": job_id, "job": _job(job) if job else None})

    def doctor(self, target: str, findings: "Sequence[Finding]") -> None:
        """The findings, the worst first; an empty list is a clean bill of health."""
        keys = ("name", "severity", "where", "what", "why", "command")
        told = [{key: getattr(finding, key) for key in keys} for finding in findings]
        self._print({"verdict": "done", "target": target, "findings": told})

    def failure(self, error: "Error") -> None:
        """The error with its facts."""
        told = {"name": error.name, "message": str(error), "hint": error.hint, "facts": error.facts}
        self._print({"verdict": error.verdict, "error": told})

    def progress(self, told: "Progress") -> None:
        """One object a line on stderr."""
        keys = ("disk", "job", "status", "done", "total", "counts", "rate", "eta", "dirty_rate", "converging", "hint")
        if not self._quiet:
            self._line({"event": "progress", **{key: getattr(told, key) for key in keys}})

    def note(self, text: str) -> None:
        """One object a line on stderr."""
        if not self._quiet:
            self._line({"event": "note", "text": text})

    def trace(self, direction: str, text: str) -> None:
        """One object a line on stderr."""
        self._line({"event": "trace", "direction": direction, "text": text})

    def close(self) -> None:
        """Nothing is redrawn."""

    def _print(self, document: Mapping[str, object]) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._out.write(json.dumps({"schema": SCHEMA, **document}) + "\n")

    def _line(self, document: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):  # nobody may be there to read it any more
            self._err.write(json.dumps(document) + "\n")


def _disk(disk: "Disk") -> dict[str, object]:
    active = disk.chain.active if disk.chain else None
    return {
        "disk": disk.name,
        "node": active.node if active else None,
        "qdev": disk.qdev or None,
        "file": active.file if active else None,
        "format": active.format if active else None,
        "depth": len(disk.chain) if disk.chain else 0,
        "virtual_size": active.virtual_size if active else None,
        "actual_size": active.allocated if active else None,
        "read_only": active.read_only if active else None,
        "job": disk.job.id if disk.job else None,
    }


def _job(job: "Job") -> dict[str, object]:
    keys = ("id", "type", "disk", "status", "ready", "done", "total", "speed", "io_status", "error", "ours", "verbs")
    return {key: getattr(job, key) for key in keys}
