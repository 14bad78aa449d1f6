"""
Years of nightly snapshots, weekly merges, reboots and crashes, played in rounds, and the oracle that watches them.

A `World` has the images and the VM: a real one, or a model. `Game` plays rounds in it and says what went wrong:

    lost        no image shows what the guest was told to be written
    stale       a start from the launch path showed older data, and nobody who was asked before had said so
    unproved    the doctor's advice took the name of an image away that was neither merged nor empty
    stuck       no image to start from, or no merge, whatever is recovered and whatever advice is carried out
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

BLOCKS = 8
POLICIES = ("stash", "delete", "keep")
NAMES = ("snap.qcow2", "night.qcow2", "far/night.qcow2")
KINDS = (
    "snapshot",
    "write",
    "write",
    "merge",
    "merge",
    "clean",
    "by launch path",
    "by active",
    "kill",
    "recover",
    "advice",
)

Data = dict[int, int]
"""What a disk shows: a pattern for each block that was ever written."""


@dataclass(frozen=True)
class Round:
    """One thing that happens. `number` chooses among what is possible then: a name, a range, a block, a moment."""

    kind: str
    number: int = 0
    policy: str = "stash"


class World(Protocol):
    """Images, and a VM on them. What is refused changes nothing."""

    launch: str

    def snapshot(self, name: str) -> None:
        """Put an overlay of this name on top."""

    def write(self, block: int, pattern: int) -> None:
        """The guest writes, flushes, and is told that it is done."""

    def read(self) -> Data:
        """What the guest sees."""
        ...

    def merge(self, number: int, policy: str) -> bool:
        """Merge a range, the whole chain with -1; whether that was not refused."""
        ...

    def clean(self) -> None:
        """Remove what was stashed."""

    def boot(self, image: str) -> bool:
        """End the VM and start it from this image; whether it starts."""
        ...

    def active(self) -> str | None:
        """The image that one is told to start from; None for a loud no."""
        ...

    def kill(self, number: int) -> None:
        """Kill the VM, or a merge or a snapshot at some moment with or without it; the VM may be gone then."""

    def recover(self) -> None:
        """Put right what a crash has left."""

    def advice(self) -> bool:
        """Carry out what the doctor advises; whether it spoke of harm."""
        ...

    def views(self) -> dict[str, Data]:
        """What each image shows that can be opened and that no merge has put aside, by its name."""
        ...

    def is_running(self) -> bool:
        """Whether the VM is."""
        ...


@dataclass
class Game:
    """Plays rounds; `faults` are what went wrong, `counts` how often each kind was played."""

    world: World
    acknowledged: Data = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    _writes: int = 0
    _is_excused: bool = False
    """Whether something lies about that may rightly be in the way of a merge."""

    def play(self, rounds: Sequence[Round]) -> list[str]:
        """All of them, and then the question whether it can go on; returns the faults."""
        for number, one in enumerate(rounds):
            self.counts[one.kind] = self.counts.get(one.kind, 0) + 1
            self._one(one)
            if "lost" not in self.faults and not self._is_shown():
                self._fault("lost")
            if self.faults:
                self.faults.append(f"in round {number}: {one}")
                return self.faults
        self._can_go_on()
        return self.faults

    def _one(self, one: Round) -> None:
        world = self.world
        if not world.is_running() and one.kind not in ("clean", "recover", "by launch path"):
            self._by_active()
        match one.kind:
            case "snapshot":
                world.snapshot(NAMES[one.number % len(NAMES)])
            case "write":
                self._write(one.number)
            case "merge":
                self._merge(one)
            case "clean":
                world.clean()
            case "by launch path":
                self._by_launch_path()
            case "by active":
                self._by_active()
            case "kill":
                world.kill(one.number)
                self._is_excused = True
            case "recover":
                world.recover()
            case _:
                self._advice()
                self._is_excused = False

    def _write(self, number: int) -> None:
        self._writes += 1
        block, pattern = number % BLOCKS, self._writes % 255 + 1
        self.world.write(block, pattern)
        self.acknowledged[block] = pattern

    def _merge(self, one: Round) -> None:
        if not self.world.merge(one.number, one.policy) and not self._is_excused:
            self._fault("stuck: a merge was refused")
        self._is_excused |= one.policy == "keep"

    def _by_launch_path(self) -> None:
        """A script that never changes. What it starts stale writes nothing: we look at what is said of it."""
        world = self.world
        is_told = world.active() != world.launch
        if not world.boot(world.launch):
            self._by_active()
        elif world.read() != self.acknowledged:
            if not is_told:
                self._fault("stale")
            if not self._advice():
                self._fault("stale: no harm, says the doctor")
            world.clean()
            if not self.faults:
                self._by_active()

    def _by_active(self) -> None:
        world = self.world
        image = world.active()
        for _ in range(2):
            if image is None:
                world.recover()
                self._advice()
                image = world.active()
        if image is None or not world.boot(image):
            self._fault(f"stuck: no start from {image}")
        elif world.read() != self.acknowledged:
            self._fault(f"lost: {image} shows {world.read()} instead of {self.acknowledged}")

    def _advice(self) -> bool:
        before = self.world.views()
        is_harm = self.world.advice()
        after = self.world.views()
        gone = [name for name in before if name not in after]
        for name in gone:
            if before[name] == self.acknowledged and before[name] not in after.values():
                self._fault(f"unproved: {name}")
        return is_harm

    def _is_shown(self) -> bool:
        return self.acknowledged in self.world.views().values()

    def _can_go_on(self) -> None:
        """Whatever happened, a user who follows the advice comes to one image with all that was written."""
        self.world.recover()
        if not self.world.is_running():
            self._by_active()
        for _ in range(3):
            if self.faults or self.world.merge(-1, "stash"):
                break
            self._advice()
            self.world.clean()
        else:
            self._fault("stuck: no merge")
        if not self.faults:
            self._by_active()

    def _fault(self, what: str) -> None:
        self.faults.append(what)


def draw(random: random.Random, count: int) -> list[Round]:
    """So many rounds."""
    return [Round(random.choice(KINDS), random.randrange(1 << 16), random.choice(POLICIES)) for _ in range(count)]
