"""Numbers and names in words, as people read them on a terminal."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpmerge.cli.render.visible import visible
from qmpmerge.engine.pace.progress import Progress

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Checked, Estimate, MergedFile, Outcome
    from qmpmerge.operations.clean import Cleaned
    from qmpmerge.operations.examine import Examination
    from qmpmerge.qemu.blockgraph import Disk


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(count: float | None) -> str:
    """``1.5 GiB``; a dash for what is not known."""
    if count is None:
        return "-"
    power = 0
    while round(count / 1024**power, 1) >= 1024 and power < len(_UNITS) - 1:
        power += 1
    value = round(count / 1024**power, 1)
    digits = 0 if value >= 100 or value == int(value) else 1
    return f"{value:.{digits}f} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def progress(value: Progress) -> str:
    """``vda: 30 %, copied 3 GiB of 10 GiB, 250 MiB/s, 28 s left``; what was scanned is not called copied."""
    percent = "" if value.percent is None else f"{value.percent:.0f} %, "
    parts = [f"{percent}{value.counts} {size(value.done)} of {size(value.total)}"]
    if value.rate is not None:
        parts.append(f"{size(value.rate)}/s")
    if value.dirty_rate and value.converging is not None:
        parts.append(f"the guest writes {size(value.dirty_rate)}/s")
    if value.converging is False:
        parts.append("never ready like this")
    if value.eta is not None and value.done < value.total:
        parts.append(f"{duration(value.eta)} left")
    if value.shortage is not None:
        missing = f"{size(value.shortage.needed)} more needed"
        parts.append(f"{value.status}: no space on {visible(value.shortage.filesystem)}, {missing}")
    elif value.status not in ("running", "created"):
        parts.append(value.status)
    return f"{visible(value.disk)}: {', '.join(parts)}"


def cleaned_verdict(found: "Sequence[Cleaned]", *, dry_run: bool) -> str:
    """What `clean` came to."""
    if not any(one.kept is None for one in found):
        return "unchanged"
    return "planned" if dry_run else "done"


def checked(value: "Checked") -> str:
    """The check's name, why it could not be made, and what was looked at."""
    more = [*([value.reason] if value.reason else []), *([f"looked at {value.looked_at}"] if value.looked_at else [])]
    return f"{value.name} ({visible('; '.join(more))})" if more else value.name


def is_odd(value: "Checked") -> bool:
    """Whether there is more to say of it than that it passed."""
    return value.result != "passed" or bool(value.looked_at)


def estimate(value: "Estimate") -> str:
    """``copies at least 3 GiB, the base grows by up to 2 GiB of 70 GiB free, about 15 s at 200 MiB/s (assumed)``."""
    if value.copy is None or value.seconds is None:
        return f"what would be copied is not known: {visible(value.reason)}"
    free = "" if value.free is None else f" of {size(value.free)} free"
    grows = "" if value.growth is None else f", the base grows by up to {size(value.growth)}{free}"
    if value.at_least:
        grows += ", and what the guest writes meanwhile"
    rate = f"{size(value.rate)}/s ({'as given' if value.rate_given else 'assumed'})"
    takes = duration(value.seconds) if value.seconds >= 1 else "less than 1 s"
    return f"copies {'at least ' if value.at_least else ''}{size(value.copy)}{grows}; {takes} at {rate}"


def looked_at(report: "Examination") -> str:
    """``looked at 3 VMs, 41 images, not at vm9: 1 harm, 2 care``; that nothing was found is said only of what was looked at."""
    counts = [
        f"{count} {word}{'' if count == 1 else 's'}" for count, word in ((report.vms, "VM"), (report.images, "image"))
    ]
    missed = [one.target for one in report.targets if one.error is not None]
    told = f"looked at {', '.join(counts)}" + (f", not at {', '.join(missed)}" if missed else "")
    found = Counter(finding.severity for _target, finding in report.findings)
    return f"{told}: {', '.join(f'{count} {severity}' for severity, count in found.items()) or 'no problems found'}"


def disk_row(disk: "Disk") -> tuple[str, ...]:
    """The row of a disk in the table of `disks`."""
    if disk.chain is None:
        return (disk.name, "", "", "", "", "", "(empty)")
    active = disk.chain.active
    return (
        disk.name,
        active.format,
        str(len(disk.chain)),
        size(active.virtual_size),
        size(active.allocated),
        disk.job.id if disk.job else "",
        active.file + (" (read-only)" if active.read_only else ""),
    )


def cost(outcome: "Outcome") -> str:
    """What a merge took: time, bytes copied, how long the guest was paused; and what it has left."""
    if outcome.verdict == "planned":
        return ", nothing was changed"
    copied = f", {size(outcome.copied)} copied" if outcome.copied is not None else ""
    left = sum(one.obstacle is not None for one in outcome.merged)
    undeleted = f", {left} of {len(outcome.merged)} merged files not deleted" if left else ""
    paused = f", guest paused for {outcome.paused_ms:.0f} ms" if outcome.paused_ms is not None else ""
    return (f" in {outcome.seconds:.2f} s{copied}{paused}" if outcome.seconds else "") + undeleted


def fate(merged: "MergedFile", *, planned: bool) -> str:
    """What was done with a merged file, or would be."""
    if planned:
        plans = {
            "stash": ", and be renamed to NAME.merged",
            "delete": ", and be deleted",
        }
        return plans.get(merged.action, "")
    place = os.path.basename(merged.now or "")
    fates = {
        "stash": f" (now {place})",
        "delete": " (deleted)",
        "gone": " (gone already)",
    }
    return fates.get(merged.action, "")
