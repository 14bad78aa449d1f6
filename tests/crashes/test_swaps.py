"""
A hostile neighbour: the name of every open, create, rename and remove of a run is given to another file right then.

Offline so are the names of all images right before each QMP command. What gets the name is a symlink to a file outside of the
folder, which must not change in any way; a FIFO, which must not be waited for; another file of the neighbour's, or a hard link
to it. The command must say what is so or that it does not know, in time and without a traceback; and no data may be lost: with
all names put back, the images that the chain was made of still show, stacked as they were, what they showed.

The default run takes some moments of each story. All of them:

    QMPMERGE_ALL_KILLS=1 python -m pytest -s tests/crashes/test_swaps.py
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rig import kills, swaps
from rig.command import scripted
from rig.disks import drive
from rig.machines import Content, fill, make_chain, run

ALL = bool(os.environ.get("QMPMERGE_ALL_KILLS"))
NAMES = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")
SECONDS = 150.0
CODES = {0, 3, 4, 5, 6, 7}
"""What the command may end with: its verdicts, and no wrong usage, and no bug."""
SAMPLE = 2
"""So many moments of each story are in the default run."""


@dataclass(frozen=True)
class Story:
    """A command line (names stand for paths, TARGET for the machine's), and what is run before it."""

    command: tuple[str, ...]
    killed: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    is_live: bool = False


ACTIVE, MIDDLE = ("commit", "c.qcow2"), ("commit", "c.qcow2", "--base", "a.qcow2", "--top", "b.qcow2")
STORIES = {
    "active": Story(ACTIVE),
    "middle": Story(MIDDLE),
    "live active": Story(("commit", "TARGET", "vda"), is_live=True),
    "live middle": Story(("commit", "TARGET", "vda", "--top", "b.qcow2"), is_live=True),
    "snapshot": Story(("snapshot", "c.qcow2", "c.qcow2=d.qcow2")),
    "live snapshot": Story(("snapshot", "TARGET", "vda=d.qcow2"), is_live=True),
    "recover": Story(("recover", "c.qcow2"), killed=("-> job-complete #1", *ACTIVE)),
    "recover middle": Story(("recover", "c.qcow2"), killed=("<- job-finalize #1", *MIDDLE)),
    "clean": Story(("clean", "."), before=MIDDLE),
}


@dataclass
class Swapped:
    """What one swap came to; `wrong` are sentences."""

    story: str
    moment: str
    kind: str
    verdict: str = ""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.story}, {self.kind} at {self.moment}: {self.verdict} {self.wrong}"


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str
    notes: list[str]

    @property
    def verdict(self) -> str:
        document = json.loads(self.out) if self.out else {}
        error = document.get("error", {}).get("name")
        return f"{document.get('verdict')}{f': {error}' if error else ''}"

    def faults(self) -> list[str]:
        if self.code in CODES and self.out and "Traceback" not in self.err:
            return []
        return [f"exit code {self.code}, {self.out!r}, {self.err[-1500:]}"]


class Case:
    """A copy of the images, and a file of somebody else's outside of their folder."""

    def __init__(self, model: Path, content: Content, story: Story, folder: Path) -> None:
        self.story, self.content = story, content
        self.place = Path(tempfile.mkdtemp(dir=folder))
        self.images = self.place / "vm"
        shutil.copytree(model, self.images)
        self.inodes = {name: (self.images / name).stat().st_ino for name in NAMES}
        self.victims = {suffix: self.place / f"victim{suffix}" for suffix in (".raw", ".qcow2")}
        for suffix, victim in self.victims.items():
            shutil.copyfile(self.images / {".raw": "base.raw", ".qcow2": "c.qcow2"}[suffix], victim)
            victim.chmod(0o600)
        self.looks = self.looked()
        self.target = ""

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """With what was done before, and the machine where there is one."""
        if self.story.killed:
            moment, *line = self.story.killed
            killed = scripted(kills.__file__, self.place / "killed", "both", moment, *self.words(line))
            assert killed.code == -9
        if self.story.before:
            assert self.run("never", "link", self.story.before).code == 0
        if not self.story.is_live:
            yield
            return
        with drive(self.place, [self.images / name for name in NAMES], self.content) as setup:
            self.target = setup.machine.target
            yield
            setup.check()
            setup.off()

    def words(self, line: Any) -> list[str]:
        place = str(self.images)
        said = [word.replace("=", f"={place}/") if "=" in word else word for word in line]
        return [
            f"{place}/{word}" if word in NAMES else {"TARGET": self.target, ".": place}.get(word, word) for word in said
        ]

    def run(self, moment: str, kind: str, line: Any = None) -> Run:
        notes = self.place / "notes"
        notes.unlink(missing_ok=True)
        name = moment.rpartition(" #")[0].split(" ", 1)[-1] if not moment.startswith("->") else moment
        victim = self.victims[".qcow2" if name.endswith(".qcow2") else ".raw"]
        words = [notes, moment, kind, victim, *self.words(line or self.story.command)]
        environment = {"QMPMERGE_SWAPS_IN": str(self.images)}
        done = scripted(swaps.__file__, *words, env=environment, seconds=int(SECONDS))
        return Run(done.code, done.out, done.err, notes.read_text().splitlines() if notes.exists() else [])

    def looked(self) -> list[tuple[bytes, int, int, int, int]]:
        """All that must not change about the files of somebody else."""
        looks = [(victim.read_bytes(), victim.stat()) for victim in self.victims.values()]
        return [(data, one.st_mode, one.st_uid, one.st_gid, one.st_mtime_ns) for data, one in looks]

    def put_back(self, planted: str) -> None:
        """The neighbour goes, and every file has its name again."""
        _, inode, name = planted.split(" ", 2)
        for path in self.images.iterdir():
            if path.lstat().st_ino == int(inode):
                path.unlink()
        was = self.images / f"{name}{swaps.WAS}"
        if was.exists() and not (self.images / name).exists():
            was.rename(self.images / name)

    def wrong(self) -> list[str]:
        """What was lost of the images as they were, wherever they are now."""
        there = {path.lstat().st_ino: path for path in self.images.iterdir()}
        lost = [name for name, inode in self.inodes.items() if inode not in there]
        if lost:
            return [f"lost: {lost}"]
        node: dict[str, object] | None = None
        for name in NAMES:
            file = {"driver": "file", "filename": str(there[self.inodes[name]])}
            below = {"backing": node} if node is not None else {}
            node = {"driver": name.rpartition(".")[2], "file": file, **below}
        view = self.place / "view"
        run("qemu-img", "convert", "-O", "raw", f"json:{json.dumps(node)}", view)
        return [] if view.read_bytes() == self.content.data else ["the images do not show what they showed"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    images, content = tmp_path_factory.mktemp("images"), Content()
    fill(make_chain(images, NAMES), content)
    return images, content


def strike(model: tuple[Path, Content], folder: Path, name: str, moment: str, kind: str) -> Swapped:
    """Swap once, look, put back, recover, look again."""
    case, result = Case(*model, STORIES[name], folder), Swapped(name, moment, kind)
    try:
        with case.begun():
            done = case.run(moment, kind)
            result.verdict, result.wrong = done.verdict, done.faults()
            if case.looked() != case.looks:
                result.wrong.append("a file outside of the folder was changed")
            planted = next((line for line in done.notes if line.startswith(swaps.PLANTED)), None)
            if planted is not None:
                case.put_back(planted)
        result.wrong += case.wrong() if name != "clean" else []
        result.wrong += [f"recover: {fault}" for fault in case.run("never", kind, ("recover", ".")).faults()]
        result.wrong += case.wrong() if name != "clean" else []
    except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
        result.wrong.append(f"{type(error).__name__}: {error}"[:1000])
    if not result.wrong:
        shutil.rmtree(case.place)
    return result


def moments_of(model: tuple[Path, Content], folder: Path, name: str) -> list[str]:
    """Of a run that nobody disturbs."""
    case = Case(*model, STORIES[name], folder)
    with case.begun():
        done = case.run("never", "link")
        assert done.code == 0, done
    commands = [note for note in done.notes if note.startswith("->")]
    named = [note for note in done.notes if not note.startswith("->")]
    swapped = [] if STORIES[name].is_live else [f"{command} {image}" for command in commands for image in NAMES]
    return [*named, *swapped]


@pytest.mark.timeout(7200 if ALL else 600)
@pytest.mark.parametrize("name", STORIES)
def test_a_name_is_given_to_another_file(name: str, model: tuple[Path, Content], tmp_path: Path) -> None:
    moments = moments_of(model, tmp_path, name)
    assert moments
    if ALL:
        cases = [(moment, kind) for moment in moments for kind in swaps.KINDS]
    else:
        decisive = [moment for moment in moments if moment.startswith(("create", "rename", "remove"))]
        chosen = [*moments[:: max(1, len(moments) // SAMPLE)], *decisive[:: max(1, len(decisive) // SAMPLE)]]
        cases = [(moment, swaps.KINDS[number % 4]) for number, moment in enumerate(dict.fromkeys(chosen))]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda case: strike(model, tmp_path, name, *case), cases))
    print(f"\n{name}: {len(found)} swaps, {len(moments)} moments")
    wrong = [str(result) for result in found if result.wrong]
    assert not wrong, "\n".join(wrong)
