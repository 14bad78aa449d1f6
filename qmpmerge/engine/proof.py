"""The proof: a fresh discovery must show what was planned, or the outcome is *unknown*."""

import shlex
import time

from qmpmerge.chain.chain import Chain
from qmpmerge.chain.outcome import Checked, Estimate, MergedFile, Outcome, Policy, files_advice, launch_advice
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.engine import journaling
from qmpmerge.engine.operation import Merge
from qmpmerge.engine.take_back import view_after
from qmpmerge.errors import NotProven
from qmpmerge.images import nbd
from qmpmerge.journal import stash


async def prove(merge: Merge, verdict: str, expected: Chain) -> Outcome:
    """A fresh look at graph and headers must show what was expected, else the outcome is unknown."""
    view = await view_after(merge, expected)
    if not _is_shown(merge, expected, view.chain):
        raise NotProven(target=merge.host.target, expected=_told(expected), found=_told(view.chain))
    if expected is merge.plan.result:
        await _see_header_on_server(merge)
    merged: tuple[MergedFile, ...] = ()
    if verdict == "kept":
        journaling.take_back(merge)
    else:
        merged = await journaling.settle_files(merge)
    left = [node for node in merge.old_nodes if node in view.layout.nodes and verdict != "kept"]
    hints = [*_advice(merge, verdict, merged), *merge.notes]
    if left:
        hints.append(f"still open in QEMU, in use by somebody else: {', '.join(left)}")
    return _outcome(merge, verdict, view.chain, tuple(hints), merged)


async def _see_header_on_server(merge: Merge) -> None:
    """
    Of an overlay on the network QEMU tells what it has written, not what its server has kept. Raises NotProven.
    """
    overlay = merge.plan.overlay
    if overlay is None or overlay.has_path:
        return
    header = await nbd.header(overlay)
    if header is None:
        merge.notes.append(f"the header of {overlay.file} could not be read back from its server")
    elif header.backing != merge.plan.backing_name:
        found = f"{overlay.file} (backing {header.backing}) on its server, which may have lost what QEMU wrote"
        raise NotProven(target=merge.host.target, expected=_told(merge.plan.result), found=found)


def _is_shown(merge: Merge, expected: Chain, found: Chain) -> bool:
    if not found.same_files(expected):
        return False
    overlay = merge.plan.overlay
    if overlay is None or expected is not merge.plan.result:
        return True
    image = found[expected.index(expected.find(overlay.node or overlay.file))]
    formats = {merge.plan.base.format, merge.base_driver}
    return image.backing == merge.plan.backing_name and image.backing_format in formats


def _told(chain: Chain) -> str:
    return " <-- ".join(f"{image.file} (backing {image.backing})" if image.backing else image.file for image in chain)


def _advice(merge: Merge, verdict: str, merged: tuple[MergedFile, ...]) -> list[str]:
    base = merge.plan.base.file
    if verdict == "kept":
        return [f"{base} held all data at the moment it was let go; the guest writes to the overlay"]
    return [*(launch_advice(base, merged[-1]) if verdict == "pivoted" else []), *files_advice(merged)]


def merged_files(planned: CommitPlan, policy: Policy) -> tuple[MergedFile, ...]:
    """The images that the chain loses, base first, each still in its place, and what is to become of it."""
    chain = planned.chain
    able = stash.names_away(chain, chain.index(planned.base), chain.index(planned.top))
    return tuple(
        MergedFile(image.file, policy if chain.index(image) in able else "keep", image.file) for image in planned.merged
    )


def planned(disk: str, plan: CommitPlan, policy: Policy, checked: tuple[Checked, ...], estimate: Estimate) -> Outcome:
    """The outcome of a merge that was only looked at."""
    merged = merged_files(plan, policy)
    return Outcome("planned", disk, plan.chain, plan.result, merged=merged, checks=checked, estimate=estimate)


def _outcome(
    merge: Merge, verdict: str, after: Chain, hints: tuple[str, ...], merged: tuple[MergedFile, ...] = ()
) -> Outcome:
    return Outcome(
        verdict=verdict,
        disk=merge.disk.name,
        before=merge.plan.chain,
        after=after,
        job=merge.job,
        merged=merged,
        copied=merge.copied if merge.plan.pivots else None,
        seconds=time.monotonic() - merge.started,
        hints=hints,
        verified=merge.verified,
        paused_ms=merge.paused_ms,
    )


def ready(merge: Merge) -> Outcome:
    """The outcome of a merge that was to stop at ready."""
    command = f"qmpmerge job {shlex.quote(merge.host.target)} {merge.job}"
    hints = (f"every write now goes to both images; `{command} pivot`, `{command} keep` or `{command} cancel` ends it",)
    return _outcome(merge, "ready", merge.plan.chain, hints)
