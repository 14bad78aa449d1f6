"""Numbers and names in words, as people read them on a terminal."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpmerge.engine.pace.progress import Progress

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Checked, Estimate, MergedFile, Outcome
    from qmpmerge.operations.clean import Cleaned
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


def visible(text: object) -> str:
    """The text with control characters, broken bytes and direction marks spelled out: file names may hold anything."""
    return "".join(c if c.isprintable() else _spelled(c) for c in str(text))


def _spelled(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as the filesystem interface hands it over
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def progress(told: Progress) -> str:
    """``vda: 30 %, copied 3 GiB of 10 GiB, 250 MiB/s, 28 s left``; what was scanned is not called copied."""
    percent = "" if told.percent is None else f"{told.percent:.0f} %, "
    parts = [f"{percent}{told.counts} {size(told.done)} of {size(told.total)}"]
    if told.rate is not None:
        parts.append(f"{size(told.rate)}/s")
    if told.dirty_rate and told.converging is not None:
        parts.append(f"the guest writes {size(told.dirty_rate)}/s")
    if told.converging is False:
        parts.append("never ready like this")
    if told.eta is not None and told.done < told.total:
        parts.append(f"{duration(told.eta)} left")
    if told.shortage is not None:
        missing = f"{size(told.shortage.needed)} more needed"
        parts.append(f"{told.status}: no space on {visible(told.shortage.filesystem)}, {missing}")
    elif told.status not in ("running", "created"):
        parts.append(told.status)
    return f"{visible(told.disk)}: {', '.join(parts)}"


def cleaned_verdict(found: "Sequence[Cleaned]", *, dry_run: bool) -> str:
    """What `clean` came to."""
    if not any(one.kept is None for one in found):
        return "unchanged"
    return "planned" if dry_run else "done"


def checked(told: "Checked") -> str:
    """The check's name, and why it could not be made."""
    return f"{told.name} ({visible(told.reason)})" if told.reason else told.name


def estimate(told: "Estimate") -> str:
    """``copies at least 3 GiB, the base grows by up to 2 GiB of 70 GiB free, about 15 s at 200 MiB/s (assumed)``."""
    if told.copy is None or told.seconds is None:
        return f"what would be copied cannot be told: {visible(told.reason)}"
    free = "" if told.free is None else f" of {size(told.free)} free"
    grows = "" if told.growth is None else f", the base grows by up to {size(told.growth)}{free}"
    if told.at_least:
        grows += ", and what the guest writes meanwhile"
    rate = f"{size(told.rate)}/s ({'as given' if told.rate_given else 'assumed'})"
    takes = duration(told.seconds) if told.seconds >= 1 else "less than 1 s"
    return f"copies {'at least ' if told.at_least else ''}{size(told.copy)}{grows}; {takes} at {rate}"


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
    """What a merge took: time, bytes copied, how long the guest was paused."""
    if outcome.verdict == "planned":
        return ", nothing was changed"
    copied = f", {size(outcome.copied)} copied" if outcome.copied is not None else ""
    paused = f", guest paused for {outcome.paused_ms:.0f} ms" if outcome.paused_ms is not None else ""
    return f" in {outcome.seconds:.2f} s{copied}{paused}" if outcome.seconds else ""


def fate(merged: "MergedFile", *, planned: bool) -> str:
    """What was done with a merged file, or would be."""
    if planned:
        plans = {
            "stash": ", and be renamed to NAME.merged",
            "relink": ", and be renamed to NAME.merged; a new overlay would have the active image's name",
            "delete": ", and be deleted",
        }
        return plans.get(merged.action, "")
    place = os.path.basename(merged.now or "")
    fates = {
        "stash": f", renamed to {place}",
        "relink": f", renamed to {place}; a new overlay has its name",
        "delete": ", deleted",
        "gone": ", gone already",
    }
    return fates.get(merged.action, "")
