"""Numbers and names in words, as people read them on a terminal."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qmpmerge.cli.render.page import Colour, Painted
from qmpmerge.cli.render.visible import visible
from qmpmerge.errors.sizes import size as size

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Estimate, OtherWay, Outcome
    from qmpmerge.engine.pace.progress import Progress
    from qmpmerge.operations.clean import Cleaned
    from qmpmerge.operations.examine import Examination
    from qmpmerge.qemu.jobs import Job


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def progress(value: "Progress") -> str:
    """``vda: 30 %, copied 3 GiB of 10 GiB, 250 MiB/s, 28 s left``; what was scanned is not called copied."""
    percent = "" if value.percent is None else f"{value.percent:.0f} %, "
    parts = [f"{percent}{value.counts} {size(value.done)} of {size(value.total)}"]
    if value.rate is not None:
        parts.append(f"{size(value.rate)}/s")
    if value.dirty_rate and value.converging is not None:
        parts.append(f"the guest writes {size(value.dirty_rate)}/s")
    if value.converging is False:
        parts.append("never ready like this")
    if value.seconds_left is not None and value.done < value.total:
        parts.append(f"{duration(value.seconds_left)} left")
    if value.shortage is not None:
        missing = f"{size(value.shortage.needed)} more needed"
        parts.append(f"{value.status}: no space on {visible(value.shortage.filesystem)}, {missing}")
    elif value.status not in ("running", "created"):
        parts.append(value.status)
    return f"{visible(value.disk)}: {', '.join(parts)}"


def together(at_work: "Sequence[Progress]") -> tuple[float | None, str]:
    """How far all of them are, in percent and in words: ``2 disks: vm1 vda 30 %, vm2 vda 5 %``, or `progress` of one."""
    if len(at_work) == 1:
        return at_work[0].percent, progress(at_work[0])
    percents = [value.percent or 0.0 for value in at_work]
    names = (f"{visible(value.disk)} {percent:.0f} %" for value, percent in zip(at_work, percents, strict=True))
    return sum(percents) / len(percents), f"{len(percents)} disks: {', '.join(names)}"


def name(target: str, disk: str | None) -> str:
    """What a disk is called among those of several targets; an image is its own disk."""
    return target if disk is None or os.path.basename(target) == disk else f"{target} {disk}"


def result(outcome: "Outcome") -> str:
    """What follows the verdict: `` in 0.42 s, 9 MiB copied: base.raw <-- c.qcow2``."""
    before = f"{outcome.before}, then " if outcome.verdict == "planned" else ""
    return f"{'' if before else cost(outcome)}: {before}{outcome.after}"


def cleaned_verdict(found: "Sequence[Cleaned]", *, dry_run: bool) -> str:
    """What `clean` came to."""
    if not any(one.obstacle is None for one in found):
        return "unchanged"
    return "planned" if dry_run else "done"


def estimate(value: "Estimate") -> Iterator[str]:
    """
    ``copies  at least 3 GiB, 15 s at 200 MiB/s (assumed)``, and
    ``space   base.raw grows by up to 2 GiB; 70 GiB free``.
    """
    if value.copy is None or value.seconds is None:
        yield f"copies  not known: {value.reason}"
        return
    rate = f"{size(value.rate)}/s ({'as given' if value.rate_given else 'assumed'})"
    takes = duration(value.seconds) if value.seconds >= 1 else "less than 1 s"
    yield f"copies  {'at least ' if value.at_least else ''}{size(value.copy)}, {takes} at {rate}"
    if value.growth is not None:
        free = "" if value.free is None else f"; {size(value.free)} free"
        yield f"space   {os.path.basename(value.file) or 'the base'} {_grows(value)}{free}"


def _grows(value: "Estimate") -> str:
    most = [f"up to {size(value.growth)}"] if value.growth else []
    if value.at_least:
        most.append("what the guest writes meanwhile")
    return f"grows by {' and '.join(most)}" if most else "does not grow"


def other_way(value: "OtherWay", this: "Estimate | None") -> str:
    """``qmpmerge pull vm1 vda (copies 3 GiB instead of 10 GiB, into c.qcow2)``."""
    if value.copy is None:
        return value.run
    known = this.copy if this is not None else None
    instead = " as well" if known == value.copy else f" instead of {size(known)}" if known is not None else ""
    return f"{value.run} (copies {size(value.copy)}{instead}, into {os.path.basename(value.file)})"


def looked_at(report: "Examination") -> str:
    """``looked at 3 VMs, 41 images, not at vm9: 1 harm, 2 care``; that nothing was found is said only of what was looked at."""
    counts = [
        f"{count} {word}{'' if count == 1 else 's'}" for count, word in ((report.vms, "VM"), (report.images, "image"))
    ]
    missed = [one.target for one in report.targets if one.error is not None]
    told = f"looked at {', '.join(counts)}" + (f", not at {', '.join(missed)}" if missed else "")
    found = Counter(finding.severity for _target, finding in report.findings)
    notes = "note" if found["note"] == 1 else "notes"
    words = [f"{count} {notes if severity == 'note' else severity}" for severity, count in found.items()]
    if not words and not (report.vms or report.images):
        return told
    return f"{told}: {', '.join(words) or 'no problems found'}"


def limit(speed: int) -> str:
    """The speed limit of a job, in bytes a second; 0 is none."""
    return f"{size(speed)}/s" if speed else "unlimited"


def status(found: "Job") -> Painted:
    """What a job is at, with what it waits for, or has failed at."""
    trouble = {"ok": "", "nospace": " (no space)", "failed": " (I/O error)"}.get(
        found.io_status, f" ({found.io_status})"
    )
    return Painted(f"{found.status}{trouble}", _colour(found, is_well=not trouble))


def _colour(found: "Job", *, is_well: bool) -> Colour | None:
    if found.reason:
        return "red"
    if not is_well or found.status in ("paused", "standby"):
        return "yellow"
    return "green" if found.status == "ready" else None


def cost(outcome: "Outcome") -> str:
    """What a merge took: time, bytes copied, how long the guest was paused; and what it has left."""
    if outcome.verdict == "planned":
        return ", nothing was changed"
    copied = f", {size(outcome.copied)} copied" if outcome.copied is not None else ""
    left = sum(one.obstacle is not None for one in outcome.merged)
    undeleted = f", {left} of {len(outcome.merged)} merged files not deleted" if left else ""
    paused = f", guest paused for {1000 * paused:.0f} ms" if (paused := outcome.paused_seconds) is not None else ""
    return (f" in {outcome.seconds:.2f} s{copied}{paused}" if outcome.seconds else "") + undeleted
