"""
A model of how 0.1 dealt with images, files as dicts: what the oracle of `rounds` must catch. And the same as it is now, which
it must not: it shows holes of a design before anything is built.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from rig.rounds import Data

BASE = "base.raw"


@dataclass
class File:
    """An image: what it holds itself, and the name in its header. `is_merged`: a note or a mark tells so."""

    held: Data = field(default_factory=dict)
    below: str | None = None
    is_merged: bool = False


class Old:
    """Version 0.1."""

    def __init__(self, launch: str = BASE) -> None:
        self.launch = launch
        self.files: dict[str, File] = {BASE: File()}
        if launch != BASE:
            self.files[launch] = File(below=BASE)
        self.running: list[File] = []
        self.boot(launch)

    # --- the VM ---------------------------------------------------------------------------------------------------

    def boot(self, image: str) -> bool:
        self.running = []
        chain = self._chain(image)
        self.running = chain or []
        return chain is not None

    def is_running(self) -> bool:
        return bool(self.running)

    def read(self) -> Data:
        return shown(self.running)

    def write(self, block: int, pattern: int) -> None:
        self.running[-1].held[block] = pattern

    # --- what the tool does ---------------------------------------------------------------------------------------

    def snapshot(self, name: str) -> None:
        if name not in self.files:
            self.files[name] = File(below=self._name(self.running[-1]))
            self.running.append(self.files[name])

    def merge(self, number: int, policy: str) -> bool:
        depth = len(self.running)
        if depth < 2:
            return True
        ranges = list(itertools.combinations(range(depth), 2))
        base, top = (0, depth - 1) if number == -1 else ranges[number % len(ranges)]
        if list(self._dependents(self.running[base : top + 1])):
            return False
        merged = self.running[base + 1 : top + 1]
        self.running[base].held |= shown(merged)
        del self.running[base + 1 : top + 1]
        if top < depth - 1:
            self.running[base + 1].below = self._name(self.running[base])
        for file in merged:
            self._put_aside(file, policy, is_launch=file is merged[-1] and top == depth - 1)
        return True

    def _put_aside(self, file: File, policy: str, *, is_launch: bool) -> None:
        name = self._name(file)
        file.is_merged = True
        if policy != "keep":
            del self.files[name]
        if policy in ("stash", "relink"):
            self.files[next(free for free in stashes(name) if free not in self.files)] = file
        if policy == "relink" and is_launch:
            self.files[name] = File(below=self._name(self.running[-1]))

    def clean(self) -> None:
        for name in [name for name in self.files if name.endswith(".merged")]:
            if not any(file.below == name for file in self.files.values()) and self.files[name] not in self.running:
                del self.files[name]

    def active(self) -> str | None:
        """Nobody says: it is what the script names."""
        return self.launch

    def kill(self, number: int) -> None:
        self.running = []

    def recover(self) -> None:
        pass

    def advice(self) -> bool:
        """``mv NAME NAME.merged`` for whatever is built on the chain and not in it."""
        for file in list(self._dependents(self.running)):
            name = self._name(file)
            self.files[f"{name}.merged"] = self.files.pop(name)
        return False

    # --- looks ----------------------------------------------------------------------------------------------------

    def views(self) -> dict[str, Data]:
        names = [name for name in self.files if not name.endswith(".merged")]
        return {name: shown(chain) for name in names if (chain := self._chain(name)) is not None}

    def is_passed_over(self, name: str, file: File) -> bool:
        """0.1 knew its stashed files by their names, and not the second one, nor what its own advice made of that."""
        return name.endswith(".merged") and name.count(".merged") == 1

    def _dependents(self, images: list[File]) -> Iterator[File]:
        names = {self._name(image) for image in images}
        for name, file in self.files.items():
            if (
                file.below in names
                and all(file is not one for one in self.running)
                and not self.is_passed_over(name, file)
            ):
                yield file

    def _name(self, file: File) -> str:
        return next(name for name, one in self.files.items() if one is file)

    def _chain(self, image: str) -> list[File] | None:
        chain: list[File] = []
        name: str | None = image
        while name is not None:
            if name not in self.files:
                return None
            chain.insert(0, self.files[name])
            name = self.files[name].below
        return chain


class New(Old):
    """As it is now."""

    def active(self) -> str | None:
        name = BASE
        while True:
            above = [
                one for one, file in self.files.items() if file.below == name and not self.is_passed_over(one, file)
            ]
            if len(above) != 1:
                return name if not above else None
            (name,) = above

    def is_passed_over(self, name: str, file: File) -> bool:
        return file.is_merged

    def _dependents(self, images: list[File]) -> Iterator[File]:
        """What is kept counts until it is out of reach."""
        names = {self._name(image) for image in images}
        for name, file in self.files.items():
            if file.below in names and all(file is not one for one in self.running) and ".merged" not in name:
                yield file

    def advice(self) -> bool:
        """What is proved to be merged goes out of reach, and what holds nothing goes; the rest is told."""
        is_harm = False
        for file in list(self._dependents(self.running)):
            name = self._name(file)
            if not file.held and not file.is_merged and all(other.below != name for other in self.files.values()):
                del self.files[name]
                continue
            if file.is_merged:
                self.files[f"stale/{name}.merged"] = self.files.pop(name)
                file.below = "nothing"
            is_harm |= not file.is_merged and file.below == self._name(self.running[-1])
        return is_harm

    def clean(self) -> None:
        for name in [name for name, file in self.files.items() if ".merged" in name and file.is_merged]:
            del self.files[name]


def shown(chain: list[File]) -> Data:
    """What an image shows whose chain this is."""
    return {block: pattern for file in chain for block, pattern in file.held.items()}


def stashes(name: str) -> Iterator[str]:
    yield f"{name}.merged"
    yield from (f"{name}.merged.{number}" for number in itertools.count(2))
