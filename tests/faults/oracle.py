"""
The judge: does the disk show what it must, and was it called what it is?

What it must show is what it showed at first plus every write that the guest saw flushed. A write that was still under
way may be there or not. Looked at with `-U`: a program that another thread of the bench is just starting has a copy of
the gate's descriptors for a moment, and with them the locks of a machine that is dead.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rig import contract
from rig.disks import form
from rig.machines import run

from faults.stage import Case, Guest, Played, recover

DONE_ALREADY = ("refused: no-such-layer", "refused: stashed")
"""What is said where the layer or the image that was named is no part of the chain any more."""

SOUND, LEAKS = 0, 3
"""Exit codes of `qemu-img check`: leaked clusters cost space and no data."""


@dataclass
class Judgement:
    """
    `lost` counts the 4 KiB blocks that show other data than they must, in the image that has to be right; `wrong` are
    sentences. `asked` says that `recover` left it to the user, who is told which two it may be. `stale` says that the image
    the machine was launched from opens and shows old data; `left` is what a dead qmpmerge has left in QEMU, which its next
    flush takes away.
    """

    lost: int = 0
    wrong: list[str] = field(default_factory=list)
    asked: bool = False
    stale: bool = False
    leaks: bool = False
    left: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not self.wrong


def judge(case: Case, played: Played, *, at: int | None = None) -> Judgement:
    """Look at the images as they lie there, with nobody using them; `at` is the length of the log that they come from."""
    found = Judgement()
    if at is None:
        judge_words(case, played, found)
    judge_data(case, played, found, at)
    return found


def judge_data(case: Case, played: Played, found: Judgement, at: int | None) -> None:
    """The image that the machine is to be started from shows every byte that it must."""
    base, _mid, top = case.paths
    claimed = played.done and (at is None or at >= played.count_at_end)
    if played.story.pivots and not top.exists():  # a start from there fails, loudly
        lost = [losses_of(case, played, image, at, found) for image in right_by_recover(case, found) or [base]]
        must = 0 if 0 in lost else lost[0]
    elif played.story.pivots:
        losses = {path: losses_of(case, played, path, at, found) for path in (top, base)}
        # With a claim the guest lives on base; while it wrote it may have been moved without a word.
        must = losses[base] if claimed else min(losses.values()) if played.story.writes else losses[top]
        # A replayed power cut has no names, and ours takes top's away before the device moves.
        named = at is None or played.doer != "qmpmerge"
        found.stale = named and (claimed or played.story.writes) and losses[top] != 0
    else:
        must = losses_of(case, played, top, at, found)
    if must:
        found.lost = max(must, 0)
        found.wrong.append(f"{'does not open' if must < 0 else f'{must} blocks wrong'} after {played.verdict}")


def right_by_recover(case: Case, found: Judgement) -> list[Path]:
    """
    The image that `recover` names as the one to start from; none where nothing was left to be put right, and both where
    it asks which one: here somebody writes past the guest that stands still, of whom a merge does not know.
    """
    told = recover(case)
    if told.verdict == "unknown: undecided":
        found.asked = True
        return [Path(told.document["error"]["facts"][which]) for which in ("base", "top")]
    if told.code not in (0, 6):
        found.wrong.append(f"recover: {told.verdict}, exit code {told.code}, {told.complaints[-500:]}")
    return [Path(merge["start_from"]) for merge in told.document.get("merges", []) if merge["start_from"]][-1:]


def losses_of(case: Case, played: Played, image: Path, at: int | None, found: Judgement) -> int:
    """How many blocks of an image's view are wrong; -1 where it does not open or is damaged."""
    if not check(image, found):
        return -1
    view = case.folder / "view.raw"
    done = subprocess.run(
        ["qemu-img", "convert", "-U", "-f", form(image), "-O", "raw", image, view], capture_output=True
    )
    if done.returncode:
        return -1
    return differing(case, played, view.read_bytes(), at)


def check(image: Path, found: Judgement) -> bool:
    """Whether qemu-img finds nothing worse than leaks; what QEMU mends by itself as it opens an image is mended first."""
    if form(image) == "raw":
        return True
    if is_dirty(image):
        subprocess.run(["qemu-img", "check", "-q", "-r", "all", image], capture_output=True)
    done = subprocess.run(["qemu-img", "check", "-U", "-q", image], capture_output=True)
    found.leaks = found.leaks or done.returncode == LEAKS
    return done.returncode in (SOUND, LEAKS)


def is_dirty(image: Path) -> bool:
    """Whether its header says that the refcounts are to be made anew (docs/interop/qcow2.txt: incompatible feature 0)."""
    with image.open("rb") as file:
        header = file.read(80)
    return header[:4] == b"QFI\xfb" and int.from_bytes(header[4:8], "big") >= 3 and bool(header[79] & 1)


def differing(case: Case, played: Played, seen: bytes, at: int | None) -> int:
    expected = bytearray(case.content)
    acknowledged = {offset: pattern for offset, pattern, count in played.acknowledged if at is None or count <= at}
    for offset, pattern in acknowledged.items():
        expected[offset : offset + Guest.SLOT] = bytes([pattern]) * Guest.SLOT
    for offset, pattern in played.begun:
        block = bytes([pattern]) * Guest.SLOT
        if offset not in acknowledged and seen[offset : offset + Guest.SLOT] == block:
            expected[offset : offset + Guest.SLOT] = block
    if len(seen) != len(expected):
        return -1
    step = Guest.SLOT
    return sum(seen[place : place + step] != expected[place : place + step] for place in range(0, len(seen), step))


# --- what was said ----------------------------------------------------------------------------------------------------


def judge_words(case: Case, played: Played, found: Judgement) -> None:
    """A verdict is right when the headers tell the chain that it stands for, and there always is one."""
    if played.doer != "qmpmerge":
        return
    if "Traceback" in played.complaints or played.code == 1:
        found.wrong.append(f"a traceback: {played.complaints[-1000:]} {played.document}")
    if played.code != -9 and not played.document:
        found.wrong.append(f"no verdict: {played.verdict}, exit code {played.code}, {played.complaints[-500:]}")
    found.wrong += contract.problems(played.document) if played.document else []
    if played.story.pivots and not case.paths[-1].exists():
        return  # its name is gone, and so is what its header tells
    told = chain(case.paths[-1])
    old, new = list(case.names), [case.names[index] for index in played.story.left]
    if told not in (old, new):
        found.wrong.append(f"the chain is {told}")
    switched = not played.story.pivots and told == new
    verdict = played.document.get("verdict")
    if verdict == played.story.verdict and not switched:
        found.wrong.append(f"{verdict}, and the header tells the old chain")
    if (
        verdict in ("refused", "unreachable", "failed", "cancelled", "held")
        and switched
        and played.verdict not in DONE_ALREADY
    ):
        found.wrong.append(f"{verdict}, and the header tells the new chain")


def chain(top: Path) -> Sequence[str]:
    """The file names that the headers tell, base first."""
    told = run("qemu-img", "info", "-U", "--backing-chain", "--output=json", top)
    return [os.path.basename(entry["filename"]) for entry in reversed(json.loads(told))]
