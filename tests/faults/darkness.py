"""
The power goes around a pivot, with all that lies in the folder: names and their order, contents, times, our own record.

A guest that heeds pauses writes before the pivot and after it. Then each state that a power cut may leave is laid out in the
same files, so that inodes tell what they told, and `recover` is asked. What no flush has covered may be missing: any of the
data, the last of the names (a journal keeps their order), and times, which only fsync keeps.
"""

import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rig.disks import BACKEND, device, nodes
from rig.machines import Session, machine

from faults import cuts, oracle
from faults.gate import Gate
from faults.log import Log, Operation
from faults.oracle import Judgement
from faults.stage import Case, Guest, Played, Story, command, ended
from faults.sweeps import Bench, Point, Sweep
from qmpmerge.images.stashed import STASHED

NAMES = ("create", "rename", "link", "unlink")
BEFORE = 12
"""Operations before the active image loses its name, from which on cuts are looked at."""

MOST = 300
BOOT = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
OTHER = b"0" * len(BOOT)
"""After a power cut the machine has been started again."""


class HeedfulGuest(Guest):
    """Writes while the machine runs, but not from when the job is ready to when the machine goes on after its pause."""

    def __init__(self, session: Session, node: str, log: Log) -> None:
        super().__init__(session, node, log)

    def _io(self, command: str) -> None:
        while self._is_to_rest():
            time.sleep(0.001)
            self._session.execute("query-status")
        super()._io(command)

    def _is_to_rest(self) -> bool:
        names = [event["event"] for event in self._session.events]
        ready = names.index("BLOCK_JOB_READY") if "BLOCK_JOB_READY" in names else None
        return ready is not None and "RESUME" not in names[ready:] and not self._ended.is_set()


@dataclass(frozen=True)
class State:
    """
    The first `length` operations, without the data of the numbers `missing` and without the names of those from `names` on
    (all from 0); with `old_times` what no fsync has covered has kept its older time.
    """

    length: int
    missing: frozenset[int]
    names: int
    old_times: bool

    def __str__(self) -> str:
        told = ", ".join(str(number + 1) for number in sorted(self.missing)) or "none missing"
        return f"cut after {self.length}, names up to {self.names}, without {told}{', old times' * self.old_times}"


@dataclass
class File:
    """A file as it lies on the disk: `changed` is its time, `kept` the one that is durable."""

    data: bytearray
    changed: int = 0
    kept: int = 0


def sweep(bench: Bench, story: Story, _doer: str) -> Sweep:
    """One merge, and all that a power cut may leave of it."""
    with bench.case() as case:
        start = Start(case)
        played, operations = play(case, story)
        found = Sweep(story, "qmpmerge")
        everything = list(states(operations, random.Random(bench.seed)))
        some = bench.some(sorted(random.Random(bench.seed).sample(everything, min(MOST, len(everything))), key=str))
        for state in some:
            start.lay(operations, state)
            found.points.append(Point(str(state), played, judge(case, played, state)))
    return found


def play(case: Case, story: Story) -> tuple[Played, list[Operation]]:
    """The merge under a machine that runs, with everything in one log."""
    played = Played(story, "qmpmerge")
    with (
        Gate(case.images, case.log) as gate,
        machine(case.folder, *nodes(case.paths), *device("top"), before=gate.before()) as vm,
    ):
        vm.session.execute("cont")
        case.log.arm(None)
        with HeedfulGuest(vm.session, BACKEND, case.log) as guest:
            while not played.verdict or is_refused_for_the_gate(played):
                played.verdict = ""
                ended(command(case, vm.target, story, before=gate.before("names")), played)
            played.count_at_end = case.log.count
        played.acknowledged, played.begun = guest.acknowledged, guest.begun
        operations = list(case.log.operations)
        vm.stop()
    assert played.verdict == "pivoted", played
    return played, operations


def is_refused_for_the_gate(played: Played) -> bool:
    """Whether the gate, which borrows a descriptor for each write of the guest, was taken for a user of the image."""
    return played.verdict == "refused: in-use" and f"(pid {os.getpid()})" in str(played.document)


def states(operations: Sequence[Operation], chance: random.Random) -> Iterator[State]:
    """Right before each flush and at the end, where most is at stake, from shortly before the active image loses its name."""
    stashing = next(number for number, one in enumerate(operations) if one.target.endswith(f"top.qcow2{STASHED}"))
    for length in range(max(0, stashing - BEFORE), len(operations) + 1):
        if length < len(operations) and operations[length].kind != "flush":
            continue
        pending = cuts.unflushed(operations[:length])
        synced = max((number for number in range(length) if is_sync_of_names(operations[number])), default=-1)
        names = [number for number in range(synced + 1, length) if operations[number].kind in NAMES]
        for cutoff in (*names, length):
            for missing in {
                frozenset[int](),
                frozenset(pending),
                frozenset(n for n in pending if chance.random() < 0.5),
            }:
                for old_times in (False, True):
                    yield State(length, missing, cutoff, old_times)


def is_sync_of_names(operation: Operation) -> bool:
    return operation.kind == "flush" and not operation.file and not operation.failed


class Start:
    """The images as they lay there before the merge, and the same files whatever names they have by now."""

    def __init__(self, case: Case) -> None:
        self._images = case.images
        self._kept = case.folder / "kept"
        self._kept.mkdir()
        for path in case.paths:
            os.link(path, self._kept / path.name)
        self._first = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in case.paths}

    def lay(self, operations: Sequence[Operation], state: State) -> None:
        """Have the folder as it is after a cut."""
        shutil.rmtree(self._images)
        self._images.mkdir()
        for name, (identity, file) in self._after(operations, state).items():
            place = self._images / name
            if identity in self._first:
                os.link(self._kept / identity, place)
            place.write_bytes(file.data.replace(BOOT, OTHER))
            changed = file.kept if state.old_times else file.changed
            os.utime(place, ns=(changed, changed))

    def _after(self, operations: Sequence[Operation], state: State) -> dict[str, tuple[str, File]]:
        """What lies there, by name: which file it is, and how it looks."""
        files = {name: File(bytearray(data), changed, changed) for name, (data, changed) in self._first.items()}
        live = {name: name for name in files}
        disk = dict(live)
        for number, operation in enumerate(operations[: state.length]):
            if operation.failed:
                continue
            if operation.kind in NAMES:
                files[f"new {number}"] = File(bytearray())
                rename(live, operation, number)
                if number < state.names:
                    rename(disk, operation, number)
                continue
            file = files.get(identity_of(live, operation.file))
            if file is None:
                continue
            if number not in state.missing:
                cuts.change(file.data, operation)
                file.changed = operation.changed or file.changed
            if operation.kind == "flush" and operation.full:
                file.kept = file.changed
        return {name: (identity, files[identity]) for name, identity in disk.items()}


def rename(names: dict[str, str], operation: Operation, number: int) -> None:
    """Have these names after the operation; one that has no such file is as it was."""
    match operation.kind:
        case "create":
            names[operation.file] = f"new {number}"
        case "rename" if operation.file in names:
            names[operation.target] = names.pop(operation.file)
        case "link" if operation.file in names:
            names[operation.target] = names[operation.file]
        case "unlink":
            names.pop(operation.file, None)
        case _:
            pass


def identity_of(live: dict[str, str], name: str) -> str:
    """Which file it is; the log calls a stashed one by its old name."""
    return live.get(name) or live.get(f"{name}{STASHED}") or ""


def judge(case: Case, played: Played, state: State) -> Judgement:
    """A start by the old name shows all or fails; then `recover` is asked, and what it names shows all."""
    found = Judgement()
    top, base = case.paths[-1], case.paths[0]
    if top.exists() and (lost := oracle.losses_of(case, played, top, state.length, found)):
        found.stale = True
        found.wrong.append(f"a start by the old name shows {lost} blocks wrong")
    candidates = oracle.right_by_recover(case, found) or [top if top.exists() else base]
    lost_by = [oracle.losses_of(case, played, Path(image), state.length, found) for image in candidates]
    if 0 not in lost_by:
        found.lost = max(lost_by[0], 0)
        found.wrong.append(f"{lost_by[0]} blocks wrong in {candidates[0].name}")
    return found
