"""What a disk must show, of any size: patterns where they were written, zeros elsewhere."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qmpmerge.testing.programs import run
from qmpmerge.testing.stored import extents

MIB = 1024 * 1024
SIZE = 8 * MIB
BLOCK = 512

Run = tuple[int, int, int]
"""Pattern, offset, length; as many bytes of this value."""


class Content:
    """What the guest must see: written here and there alike, compared byte by byte. It begins with `size` zeros."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self._runs: list[Run] = []

    def put(self, pattern: int, offset: int, length: int) -> str:
        """Note a write, and return it as a qemu-io command."""
        end = offset + length
        assert 0 <= offset <= end <= self.size, f"{offset} to {end} is not within {self.size}"
        kept = [
            (old, max(start, low), min(start + count, high) - max(start, low))
            for old, start, count in self._runs
            for low, high in ((0, offset), (end, self.size))
            if max(start, low) < min(start + count, high)
        ]
        self._runs = sorted([*kept, (pattern, offset, length)], key=lambda run: run[1])
        return f"write -P {pattern} {offset} {length}"

    def resize(self, size: int) -> None:
        """Be a disk of this size: what was written behind its end is gone."""
        self._runs = [(pattern, at, min(length, size - at)) for pattern, at, length in self._runs if at < size]
        self.size = size

    def written(self) -> list[Run]:
        """All that was written and is still seen, in order."""
        return list(self._runs)

    def runs(self) -> Iterator[Run]:
        """The same, with zeros where nothing was written, up to the end of the disk."""
        place = 0
        for pattern, offset, length in self._runs:
            if offset > place:
                yield 0, place, offset - place
            yield pattern, offset, length
            place = offset + length
        if place < self.size:
            yield 0, place, self.size - place

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there."""
        data = bytearray(length)
        for pattern, start, count in self._runs:
            low, high = max(start, offset), min(start + count, offset + length)
            if low < high:
                data[low - offset : high - offset] = bytes([pattern]) * (high - low)
        return bytes(data)

    @property
    def data(self) -> bytes:
        """All bytes."""
        return self.read(0, self.size)

    def copy(self) -> "Content":
        """One of its own that begins with this one's writes."""
        content = Content(self.size)
        content.take(self)
        return content

    def take(self, other: "Content") -> None:
        """Be what that one is now."""
        self.size, self._runs = other.size, other.written()

    def check(self, image: Path | str, form: str | None = None) -> None:
        """
        See that the image, sound in itself, shows this to a guest. It must not be in use; `form` is its format where the name
        does not end with it. Raises AssertionError that says where it differs.
        """
        if not str(image).endswith("raw"):
            run("qemu-img", "check", "-q", image)
        with view(image, form) as shown:
            assert shown.stat().st_size == self.size, f"{image} has {shown.stat().st_size} bytes instead of {self.size}"
            differing = self.differing(shown)
        assert not differing, f"{image} differs at {differing[:5]} and {len(differing)} blocks in all"

    def differing(self, shown: Path) -> list[int]:
        """Where a raw file differs, by the offsets of its blocks of 512 bytes; holes are zeros, and cost nothing."""
        found: set[int] = set()
        with open(shown, "rb", buffering=0) as file:
            places = [(start, end) for start, end in extents(file.fileno(), shown.stat().st_size)]
            places += [(offset, offset + length) for _, offset, length in self._runs]
            for start, end in places:
                for at in range(start - start % BLOCK, end, MIB):
                    length = min(MIB, self.size - at)
                    seen, expected = os.pread(file.fileno(), length, at), self.read(at, length)
                    if seen != expected:
                        found |= {
                            at + n for n in range(0, length, BLOCK) if seen[n : n + BLOCK] != expected[n : n + BLOCK]
                        }
        return sorted(found)


@contextlib.contextmanager
def view(image: Path | str, form: str | None = None) -> Iterator[Path]:
    """What an image, with all that is below it, shows to a guest, as a sparse raw file beside it while the block runs."""
    form = form or str(image).rpartition(".")[2]
    with tempfile.TemporaryDirectory(dir=Path(image).parent, prefix="view-") as folder:
        shown = Path(folder) / "view.raw"
        run("qemu-img", "convert", "-f", form, "-O", "raw", image, shown)
        yield shown
