"""
SIGKILL of qmpmerge at every step of a live merge, then the very same command again: it must end merged, and proved.

The moments are those of `kills`: before each QMP command and after each reply. The default run
takes a few of each merge, those around the switch among them. All of them, with a table at the end:

    QMPMERGE_ALL_KILLS=1 python -m pytest -s tests/crashes/test_tool_kills.py
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rig import kills
from rig.command import Run, scripted
from rig.disks import KINDS, Setup
from rig.folder import litter
from rig.machines import Content, fill, make_chain

from qmpmerge.qemu import flush

ALL = bool(os.environ.get("QMPMERGE_ALL_KILLS"))


@dataclass(frozen=True)
class Story:
    """A kind of merge, the way QEMU has the disk, the verdict, and the chain it is to leave."""

    options: tuple[str, ...]
    verdict: str
    after: tuple[str, ...]


MERGES = {
    "intermediate": Story(("--top", "b.qcow2"), "merged", ("base.raw", "c.qcow2")),
    "active": Story((), "pivoted", ("base.raw",)),
    "keep": Story(("--keep-overlay",), "kept", ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")),
}
CASES = [("intermediate", "blockdev"), ("active", "drive"), ("intermediate", "drive"), ("active", "blockdev")]
CASES += [("keep", "drive")] if ALL else []
SAMPLE = (
    "<- block-commit #1", "<- blockdev-add #2", "-> job-finalize #1", "<- job-finalize #1", "<- job-dismiss #1",
    "-> job-complete #1", "<- job-complete #1", "-> blockdev-del #2",
)  # fmt: skip
"""Moments that every default run takes where they come; each merge takes two of them."""


@pytest.mark.timeout(3600 if ALL else 120)
@pytest.mark.parametrize(("merge", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_killed_anywhere_the_same_command_ends_the_merge(merge: str, kind: str, tmp_path: Path) -> None:
    story = MERGES[merge]
    moments = seen_without_a_kill(tmp_path / "first", story, kind)
    assert len(moments) >= 30
    chosen = moments if ALL else sampled(moments, CASES.index((merge, kind)))
    killed = [run_killed(tmp_path / str(number), story, kind, moment) for number, moment in enumerate(chosen)]
    assert sum(killed) > (30 if ALL else 0)
    print(f"\n{merge} {kind}: {sum(killed)} kills of the tool, then the same command: {story.verdict}")


def sampled(moments: list[str], number: int) -> list[str]:
    """Two moments around the switch and one of the others."""
    known = [moment for moment in SAMPLE if moment in moments]
    turn = number // 2 * 2
    return [*known[turn : turn + 2], moments[(number + 1) * len(moments) // 6]]


def seen_without_a_kill(folder: Path, story: Story, kind: str) -> list[str]:
    """The moments of a merge that nobody disturbs; whether there is a progress to report, is a matter of luck."""
    with begun(folder, kind) as setup:
        tool(setup, story, folder / "notes", "never")
    lines = (folder / "notes").read_text().splitlines()
    return [line for line in lines if line.startswith(("->", "<-"))]


def run_killed(folder: Path, story: Story, kind: str, moment: str) -> bool:
    """Whether the moment came: how often a job is looked at is a matter of luck."""
    with begun(folder, kind) as setup:
        killed = tool(setup, story, folder / "notes", moment)
        if killed.code == 0:
            return False
        assert killed.code == -9, killed.err
        again = tool(setup, story, folder / "notes2", "never")
        document = json.loads(again.out)
        assert (document["verdict"], again.code) == (story.verdict, 0), (moment, document)
        assert [Path(file).name for file in document["after"]] == list(story.after), moment
        nothing_is_left(setup, moment)
        setup.check()
        setup.off()
    setup.content.check(folder / story.after[-1])
    assert not [name for name in litter(folder) if "qmpmerge" in name], moment
    return True


def nothing_is_left(setup: Setup, moment: str) -> None:
    ask: Any = setup.machine.session.execute
    assert ask("query-jobs") == [], moment
    assert flush.NODE not in [node["node-name"] for node in ask("query-named-block-nodes", flat=True)], moment


@contextlib.contextmanager
def begun(folder: Path, kind: str) -> Iterator[Setup]:
    """A fresh chain with data, in a QEMU."""
    folder.mkdir()
    images = make_chain(folder)
    content = Content()
    fill(images, content)
    with KINDS[kind](folder, images, content) as setup:
        yield setup


def tool(setup: Setup, story: Story, notes: Path, moment: str) -> Run:
    """Run the command with a killer in it."""
    options = [str(notes.parent / word) if word.endswith("2") else word for word in story.options]
    command = ["commit", setup.machine.target, setup.disk, *options, "--verify"]
    return scripted(kills.__file__, notes, "tool", moment, *command)
