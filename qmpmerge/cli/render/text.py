"""Text for people."""

import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from qmpmerge.cli.render import humanize, tidied
from qmpmerge.cli.render import outcome as merge
from qmpmerge.cli.render.page import Colour, Page, Painted

if TYPE_CHECKING:
    from qmpmerge.chain.outcome import Outcome
    from qmpmerge.cli.render import bar
    from qmpmerge.cli.render.table import Column
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


DRAW_AFTER_SECONDS = 0.5
_GONE = {"cancel": "cancelled", "dismiss": "dismissed"}
"""How a verb is said to have made a job go."""

COLOURS: dict[str, Colour] = {
    **dict.fromkeys(("merged", "pivoted", "kept", "ready", "held", "created", "done", "pulled"), "green"),
    **dict.fromkeys(("refused", "unreachable", "failed", "unknown", "harm"), "red"),
    **dict.fromkeys(("running", "postponed", "cancelled", "care", "problem"), "yellow"),
}
"""Of verdicts and severities; the others have none."""


class TextOutput:
    """
    Renders to two streams, to which it can always be written; `quiet` leaves out progress, notes and the hints of success.

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
        self._out = Page(out)
        self._err = Page(err)
        self._bar: bar.Bar | None = None
        if self._err.can_redraw and not quiet:
            from qmpmerge.cli.render.bar import Bar  # now: a job may be at work when it is drawn

            self._bar = Bar(self._err)
        self._quiet = quiet
        self._clock = clock
        self._begun: float | None = None
        self._tenths: dict[str, int] = {}
        self._at_work: dict[str, Progress] = {}

    def vms(self, found: "Sequence[Vm]") -> None:
        """A table; monitors that can be used as TARGET come last."""
        from qmpmerge.cli.render import listing

        self._table(listing.VMS, map(listing.vm, found), "no running QEMU found")

    def disks(self, found: "Sequence[Disk]", oddities: "Sequence[Oddity]" = ()) -> None:
        """A table, one disk a line; the oddities."""
        from qmpmerge.cli.render import details, listing

        self._table(listing.DISKS, map(listing.disk, found), "no disks")
        for line in details.of_disks(found):
            self._say(line)
        self._oddities(oddities)

    def chain(self, view: "ChainView") -> None:
        """The drawing, the job that is on it, the table base first, the oddities."""
        from qmpmerge.cli.render import details, listing

        self._say(f"{view.disk.name}: {view.chain}")
        job = view.disk.job
        if job is not None:
            of = f", {humanize.size(job.done)} of {humanize.size(job.total)}" if job.total else ""
            self._say(f"job {job.id} ({job.type}): ", humanize.status(job), of)
            self._say(f"  possible now: {', '.join(job.verbs)}")
        self._table(listing.CHAIN, listing.images(view), "")
        for line in details.of_chain(view):
            self._say(line)
        self._oddities(view.oddities)

    def graph(self, found: "Graph", *, drawn: str | None) -> None:
        """A row for each use of a node, below it what deserves a look; what is not known, and what the letters mean."""
        if drawn is not None:
            from qmpmerge.cli.render import dot, mermaid

            for line in (dot if drawn == "dot" else mermaid).lines(found):
                self._show(line)
            return
        from qmpmerge.cli.render import graph, table

        found_rows = list(graph.rows(found))
        titles, *shown = table.lines(graph.COLUMNS, [row.cells for row in found_rows], self._out.columns)
        self._show(*titles)
        for row, parts in zip(found_rows, shown, strict=True):
            self._show(*parts)
            for note in row.notes:
                for line in graph.noted(row, note, self._out.columns):
                    self._show(*line)
        for reason in found.not_known:
            self._say(f"not known  {reason}")
        if any(edge.takes is not None for edge in found.edges):
            self._hint(graph.LEGEND)

    def snapshot(self, overlays: "Sequence[Overlay]") -> None:
        """A line for each overlay."""
        for overlay in overlays:
            if not overlay.node:
                self._say(f"{overlay.disk}: {overlay.file} would be the active image, on {overlay.backing_file}")
                self._hint(overlay.hint) if overlay.hint else None
                continue
            self._say(f"{overlay.disk}: {overlay.file} is the active image now")
            self._say("  start the VM from it from now on")
            self._say(f"  {overlay.backing_file} shows older data, and writing to it ruins the overlay")
            for hint in (
                overlay.hint,
                f"for launch scripts: `qmpmerge active {shlex.quote(overlay.ask)}`" if overlay.ask else "",
            ):
                self._hint(hint) if hint else None

    def active(self, found: "Active", *, drive: bool) -> None:
        """The path as it is, byte by byte, for a script; spelled out for people."""
        told = found.drive if drive else found.file
        raw = getattr(self._out.stream, "buffer", None)
        if raw is None or self._out.is_terminal:
            self._show(told)
        else:
            raw.write(os.fsencode(told) + b"\n")

    def commit(self, outcome: "Outcome") -> None:
        """The verdict, the chain before and after, what is left to do."""
        verdict = Painted(outcome.verdict, COLOURS.get(outcome.verdict))
        if outcome.verdict == "unchanged":
            why = f"{outcome.before}{'' if len(outcome.before) > 1 else ' has no backing file'}"
            self._say(f"{outcome.disk}: nothing to merge, {why}")
        else:
            self._say(f"{outcome.disk}: ", verdict, humanize.cost(outcome))
            for line in merge.lines(outcome):
                self._say(f"  {line}")
        for hint in outcome.hints:
            self._hint(hint)

    def plan(self, found: "Ways") -> None:
        """Two columns; then who needs the images, what speaks against a way, which to take, and the commands."""
        from qmpmerge.cli.render import ways

        if not found.ways:
            self._say(f"{found.disk}: nothing to merge, {found.before}")
            return
        self._say(f"{found.disk}: {found.before}")
        self._table(ways.COLUMNS, ways.rows(found.ways), "")
        for line in ways.notes(found):
            self._say(line)
        for way in found.ways:
            for refusal in way.refusals:
                self._say(f"{way.direction} is ", Painted("refused", COLOURS["refused"]), f": {refusal}")
                self._say(f"  {refusal.hint}")
        for line in ways.answer(found):
            self._say(line)

    def recovered(self, found: "Sequence[Recovery]") -> None:
        """For each merge what was done, why, and from which image the VM is started now."""
        for one in found:
            verdict = "nothing to do" if one.verdict == "unchanged" else one.verdict
            self._say(f"{one.file}: ", Painted(verdict, COLOURS.get(one.verdict)), f", {one.message}")
            for reason in one.reasons:
                self._say(f"  because  {reason}")
            if one.start_from is not None:
                self._say(f"  start the VM from {one.start_from}")
            for line in merge.files(one.merged):
                self._say(f"  {line}")
            for hint in one.hints:
                self._hint(hint)

    def cleaned(self, found: "Sequence[Cleaned]", *, dry_run: bool) -> None:
        """A line for each stashed file, and one for all."""
        fate = "would be removed" if dry_run else "removed"
        for one in found:
            self._say(
                f"{one.file}: stays: {one.obstacle}"
                if one.obstacle
                else f"{one.file}: {fate}, {humanize.size(one.allocated)}"
            )
        gone = [one.allocated for one in found if one.obstacle is None]
        if not found:
            self._say("nothing is stashed here")
        elif len(found) > 1:
            self._say(f"{len(gone)} of {len(found)} files {fate}, {humanize.size(sum(gone))}")

    def tidied(self, *done: "Tidied") -> None:
        """A line for each, of a plan with what it takes; an error as of any command, with the disk, but those of many alike."""
        for one in done:
            name = humanize.name(one.target, one.disk)
            self._at_work.pop(name, None)
            if one.error is not None and not tidied.is_alike(one):
                self._failed(one.error, f"{name}: ")
            if one.outcome is not None:
                self._say(f"{name}: ", Painted(one.verdict, COLOURS.get(one.verdict)), humanize.result(one.outcome))
                for line in tidied.takes(one.outcome):
                    self._say(f"  {line}")

    def tidy(self, done: "Tidying") -> None:
        """What is the same of many, how many came to what, and once what there is left to do."""
        for one in done.left_out:
            self.note(f"left out: {humanize.name(one.target, one.disk)}: {one.reason}")
            if one.hint:
                self._advise(f"{one.target}: {one.hint}" if self._quiet else one.hint)
        for error, names in tidied.alike(done.tidied):
            self._failed(error, f"{names}: ")
        for line in tidied.unpassed(done.tidied):
            self._say(line)
        self._say(tidied.summary(done.tidied))
        for hint in dict.fromkeys(hint for one in done.tidied if one.outcome for hint in one.outcome.hints):
            self._hint(hint)

    def jobs(self, found: "Sequence[Job]") -> None:
        """A table; then what can be done with each job, and the error that it ended with."""
        from qmpmerge.cli.render import listing

        self._table(listing.JOBS, map(listing.job, found), "no block jobs")
        for job in found:
            if job.reason:
                self._say(f"{job.id}: {job.reason}")
            self._say(f"{job.id}: possible now: {', '.join(job.verbs)}")

    def controlled(self, job_id: str, verb: str, job: "Job | None") -> None:
        """One line."""
        if job is None:
            self._say(f"{job_id}: {_GONE.get(verb, 'gone')}")
        else:
            limit = f"at most {humanize.limit(job.speed)}" if job.speed else "no speed limit"
            self._say(f"{job_id}: ", humanize.status(job), f", {limit}")

    def doctor(self, report: "Examination") -> None:
        """
        Each finding: how bad and where, what, why, and the command that fixes it, if one does; how much was looked at. Who
        wants quiet is told only what there is to do, so that cron sends no mail about nothing.
        """
        findings = [one for one in report.findings if not self._quiet or one[1].severity != "note"]
        if self._quiet and not findings:
            return
        for target, finding in findings:
            where = (
                finding.where
                if finding.where.startswith("/") or len(report.targets) == 1
                else f"{target}: {finding.where}"
            )
            self._say(Painted(finding.severity, COLOURS.get(finding.severity)), f": {where} ({finding.name})")
            self._say(f"  what  {finding.message}")
            self._say(f"  why   {finding.why}")
            if finding.fix:
                self._show(f"  fix   {finding.fix}")
        self._say(humanize.looked_at(report))

    def explained(self, found: "Sequence[Explained]", *, unread: int) -> None:
        """Of each command its time line, and two tables."""
        from qmpmerge.cli.render import timeline

        for number, one in enumerate(found):
            for line in ([""] if number else []), timeline.head(one), [""]:
                for text in line:
                    self._say(text)
            for item in one.items:
                for parts in timeline.lines(item, self._out.columns):
                    self._show(*parts)
            self._say("")
            if one.felt:
                self._table(timeline.FELT, map(timeline.felt, one.felt), "")
                self._say("")
            self._table(timeline.SPENT, (timeline.spent(row, one.seconds) for row in one.spent), "")
        if unread:
            are = "1 line of the file is no line" if unread == 1 else f"{unread} lines of the file are no lines"
            self.note(f"{are} of a recording, or not whole")

    def listening(self, path: str) -> None:
        """The path alone, for scripts too."""
        self._show(path)

    def replayed(self, found: "Replayed") -> None:
        """How much, and what was not as it was."""
        self._say(f"played {found.played} of {found.commands} commands that change something")
        if found.diverged is not None:
            self._say(Painted("diverged", COLOURS["problem"]), f": {found.diverged}")
        elif found.unplayed:
            self._say(f"  next would be  {found.unplayed[0]}")
        if found.unknown:
            self._say(f"  not recorded   {', '.join(found.unknown)}")

    def failure(self, error: "Error") -> None:
        """The sentence, and the hint on a line of its own, both on stderr; several errors one after the other."""
        self._failed(error)

    def _failed(self, error: "Error", where: str = "") -> None:
        for part in error.parts:
            self._tell(Painted(part.verdict, COLOURS.get(part.verdict)), f": {where}{part}")
            if part.hint:
                self._advise(part.hint)

    def progress(self, progress: "Progress") -> None:
        """
        One redrawn line on a terminal, for all that is at work, else a line every 10 % of each; nothing for what is over in a
        blink.
        """
        if progress.target is not None:
            progress = replace(progress, disk=humanize.name(progress.target, progress.disk))
        if progress.hint:
            self._hint(f"{progress.disk}: {progress.hint}")
        now = self._clock()
        if progress.note is not None:
            self.note(progress.note if progress.target is None else f"{progress.disk}: {progress.note}")
        if self._begun is None:
            self._begun = now
        if self._quiet or now - self._begun < DRAW_AFTER_SECONDS:
            return
        before = self._at_work.get(progress.disk)
        self._at_work[progress.disk] = progress
        if self._bar is not None:
            at_work = [progress] if progress.target is None else [*self._at_work.values()]
            self._bar.draw(*humanize.together(at_work))
            return
        if (progress.shortage is None) != (before is None or before.shortage is None):
            self._tell(humanize.progress(progress))
        tenth = int((progress.percent or 0) // 10)
        if tenth > self._tenths.get(progress.disk, 0):
            self._tenths[progress.disk] = tenth
            self._tell(humanize.progress(progress))

    def note(self, text: str) -> None:
        """A line on stderr."""
        if not self._quiet:
            self._tell(text)

    def trace(self, entry: "Mapping[str, Any]") -> None:
        """A line on stderr."""
        from qmpmerge.cli.render import traced

        self.close()
        self._err.whole(traced.line(entry))

    def close(self) -> None:
        """End the redrawn line."""
        if self._bar is not None:
            self._bar.erase()

    def _oddities(self, oddities: "Sequence[Oddity]") -> None:
        for odd in oddities:
            self._say(Painted("problem", COLOURS["problem"]), f": {odd.file}: {odd.message} ({odd.name})")

    def _say(self, *parts: str) -> None:
        self.close()
        self._out.line(*parts)

    def _show(self, *parts: str) -> None:
        self.close()
        self._out.whole(*parts)

    def _tell(self, *parts: str) -> None:
        self.close()
        self._err.line(*parts)

    def _hint(self, text: str) -> None:
        """What may be done next; who wants quiet knows."""
        if not self._quiet:
            self._advise(text)

    def _advise(self, text: str) -> None:
        self._tell(Painted("hint", "cyan"), f": {text}")

    def _table(self, columns: "Sequence[Column]", rows: Iterable[Sequence[str]], empty: str) -> None:
        from qmpmerge.cli.render.table import lines

        table = list(rows)
        if not table:
            self.note(empty)
            return
        for parts in lines(columns, table, self._out.columns):
            self._show(*parts)
