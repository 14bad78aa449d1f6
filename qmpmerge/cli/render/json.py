"""
JSON for programs: exactly one object on stdout, what is said meanwhile as one object a line on stderr.

docs/json.md is the contract, which the tests hold every run against: what is added here is added there.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from qmpmerge.cli.render.humanize import cleaned_verdict
from qmpmerge.errors import StillRunning

if TYPE_CHECKING:
    from qmpmerge.chain.chain import Image
    from qmpmerge.chain.outcome import Checked, MergedFile, Outcome
    from qmpmerge.engine.pace.progress import Progress
    from qmpmerge.engine.resume import Recovery
    from qmpmerge.errors import Error
    from qmpmerge.images.headers import Oddity
    from qmpmerge.operations.active import Active
    from qmpmerge.operations.clean import Cleaned
    from qmpmerge.operations.examine import Examination
    from qmpmerge.operations.graph import Graph
    from qmpmerge.operations.plan import Way, Ways
    from qmpmerge.operations.snapshot import Overlay
    from qmpmerge.operations.tidy import Tidied, Tidying
    from qmpmerge.processes.vms import Vm
    from qmpmerge.qemu.blockgraph import Disk
    from qmpmerge.qemu.details import DiskDetails, ImageDetails
    from qmpmerge.qemu.jobs import Job
    from qmpmerge.recording.explained import Explained
    from qmpmerge.recording.replay import Replayed
    from qmpmerge.targets.target import ChainView


SCHEMA = 1


class JsonOutput:
    """Renders to two streams; `command` is the one that was typed, None for none; `quiet` leaves out progress and notes."""

    def __init__(self, out: TextIO, err: TextIO, *, command: str | None = None, quiet: bool = False) -> None:
        self._out = out
        self._err = err
        self._command = command
        self._quiet = quiet

    def vms(self, found: "Sequence[Vm]") -> None:
        """The running QEMUs."""
        self._print("done", vms=[_keys(vm, "name", "pid", "user", "monitors", "libvirt") for vm in found])

    def disks(self, found: "Sequence[Disk]", oddities: "Sequence[Oddity]" = ()) -> None:
        """The disks; an empty drive has no file."""
        self._print("done", disks=[_disk(disk) for disk in found], oddities=_oddities(oddities))

    def chain(self, view: "ChainView") -> None:
        """The images, base first."""
        images = [
            {
                "index": index,
                "node": image.node,
                "file": image.file,
                "slice": _slice(image),
                "data_file": image.data.file if image.data else None,
                "format": image.format,
                "virtual_size": image.virtual_size,
                "allocated": image.allocated,
                "backing": image.backing,
                "backing_format": image.backing_format,
                "active": image is view.chain.active,
                "details": _image_details(view.details[index - 1]) if view.details else None,
            }
            for index, image in enumerate(view.chain, 1)
        ]
        told = {"images": images, "oddities": _oddities(view.oddities)}
        self._print("done", disk=view.disk.name, job=_job(view.disk.job), **told)

    def graph(self, found: "Graph", *, drawn: str | None) -> None:
        """Nodes, and who uses them; the disks with the nodes of their images."""
        keys = ("driver", "file", "is_filter", "read_only", "used")
        nodes = [
            {"node": node.name, **_keys(node, *keys), "marks": [_keys(mark, "name", "message") for mark in node.marks]}
            for node in found.nodes
        ]
        self._print(
            "done",
            disk=found.disk,
            live=found.is_live,
            chains=[_drawn(disk) for disk in found.disks],
            nodes=nodes,
            edges=[_keys(edge, "kind", "parent", "node", "role", "takes", "lets") for edge in found.edges],
            jobs=[_job(job) for job in found.jobs],
            exports=[_keys(one, "id", "type", "node") for one in found.exports],
            not_known=list(found.not_known),
        )

    def snapshot(self, overlays: "Sequence[Overlay]") -> None:
        """The overlays that were made; without nodes those that would be."""
        made = [_keys(overlay, "disk", "node", "file", "backing_file", "backing") for overlay in overlays]
        verdict = "created" if all(overlay.node for overlay in overlays) else "planned"
        self._print(verdict, overlays=made, hints=[overlay.hint for overlay in overlays if overlay.hint])

    def active(self, found: "Active", *, drive: bool) -> None:
        """The image that a VM must be started from, both ways to name it."""
        self._print("done", **_keys(found, "file", "format", "drive"))

    def commit(self, outcome: "Outcome") -> None:
        """What a merge came to."""
        self._print(outcome.verdict, **_merge(outcome))

    def plan(self, found: "Ways") -> None:
        """Both ways, the merge first; none where there is nothing to merge."""
        self._print(
            found.verdict,
            disk=found.disk,
            before=found.before.files,
            ways=[_way(way) for way in found.ways],
            shared=[_keys(one, "file", "kind", "name") for one in found.shared],
            not_seen=list(found.not_seen),
            choice=found.choice,
            reason=found.reason,
        )

    def recovered(self, found: "Sequence[Recovery]") -> None:
        """One entry for each merge."""
        from qmpmerge.operations.recover import verdict_of  # imported already by who has found something

        keys = ("verdict", "file", "start_from", "message", "reasons", "hints")
        merges = [{**_keys(one, *keys), "merged": _merged(one.merged)} for one in found]
        verdict = verdict_of(found)
        error = next((one.error for one in found if one.error is not None and one.verdict == verdict), None)
        self._print(verdict, merges=merges, **_error(error))

    def cleaned(self, found: "Sequence[Cleaned]", *, dry_run: bool) -> None:
        """One entry for each stashed file."""
        stashed = [_keys(one, "file", "allocated", "action", "obstacle") for one in found]
        self._print(cleaned_verdict(found, dry_run=dry_run), stashed=stashed)

    def tidied(self, *done: "Tidied") -> None:
        """In the one object, with all others."""

    def tidy(self, done: "Tidying") -> None:
        """One entry for each disk; of a merge whose job goes on without us all that is known."""
        tidied = [
            {
                **_keys(one, "target", "disk", "verdict"),
                "outcome": _merge(outcome) if (outcome := _known(one)) is not None else None,
                "error": one.error.document if one.error is not None else None,
            }
            for one in done.tidied
        ]
        left_out = [_keys(one, "target", "disk", "reason", "hint") for one in done.left_out]
        self._print(done.verdict, tidied=tidied, left_out=left_out, **_error(done.error))

    def jobs(self, found: "Sequence[Job]") -> None:
        """The block jobs."""
        self._print("done", jobs=[_job(job) for job in found])

    def controlled(self, job_id: str, verb: str, job: "Job | None") -> None:
        """The job as it is now, null when it is gone."""
        self._print("done", job=_job(job))

    def doctor(self, report: "Examination") -> None:
        """How much was looked at, each target with why it was not, and the findings, the worst first."""
        keys = ("name", "severity", "where", "message", "why", "fix")
        findings = [{"target": target, **_keys(finding, *keys)} for target, finding in report.findings]
        targets = [
            {"target": one.target, "verdict": one.verdict, "error": one.error.document if one.error else None}
            for one in report.targets
        ]
        looked_at = _keys(report, "vms", "images")
        self._print(report.verdict, looked_at=looked_at, targets=targets, findings=findings, **_error(report.error))

    def explained(self, found: "Sequence[Explained]", *, unread: int) -> None:
        """One entry for each command."""
        keys = ("words", "wall", "version", "qemu", "verdict", "code", "reason", "seconds", "is_cut")
        self._print("done", runs=[{**_keys(one, *keys), **_time_line(one)} for one in found], unread=unread)

    def listening(self, path: str) -> None:
        """One object on stderr."""
        self._line("listening", socket=path)

    def replayed(self, found: "Replayed") -> None:
        """All of it."""
        keys = ("socket", "commands", "played", "unplayed", "unasked", "unknown", "missing")
        diverged = None if found.diverged is None else _keys(found.diverged, "sent", "expected")
        self._print(found.verdict, **_keys(found, *keys), diverged=diverged)

    def failure(self, error: "Error") -> None:
        """The error with its facts; with all that is known of a merge whose job goes on without us."""
        known: Mapping[str, object] = {}
        if isinstance(error, StillRunning):
            known = _NOTHING if error.outcome is None else _merge(error.outcome)
        self._print(error.verdict, **known, error=error.document)

    def mistake(self, verdict: str, *, name: str, message: str, hint: str, facts: Mapping[str, object]) -> None:
        """What is no `Error`, in the same shape: a usage error, a bug."""
        self._print(verdict, error={"name": name, "message": message, "hint": hint, "facts": facts})

    def progress(self, progress: "Progress") -> None:
        """One object a line on stderr; sentences are lines of their own."""
        if self._quiet:
            return
        self._line(
            "progress",
            job=_job(progress.job),
            **_keys(progress, "target", "disk", "counts", "rate", "seconds_left", "dirty_rate", "converging"),
            shortage=_keys(progress.shortage, "filesystem", "needed") if progress.shortage else None,
        )
        if progress.note:
            self.note(progress.note)
        if progress.hint:
            self._line("hint", message=progress.hint)

    def note(self, text: str) -> None:
        """One object a line on stderr."""
        if not self._quiet:
            self._line("note", message=text)

    def trace(self, entry: "Mapping[str, Any]") -> None:
        """One object a line on stderr."""
        self._line("trace", line=entry)

    def close(self) -> None:
        """Nothing is redrawn."""

    def _print(self, verdict: str, **told: object) -> None:
        document = {"schema": SCHEMA, "command": self._command, "verdict": verdict, **told}
        self._out.write(json.dumps(document) + "\n")

    def _line(self, event: str, **told: object) -> None:
        self._err.write(json.dumps({"event": event, **told}) + "\n")


def _keys(value: object, *names: str) -> dict[str, object]:
    """These of its fields."""
    return {name: getattr(value, name) for name in names}


def _error(error: "Error | None") -> dict[str, object]:
    """That of what has several outcomes, where there is one."""
    return {} if error is None else {"error": error.document}


def _known(done: "Tidied") -> "Outcome | None":
    return done.error.outcome if isinstance(done.error, StillRunning) else done.outcome


def _merge(outcome: "Outcome") -> dict[str, object]:
    """Of what is running nobody knows what it will have come to."""
    estimate, paused = outcome.estimate, outcome.paused_seconds
    return {
        **_NOTHING,
        **_keys(outcome, "disk", "copied", "verified", "converge", "hints"),
        "job": _job(outcome.job),
        "before": outcome.before.files,
        "after": outcome.after.files if outcome.verdict != "running" else None,
        "merged": _merged(outcome.merged),
        "seconds": round(outcome.seconds, 3),
        "paused_seconds": None if paused is None else round(paused, 6),
        "checks": _checks(outcome.checks),
        "estimate": _keys(estimate, *_ESTIMATE) if estimate is not None else None,
        "other_way": _keys(outcome.other_way, "run", "file", "copy") if outcome.other_way is not None else None,
    }


_NOTHING: Mapping[str, object] = {
    "disk": None,
    "job": None,
    "before": [],
    "after": None,
    "merged": [],
    "copied": None,
    "seconds": None,
    "paused_seconds": None,
    "verified": False,
    "checks": [],
    "estimate": None,
    "other_way": None,
    "converge": [],
    "hints": [],
}
"""The same of a job of which nothing else is known; in this order."""

_ESTIMATE = ("copy", "growth", "free", "seconds", "rate", "rate_given", "at_least", "reason", "file", "reserve")


def _checks(found: "Sequence[Checked]") -> list[dict[str, object]]:
    return [_keys(check, "name", "result", "reason", "scope") for check in found]


def _way(way: "Way") -> dict[str, object]:
    return {
        **_keys(way, "direction", "run", "pauses_guest", "start_from", "keeps_launch_path"),
        "after": way.after.files,
        "estimate": _keys(way.estimate, *_ESTIMATE),
        "checks": _checks(way.checks),
        "refusals": [error.document for error in way.refusals],
    }


def _merged(files: "Sequence[MergedFile]") -> list[dict[str, object]]:
    return [_keys(one, "file", "action", "now", "obstacle") for one in files]


def _slice(image: "Image") -> dict[str, int | None] | None:
    """The part of the file that the image is; null for the whole."""
    return {"offset": image.slice.offset, "size": image.slice.size} if image.slice else None


def _oddities(found: "Sequence[Oddity]") -> list[dict[str, object]]:
    return [_keys(odd, "name", "file", "message") for odd in found]


def _disk(disk: "Disk") -> dict[str, object]:
    active = disk.chain.active if disk.chain else None
    return {
        "disk": disk.name,
        "node": active.node if active else None,
        "qdev": disk.qdev,
        "file": active.file if active else None,
        "format": active.format if active else None,
        "depth": len(disk.chain) if disk.chain else 0,
        "virtual_size": active.virtual_size if active else None,
        "allocated": active.allocated if active else None,
        "read_only": active.read_only if active else None,
        "job": _job(disk.job),
        "details": _disk_details(disk.details) if disk.details else None,
    }


def _drawn(disk: "Disk") -> dict[str, object]:
    """A disk by its nodes, base first."""
    return {"disk": disk.name, **_keys(disk, "qdev", "root"), "layers": [image.node for image in disk.chain or ()]}


def _disk_details(found: "DiskDetails") -> dict[str, object]:
    keys = ("bus", "address", "iothread", "removable", "tray_open")
    device = found.device
    return {
        "device": device and device.kind,
        **(dict.fromkeys(keys) if device is None else _keys(device, *keys)),
        "physical": found.physical,
    }


def _image_details(found: "ImageDetails") -> dict[str, object]:
    keys = ("physical", "cluster_size", "compat", "compression", "encryption")
    flags = ("extended_l2", "lazy_refcounts", "dirty", "corrupt")
    of_bitmap = ("name", "granularity", "persistent", "recording", "inconsistent", "busy")
    return {
        **_keys(found, *keys, *flags),
        "snapshots": [{"id": number, "name": name} for number, name in found.snapshots],
        "bitmaps": [_keys(bitmap, *of_bitmap) for bitmap in found.bitmaps],
    }


def _time_line(found: "Explained") -> dict[str, object]:
    of_item = ("at", "kind", "text", "why", "twin", "count", "took", "reason")
    return {
        "items": [_keys(item, *of_item) for item in found.items],
        "felt": [_keys(one, "kind", "at", "seconds", "text") for one in found.felt],
        "spent": [_keys(one, "state", "seconds", "in_qemu", "commands") for one in found.spent],
    }


def _job(job: "Job | None") -> dict[str, object] | None:
    """The same wherever there is a job; null for none."""
    if job is None:
        return None
    keys = ("id", "type", "disk", "status", "ready", "done", "total", "speed", "io_status", "reason", "ours", "verbs")
    return _keys(job, *keys)
