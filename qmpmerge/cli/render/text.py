"""Text for people."""

import os
import shlex
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from qmpmerge.chain.chain import draw
from qmpmerge.cli.render import details, humanize
from qmpmerge.cli.render.visible import visible

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Outcome
    from qmpmerge.engine.pace.progress import Progress, Shortage
    from qmpmerge.engine.resume import Recovery
    from qmpmerge.errors import Error
    from qmpmerge.images.headers import Oddity
    from qmpmerge.operations.active import Active
    from qmpmerge.operations.clean import Cleaned
    from qmpmerge.operations.examine import Examination
    from qmpmerge.operations.snapshot import Overlay
    from qmpmerge.processes.vms import Vm
    from qmpmerge.qemu.blockgraph import Disk
    from qmpmerge.qemu.jobs import Job
    from qmpmerge.targets.target import ChainView


DRAW_AFTER_SECONDS = 0.5


class TextOutput:
    """
    Renders to two streams, to which it can always be written; `quiet` leaves out progress and notes.

    File names may hold anything, so every line is spelled out as it is written.
    """

    def __init__(
        self,
        out: TextIO,
        err: TextIO,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._err = err
        self._quiet = quiet
        self._clock = clock
        self._begun: float | None = None
        self._tenth = 0
        self._shortage: Shortage | None = None
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def vms(self, found: "Sequence[Vm]") -> None:
        """A table; monitors that can be used as TARGET come last."""
        rows = [
            (
                vm.name or "-",
                str(vm.pid),
                vm.user,
                "libvirt" if vm.libvirt else "",
                ", ".join(vm.monitors) or "no monitor",
            )
            for vm in found
        ]
        self._table(("NAME", "PID", "USER", "", "MONITOR"), rows, "no running QEMU found")

    def disks(self, found: "Sequence[Disk]", oddities: "Sequence[Oddity]" = ()) -> None:
        """A table, one disk a line; the oddities."""
        self._table(
            ("DISK", "FORMAT", "DEPTH", "SIZE", "ALLOCATED", "JOB", "ACTIVE IMAGE"),
            [humanize.disk_row(disk) for disk in found],
            "no disks",
        )
        for line in details.of_disks(found):
            self._say(line)
        self._oddities(oddities)

    def chain(self, view: "ChainView") -> None:
        """The drawing, the job that is on it, the table base first, the oddities."""
        self._say(f"{view.disk.name}: {view.chain}")
        rows = [
            (
                str(index),
                image.format,
                humanize.size(image.virtual_size),
                humanize.size(image.allocated),
                image.node or "-",
                image.label + (" *" if image is view.chain.active else ""),
                image.backing or "",
            )
            for index, image in enumerate(view.chain, 1)
        ]
        columns = ("INDEX", "FORMAT", "SIZE", "ALLOCATED", "NODE", "FILE (* active)", "BACKING AS WRITTEN")
        job = view.disk.job
        if job is not None:
            of = f", {humanize.size(job.done)} of {humanize.size(job.total)}" if job.total else ""
            self._say(f"job {job.id} ({job.type}): {job.status}{of}; possible now: {', '.join(job.verbs)}")
        self._table(columns, rows, "")
        for line in details.of_chain(view):
            self._say(line)
        self._oddities(view.oddities)

    def snapshot(self, overlays: "Sequence[Overlay]") -> None:
        """A line for each overlay."""
        for overlay in overlays:
            if not overlay.node:
                self._say(f"{overlay.disk}: {overlay.file} would be the active image, on {overlay.instead_of}")
                self._hint(overlay.hint) if overlay.hint else None
                continue
            self._say(f"{overlay.disk}: {overlay.file} is the active image now")
            stale = overlay.instead_of
            self._say(
                f"  start the VM from it from now on: {stale} shows older data, and writing to it ruins the overlay"
            )
            for hint in (
                overlay.hint,
                f"launch scripts: ask `qmpmerge active {shlex.quote(overlay.ask)}`" if overlay.ask else "",
            ):
                self._hint(hint) if hint else None

    def active(self, found: "Active", *, drive: bool) -> None:
        """The path as it is, byte by byte, for a script; spelled out for people."""
        told = found.drive if drive else found.file
        raw = getattr(self._out, "buffer", None)
        if raw is None or self._out.isatty():
            self._say(told)
        else:
            raw.write(os.fsencode(told) + b"\n")

    def commit(self, outcome: "Outcome") -> None:
        """The verdict, the chain before and after, what is left to do."""
        disk = outcome.disk
        if outcome.verdict == "unchanged":
            self._say(f"{disk}: unchanged, {outcome.before} has no backing file, so there is nothing to merge")
            for hint in outcome.hints:
                self._hint(hint)
            return
        self._say(f"{disk}: {outcome.verdict}{humanize.cost(outcome)}")
        self._say(f"  before  {draw(outcome.before.images)}")
        self._say(f"  after   {draw(outcome.after.images)}")
        for merged in outcome.merged:
            word = "would be removed from the chain" if outcome.verdict == "planned" else "removed from the chain"
            self._say(f"  {word}: {merged.file}{humanize.fate(merged, planned=outcome.verdict == 'planned')}")
        if outcome.estimate is not None:
            self._say(f"  {humanize.estimate(outcome.estimate)}")
        for result in ("passed", "forced", "not checked"):
            of_interest = (one for one in outcome.checks if outcome.verdict == "planned" or humanize.is_odd(one))
            names = [humanize.checked(check) for check in of_interest if check.result == result]
            if names:
                self._say(f"  {result}: {', '.join(names)}")
        for rung in outcome.rungs:
            self._say(f"  to get it ready: {rung}")
        for hint in outcome.hints:
            self._hint(hint)

    def recovered(self, found: "Sequence[Recovery]") -> None:
        """For each merge what was done, why, and from which image the VM is started now."""
        for one in found:
            self._say(f"{one.image}: {one.verdict}, {one.action}")
            for reason in one.reasons:
                self._say(f"  because  {reason}")
            if one.right is not None:
                self._say(f"  right is {one.right}")
            for merged in one.merged:
                self._say(f"  removed from the chain: {merged.file}{humanize.fate(merged, planned=False)}")
            for hint in one.hints:
                self._hint(hint)

    def cleaned(self, found: "Sequence[Cleaned]", *, dry_run: bool) -> None:
        """A line for each stashed file."""
        for one in found:
            fate = f"stays, {one.kept}" if one.kept else "would be removed" if dry_run else "removed"
            self._say(f"{one.file}: {fate} ({humanize.size(one.size)})")
        if not found:
            self._say("nothing is stashed here")

    def jobs(self, found: "Sequence[Job]") -> None:
        """A table, with what can be done with each job."""
        rows = [
            (
                job.id,
                job.type,
                job.disk or "-",
                job.status if job.io_status == "ok" else f"{job.status} ({job.io_status})",
                f"{humanize.size(job.done)} of {humanize.size(job.total)}",
                f"{humanize.size(job.speed)}/s" if job.speed else "unlimited",
                ", ".join(job.verbs),
                job.error or "",
            )
            for job in found
        ]
        columns = ("JOB", "TYPE", "DISK", "STATUS", "DONE", "SPEED", "POSSIBLE NOW", "")
        self._table(columns, rows, "no block jobs")

    def controlled(self, job_id: str, job: "Job | None") -> None:
        """One line."""
        limit = f", at most {humanize.size(job.speed)}/s" if job is not None and job.speed else ""
        self._say(f"{job_id}: {'gone' if job is None else job.status}{limit}")

    def doctor(self, report: "Examination") -> None:
        """Each finding in four lines: how bad and where, what, why, and the command that fixes it; how much was looked at."""
        for target, finding in report.findings:
            where = (
                finding.where
                if finding.where.startswith("/") or len(report.targets) == 1
                else f"{target}: {finding.where}"
            )
            self._say(f"{finding.severity}: {where} ({finding.name})")
            self._say(f"  what  {finding.what}")
            self._say(f"  why   {finding.why}")
            self._say(f"  fix   {finding.command or 'by hand, as above'}")
        self._say(humanize.looked_at(report))

    def failure(self, error: "Error") -> None:
        """The sentence, and the hint on a line of its own, both on stderr; several errors one after the other."""
        self.close()
        for part in error.parts:
            self._tell(f"{part.verdict}: {part}")
            if part.hint:
                self._hint(part.hint)

    def progress(self, progress: "Progress") -> None:
        """One redrawn line a disk on a terminal, else a line every 10 %; nothing for what is over in a blink."""
        if progress.hint and not self._quiet:
            self.close()
            self._hint(f"{progress.disk}: {progress.hint}")
        now = self._clock()
        if progress.note is not None:
            self.note(progress.note)
        if self._begun is None:
            self._begun = now
        if self._quiet or now - self._begun < DRAW_AFTER_SECONDS:
            return
        if self._err.isatty():
            self._redraw(progress)
            return
        if (progress.shortage is None) != (self._shortage is None):
            self._shortage = progress.shortage
            self._tell(humanize.progress(progress))
        tenth = int((progress.percent or 0) // 10)
        if tenth > self._tenth:
            self._tenth = tenth
            self._tell(humanize.progress(progress))

    def note(self, text: str) -> None:
        """A line on stderr."""
        if not self._quiet:
            self.close()
            self._tell(text)

    def trace(self, direction: str, text: str) -> None:
        """A line on stderr."""
        self.close()
        self._tell(f"{direction} {text}")

    def close(self) -> None:
        """End the redrawn line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._tasks.clear()

    def _redraw(self, progress: "Progress") -> None:
        if self._bar is None:
            # rich takes 80 ms to import: only where a bar is drawn
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(bar_width=24), TextColumn("{task.fields[line]}", markup=False))
            self._bar = Bar(*columns, console=Console(file=self._err), transient=True)
            self._bar.start()
        if progress.disk not in self._tasks:
            self._tasks[progress.disk] = self._bar.add_task("", total=None, line="")
        self._bar.update(
            self._tasks[progress.disk],
            total=progress.total or None,
            completed=progress.done,
            line=humanize.progress(progress),
        )

    def _oddities(self, oddities: "Sequence[Oddity]") -> None:
        for odd in oddities:
            self._say(f"problem: {odd.file}: {odd.message} ({odd.name})")

    def _say(self, line: str) -> None:
        self.close()
        self._out.write(f"{visible(line)}\n")

    def _tell(self, line: str) -> None:
        self._err.write(f"{visible(line)}\n")

    def _hint(self, text: str) -> None:
        if not self._quiet:
            self._tell(f"hint: {text}")

    def _table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
        if not rows:
            self._tell(empty) if empty and not self._quiet else None
            return
        cells = [columns, *([visible(cell) for cell in row] for row in rows)]
        used = [index for index in range(len(columns)) if any(row[index] for row in cells[1:])]
        widths = {index: max(len(row[index]) for row in cells) for index in used}
        for row in cells:
            self._say("  ".join(row[index].ljust(widths[index]) for index in used).rstrip())
