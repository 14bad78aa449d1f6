"""
A command of ours that talks to a real QEMU through a liar, and what must hold whatever it was told.
"""

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpmerge.errors import EXIT_CODES
from qmpmerge.testing.wire import behind
from rig import hasty, liar
from rig.command import Run, attempt, held, scripted
from rig.disks import Setup, device
from rig.liar import LIES, Liar
from rig.machines import Content, Machine, fill, machine, make_chain

NAMES = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")
OUTSIDE = "outside.txt"
GOOD = set(EXIT_CODES.values())
SILENT = ("id", "incomplete", "no-object")
"""Lies after which a reply may never come: the command then waits less than it would."""

FIRMWARE = b"\xfa\xf4\xeb\xfd".ljust(16, b"\0").rjust(65536, b"\0")
"""64 KiB, the processor starts 16 bytes before their end: cli; hlt; and again. A guest that runs and does nothing."""


@dataclass(frozen=True)
class Scene:
    """
    One command: its `words` in which ``{target}`` and ``{folder}`` are filled in, and which chain (base first) each verdict
    stands for. `before` it another one is run, without a lie or with this one: its name, the command whose reply it is, and
    the one since when. `after` are the commands that must come to an end afterwards, with the chain `ends`.
    """

    name: str
    words: tuple[str, ...]
    verdicts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    lie: tuple[str, str, str] = ("", "", "")
    after: tuple[tuple[str, ...], ...] = ()
    ends: tuple[str, ...] = NAMES

    @property
    def changes(self) -> bool:
        return bool(self.after)


MIDDLE = ("commit", "{target}", "vda", "--top", "[3]")
ALL = ("commit", "{target}", "vda")
READY = ("commit", "{target}", "vda", "--wait-ready")
MERGED, PIVOTED = ("base.raw", "c.qcow2"), ("base.raw",)

SCENES = [
    Scene("disks", ("disks", "{target}")),
    Scene("chain", ("chain", "{target}", "vda")),
    Scene("doctor", ("doctor", "{target}")),
    Scene("graph", ("graph", "{target}", "vda")),
    Scene("jobs", ("jobs", "{target}")),
    Scene("dry-run", ("commit", "{target}", "vda", "--dry-run")),
    Scene(
        "snapshot",
        ("snapshot", "{target}", "vda={folder}/d.qcow2"),
        {"created": (*NAMES, "d.qcow2")},
        after=(("snapshot", "{target}", "vda={folder}/e.qcow2"),),
        ends=(),
    ),
    Scene("middle", MIDDLE, {"merged": MERGED}, after=(MIDDLE,), ends=MERGED),
    Scene("active", ALL, {"pivoted": PIVOTED}, after=(ALL,), ends=PIVOTED),
    Scene("resume", ALL, {"pivoted": PIVOTED}, before=READY, after=(ALL,), ends=PIVOTED),
    Scene(
        "pivot",
        ("job", "{target}", "qmpmerge-commit-vda", "pivot"),
        {"pivoted": PIVOTED},
        before=READY,
        after=(ALL,),
        ends=PIVOTED,
    ),
    Scene(
        "cancel",
        ("job", "{target}", "qmpmerge-commit-vda", "cancel"),
        {"done": NAMES},
        before=READY,
        after=(ALL,),
        ends=PIVOTED,
    ),
]
SCENES += [
    Scene(
        "keep",
        ("job", "{target}", "qmpmerge-commit-vda", "keep"),
        {"kept": NAMES},
        before=READY,
        after=(ALL,),
        ends=PIVOTED,
    ),
    Scene(
        "settle",
        MIDDLE,
        {"merged": MERGED},
        before=MIDDLE,
        lie=("generic-error", "query-jobs", "job-finalize"),
        after=(MIDDLE,),
        ends=MERGED,
    ),
    Scene(
        "recover",
        ("recover", "{folder}"),
        {"done": MERGED},
        before=MIDDLE,
        lie=("generic-error", "query-jobs", "job-finalize"),
        after=(MIDDLE,),
        ends=MERGED,
    ),
    Scene(
        "recover-pivot",
        ("recover", "{folder}"),
        {"done": PIVOTED},
        before=ALL,
        lie=("generic-error", "query-jobs", "job-complete"),
        after=(ALL,),
        ends=PIVOTED,
    ),
]
LOOKING = [scene for scene in SCENES if not scene.changes]
CHANGING = [scene for scene in SCENES if scene.changes]


@dataclass
class Stock:
    """Images to copy, with what they show."""

    folder: Path
    content: Content

    @classmethod
    def make(cls, folder: Path) -> "Stock":
        folder.mkdir(parents=True, exist_ok=True)
        content = Content()
        fill(make_chain(folder, NAMES), content)
        (folder / "firmware").write_bytes(FIRMWARE)
        return cls(folder, content)


@contextlib.contextmanager
def staged(stock: Stock, place: Path, *, runs: bool, known: bool) -> Iterator["Stage"]:
    """
    A QEMU with a copy of the images; its guest `runs` or stands still, and its pid is `known` to who talks to the liar.
    """
    folder = place / "vm"
    folder.mkdir(parents=True)
    (place / OUTSIDE).write_text("not ours")
    for name in NAMES:
        shutil.copyfile(stock.folder / name, folder / name)
    disk = ["-drive", f"file={folder}/{NAMES[-1]},format=qcow2,if=none,id=vda", *device("vda")]
    with machine(place, "-bios", str(stock.folder / "firmware"), *disk) as vm:
        if runs:
            vm.session.execute("cont")
        setup = Setup(vm, "vda", stock.content, lambda command: vm.io("vda", command))
        with behind(vm) if known else liar.own(place) as (path, listener):
            yield Stage(vm, setup, folder, path, listener)


@dataclass
class Stage:
    """Where conversations take place: `path` is the liar's monitor, `folder` that of the images."""

    vm: Machine
    setup: Setup
    folder: Path
    path: str
    listener: Any

    def converse(
        self, scene: Scene, lie: str = "", at: int = 0, seed: int = 0, of: str = "", since: str = ""
    ) -> "Told":
        """Have the scene's command talk to a liar."""
        if scene.before:
            first = Liar(self.vm.target, LIES.get(scene.lie[0]), 1, 0, *scene.lie[1:])
            with liar.lying(first, self.listener):
                done = self.run(scene.before, as_json=True)
            assert done.code == (6 if first.lie else 0) and bool(first.lied) == bool(first.lie), done
        began, liar_ = self.chain, Liar(self.vm.target, LIES.get(lie), at, seed, of, since)
        as_json, is_verbose = random.Random(seed).random() < 0.5, seed % 5 == 0
        words = (*scene.words, *(["-v"] if is_verbose else []))
        with liar.lying(liar_, self.listener):
            done = self.run(words, as_json=as_json, is_hasty=lie in SILENT)
        return Told(scene, lie, liar_, done, as_json, began)

    def plainly(self, words: tuple[str, ...]) -> Run:
        """The command, with nobody who lies."""
        with liar.lying(Liar(self.vm.target), self.listener):
            return self.run(words, as_json=True)

    def run(self, words: tuple[str, ...], *, as_json: bool, is_hasty: bool = False) -> Run:
        filled = [word.format(target=self.path, folder=self.folder) for word in words]
        line = [*filled, *(["--json"] if as_json else [])]
        run = scripted(hasty.__file__, *line) if is_hasty else attempt(*line, seconds=200)
        return held(run) if as_json and run.code in GOOD else run

    # --- what QEMU has now ----------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        return str(self.vm.session.execute("query-status")["status"])

    @property
    def chain(self) -> tuple[str, ...]:
        """The names under the device, base first; those of files that were put aside like those that they had."""
        (disk,) = self.vm.session.execute("query-block")
        image, names = disk["inserted"]["image"], []
        while image is not None:
            names.append(re.findall(r"[^/\"]+\.(?:raw|qcow2)", image["filename"])[-1])
            image = image.get("backing-image")
        return tuple(reversed(names))

    @property
    def jobs(self) -> list[Any]:
        jobs: list[Any] = self.vm.session.execute("query-jobs")
        return jobs

    def inodes(self) -> set[int]:
        return {os.stat(file).st_ino for file in self.folder.iterdir() if not file.name.startswith(".")}

    def records(self) -> list[str]:
        return [file.name for file in self.folder.iterdir() if file.name.endswith(".qmpmerge-record")]

    def outside(self) -> dict[str, bytes | None]:
        """What lies around the folder."""
        return {
            str(path.relative_to(self.folder.parent)): path.read_bytes() if path.name == OUTSIDE else None
            for path in self.folder.parent.rglob("*")
            if self.folder not in (path, *path.parents)
        }


@dataclass
class Told:
    """One conversation: what was said to the command, what it made of it, and the chain at its beginning."""

    scene: Scene
    lie: str
    liar: Liar
    run: Run
    as_json: bool
    began: tuple[str, ...]

    def __str__(self) -> str:
        where = self.liar.of or [*self.liar.told, "nothing"][min(self.liar.at, len(self.liar.told) + 1) - 1]
        what = f"{self.scene.name}: {self.lie} in message {self.liar.at} ({where}), seed {self.liar.seed}"
        return f"{what}: exit code {self.run.code}"

    @property
    def error(self) -> Any:
        """What was wrong, as JSON tells it."""
        return self.run.document["error"]

    @property
    def verdict(self) -> str:
        """By its exit code where it is none of several."""
        if self.as_json:
            return str(json.loads(self.run.out).get("verdict")) if self.run.out.count("\n") == 1 else "none"
        return {code: name for name, code in EXIT_CODES.items() if code}.get(self.run.code, "")


# --- what must hold ----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What was wrong after a conversation, by kinds."""

    tracebacks: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    paused: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        for kind, wrong in vars(other).items():
            vars(self)[kind].extend(wrong)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def lines(self) -> list[str]:
        return [f"{kind}: {line}" for kind, wrong in vars(self).items() for line in wrong]


def judged(
    stage: Stage, scene: Scene, lie: str = "", at: int = 0, seed: int = 0, of: str = "", since: str = ""
) -> tuple[Told, Found]:
    """Have one conversation, and look at everything."""
    status, files, around = stage.status, stage.inodes(), stage.outside()
    told, found = stage.converse(scene, lie, at, seed, of, since), Found()
    _words(told, found)
    if stage.status != status:
        found.paused.append(f"{told}: the guest was {status} and is {stage.status}")
    if scene.changes:
        _end(stage, told, found)
    _reading(stage, told, found)
    if missing := files - stage.inodes():
        found.lost.append(f"{told}: {len(missing)} files")
    if stage.outside() != around:
        found.outside.append(f"{told}: {stage.outside().keys() ^ around.keys()}")
    return told, found


def _words(told: Told, found: Found) -> None:
    run = told.run
    if "Traceback" in run.err or "never retrieved" in run.err or run.code not in GOOD:
        found.tracebacks.append(f"{told}: {run.err[-600:]}")
        return
    odd = [letter for letter in run.out + run.err if not letter.isprintable() and letter != "\n"]
    if odd:
        found.verdicts.append(f"{told}: {odd} on the terminal")
    if told.as_json:
        if EXIT_CODES.get(told.verdict, run.code) != run.code or told.verdict == "none":
            found.verdicts.append(f"{told}: {told.verdict}: {run.out[:300]} {run.err[:300]}")
    elif run.code and not run.err.strip():
        found.verdicts.append(f"{told}: not a word")


def _end(stage: Stage, told: Told, found: Found) -> None:
    """What was said must be so; and the commands that are meant for it bring all to an end."""
    scene, began, chain, jobs = told.scene, told.began, stage.chain, stage.jobs
    done = [job for job in jobs if job["status"] not in ("concluded", "null")]
    if told.run.code == 0:
        wanted = next(iter(scene.verdicts.values()))
        if chain != wanted or jobs:
            found.verdicts.append(f"{told}: {told.run.out[:200]}, and QEMU has {chain}, {jobs}")
    elif told.verdict in ("refused", "unreachable") and (chain != began or (done and not scene.before)):
        found.verdicts.append(f"{told}: {told.verdict}, and QEMU has {chain}, {jobs}: {told.run.err[-300:]}")
    elif told.verdict in ("failed", "cancelled") and (chain != began or done):
        found.verdicts.append(f"{told}: {told.verdict}, and QEMU has {chain}, {jobs}")
    said = []
    for words in scene.after:
        done_ = stage.plainly(words)
        said.append(f"{words[0]}: {done_.code} {done_.out[:700]} {done_.err[-300:]}")
        if done_.code not in (0, 3) or (done_.code == 3 and chain != scene.ends):
            found.left.append(f"{told}: {told.run.out[:300]}{told.run.err[-300:]} then {said}")
    if (scene.ends and stage.chain != scene.ends) or stage.jobs or stage.records():
        found.left.append(f"{told}: {stage.chain}, {stage.jobs}, {stage.records()} after {said}")
    nodes = [node["node-name"] for node in stage.vm.session.execute("query-named-block-nodes", flat=True)]
    if "qmpmerge-flush" in nodes:
        found.left.append(f"{told}: a flush's node")


def _reading(stage: Stage, told: Told, found: Found) -> None:
    try:
        stage.setup.check()
    except AssertionError as error:
        found.data.append(f"{told}: {error}")


# --- chosen by a seed --------------------------------------------------------------------------------------------------


Choice = tuple[str, int]
"""A lie and the message that it is about."""


def choose(told: list[str], number: int) -> Choice:
    """Of a conversation whose messages were these; each kind of message is as likely, and each lie."""
    chance = random.Random(number)
    lie = chance.choice(list(LIES))
    kind = chance.choice(sorted(set(told)))
    return lie, chance.choice([at for at, command in enumerate(told, 1) if command == kind])
