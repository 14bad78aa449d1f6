"""JSON for programs: exactly one object on stdout, progress as one object a line on stderr. Fields are only ever added."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from qmpmerge.cli.render.humanize import cleaned_verdict

if TYPE_CHECKING:
    from qmpmerge.chain.chain import Image
    from qmpmerge.chain.outcome import Estimate, MergedFile, Outcome
    from qmpmerge.doctor.findings import Finding
    from qmpmerge.engine.pace.progress import Progress
    from qmpmerge.engine.resume import Recovery
    from qmpmerge.errors import Error
    from qmpmerge.images.headers import Oddity
    from qmpmerge.operations.active import Active
    from qmpmerge.operations.clean import Cleaned
    from qmpmerge.operations.snapshot import Overlay
    from qmpmerge.processes.vms import Vm
    from qmpmerge.qemu.blockgraph import Disk
    from qmpmerge.qemu.details import DiskDetails, ImageDetails
    from qmpmerge.qemu.jobs import Job
    from qmpmerge.targets.target import ChainView


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
        self._print({"verdict": "done", "vms": [{key: getattr(vm, key) for key in keys} for vm in found]})

    def disks(self, found: "Sequence[Disk]", oddities: "Sequence[Oddity]" = ()) -> None:
        """The disks; an empty drive has no file."""
        self._print({"verdict": "done", "disks": [_disk(disk) for disk in found], "oddities": _oddities(oddities)})

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
        job = _job(view.disk.job) if view.disk.job else None
        told = {"disk": view.disk.name, "images": images, "oddities": _oddities(view.oddities), "job": job}
        self._print({"verdict": "done", **told})

    def snapshot(self, overlays: "Sequence[Overlay]") -> None:
        """The overlays that were made."""
        keys = ("disk", "file", "node", "instead_of")
        made = [{**{key: getattr(overlay, key) for key in keys}, "start_from": overlay.file} for overlay in overlays]
        hints = [overlay.hint for overlay in overlays if overlay.hint]
        self._print({"verdict": "created", "overlays": made, "hints": hints})

    def active(self, path: str, found: "Active", *, drive: bool) -> None:
        """The image that a VM must be started from, and the `path` that was given."""
        told = {"active": found.file, "format": found.format, "drive": found.drive}
        self._print({"verdict": "done", "path": path, **told})

    def commit(self, outcome: "Outcome") -> None:
        """What a merge came to; `copied` is null where QEMU does not count it."""
        self._print(
            {
                "verdict": outcome.verdict,
                "disk": outcome.disk,
                "job": outcome.job,
                "before": outcome.before.files,
                "after": outcome.after.files,
                "merged": _merged(outcome.merged),
                "copied": outcome.copied,
                "seconds": round(outcome.seconds, 3),
                "verified": outcome.verified,
                "paused_ms": None if outcome.paused_ms is None else round(outcome.paused_ms, 1),
                "hints": list(outcome.hints),
                "checks": [
                    {key: getattr(check, key) for key in ("name", "result", "reason", "looked_at")}
                    for check in outcome.checks
                ],
                "estimate": _estimate(outcome.estimate) if outcome.estimate is not None else None,
                "converge": list(outcome.rungs),
            }
        )

    def recovered(self, found: "Sequence[Recovery]") -> None:
        """One entry for each merge."""
        from qmpmerge.operations.recover import verdict_of  # imported already by who has found something

        keys = ("verdict", "image", "right", "action", "reasons", "hints")
        merges = [{**{key: getattr(one, key) for key in keys}, "merged": _merged(one.merged)} for one in found]
        self._print({"verdict": verdict_of(found), "merges": merges})

    def cleaned(self, found: "Sequence[Cleaned]", *, dry_run: bool) -> None:
        """One entry for each stashed file; `kept` is null where it was removed."""
        stashed = [{"file": one.file, "size": one.size, "kept": one.kept} for one in found]
        self._print({"verdict": cleaned_verdict(found, dry_run=dry_run), "stashed": stashed})

    def jobs(self, found: "Sequence[Job]") -> None:
        """The block jobs."""
        self._print({"verdict": "done", "jobs": [_job(job) for job in found]})

    def controlled(self, job_id: str, job: "Job | None") -> None:
        """The job as it is now, null when it is gone."""
        self._print({"verdict": "done", "id": job_id, "job": _job(job) if job else None})

    def doctor(self, target: str, findings: "Sequence[Finding]") -> None:
        """The findings, the worst first; an empty list is a clean bill of health."""
        keys = ("name", "severity", "where", "what", "why", "command")
        entries = [{key: getattr(finding, key) for key in keys} for finding in findings]
        self._print({"verdict": "done", "target": target, "findings": entries})

    def failure(self, error: "Error") -> None:
        """The error with its facts."""
        self._print({"verdict": error.verdict, "error": error.document})

    def progress(self, progress: "Progress") -> None:
        """One object a line on stderr."""
        keys = ("disk", "job", "status", "done", "total", "counts", "rate", "eta", "dirty_rate", "converging", "hint")
        lack = (
            {"filesystem": progress.shortage.filesystem, "needed": progress.shortage.needed}
            if progress.shortage
            else None
        )
        if not self._quiet:
            more = {"shortage": lack, "note": progress.note}
            self._line({"event": "progress", **{key: getattr(progress, key) for key in keys}, **more})

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
        self._out.write(json.dumps({"schema": SCHEMA, **document}) + "\n")

    def _line(self, document: Mapping[str, object]) -> None:
        self._err.write(json.dumps(document) + "\n")


def _merged(files: "Sequence[MergedFile]") -> list[dict[str, object]]:
    return [{key: getattr(one, key) for key in ("file", "action", "now", "obstacle")} for one in files]


def _estimate(estimate: "Estimate") -> dict[str, object]:
    keys = ("copy", "growth", "free", "seconds", "rate", "rate_given", "at_least", "reason")
    return {key: getattr(estimate, key) for key in keys}


def _slice(image: "Image") -> dict[str, int | None] | None:
    """The part of the file that the image is; null for the whole."""
    return {"offset": image.slice.offset, "size": image.slice.size} if image.slice else None


def _oddities(found: "Sequence[Oddity]") -> list[dict[str, object]]:
    return [{"name": odd.name, "file": odd.file, "message": odd.message} for odd in found]


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
        "details": _disk_details(disk.details) if disk.details else None,
    }


def _disk_details(found: "DiskDetails") -> dict[str, object]:
    keys = ("bus", "address", "iothread", "removable", "tray_open")
    device = found.device
    return {
        "device": device and device.kind,
        **{key: getattr(device, key, None) for key in keys},
        "physical": found.physical,
    }


def _image_details(found: "ImageDetails") -> dict[str, object]:
    keys = ("physical", "cluster_size", "compat", "compression", "encryption")
    flags = ("extended_l2", "lazy_refcounts", "dirty", "corrupt")
    of_bitmap = ("name", "granularity", "persistent", "recording", "inconsistent", "busy")
    return {
        **{key: getattr(found, key) for key in (*keys, *flags)},
        "snapshots": [{"id": number, "name": name} for number, name in found.snapshots],
        "bitmaps": [{key: getattr(bitmap, key) for key in of_bitmap} for bitmap in found.bitmaps],
    }


def _job(job: "Job") -> dict[str, object]:
    keys = ("id", "type", "disk", "status", "ready", "done", "total", "speed", "io_status", "error", "ours", "verbs")
    return {key: getattr(job, key) for key in keys}
