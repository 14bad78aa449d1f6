"""Chains with a mutilated image among them, and what no command may do to them and to what lies about them."""

import hashlib
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qmpmerge.cli.commands.group import FILES
from rig import nasty
from rig.command import Run, attempt, complaints
from rig.machines import MIB, make_chain, run

IMAGES = ("a.qcow2", "c.qcow2")
FIELDS = [(4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8)]
FIELDS += [(72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 4)]
"""Of a qcow2 header: offset and length (docs/interop/qcow2.txt in QEMU's source)."""
VALUES = [
    0,
    1,
    2,
    9,
    16,
    31,
    32,
    64,
    104,
    112,
    4095,
    1 << 16,
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
]
NAME_AT = 8192
"""A place in the first cluster that QEMU leaves free."""
LOOKING = [["doctor", "."], ["doctor", "c.qcow2"], ["chain", "c.qcow2"], ["commit", "c.qcow2", "--dry-run"]]
LOOKING += [["recover", ".", "--dry-run"], ["clean", ".", "--dry-run"], ["disks", "a.qcow2"]]
LOOKING += [["active", "c.qcow2"]] if "active" in FILES else []

Mutation = Callable[[random.Random, bytearray], None]


def a_field(chance: random.Random, data: bytearray) -> None:
    offset, length = chance.choice(FIELDS)
    value = chance.choice([*VALUES, chance.getrandbits(64)]) % (1 << 8 * length)
    data[offset : offset + length] = value.to_bytes(length, "big")


def some_bits(chance: random.Random, data: bytearray) -> None:
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(chance.choice([112, 512, len(data)]))] ^= 1 << chance.randrange(8)


def a_name(chance: random.Random, data: bytearray) -> None:
    name = chance.choice(nasty.NAMES)[:1023]
    data[NAME_AT : NAME_AT + len(name)] = name
    data[8:20] = struct.pack(">QI", NAME_AT, len(name))


def an_extension(chance: random.Random, data: bytearray) -> None:
    """A backing format, the name of a data file, or something else, which may be as long as it is or not."""
    name = chance.choice([b"raw", b"qcow2", b"luks", *nasty.NAMES])[:4000]
    kind = chance.choice(
        [0xE2792ACA, 0xE2792ACA, 0x44415441, 0x6803F857, 0x23852875, 0x0537BE77, chance.getrandbits(32)]
    )
    if kind == 0x44415441:
        data[79] |= 4  # an external data file
    length = chance.choice([len(name), len(name), chance.getrandbits(32)])
    start = int.from_bytes(data[100:104], "big")
    if start + 8 + len(name) < len(data):
        data[start : start + 8 + len(name)] = struct.pack(">II", kind, length) + name


def a_cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.choice([0, 3, 71, 72, 103, 104, 111, 512, chance.randrange(len(data))]) :]


def other_bytes(chance: random.Random, data: bytearray) -> None:
    start = chance.randrange(len(data))
    data[start : start + 64] = chance.randbytes(len(data[start : start + 64]))


MUTATIONS: list[Mutation] = [
    a_field,
    a_field,
    some_bits,
    a_name,
    a_name,
    an_extension,
    an_extension,
    a_cut,
    other_bytes,
]


def make_stock(folder: Path) -> Path:
    """A chain with data in each image; beside its folder another one, which is none of its business."""
    (folder / "vm").mkdir(parents=True)
    (folder / "outside").mkdir()
    for number, image in enumerate(make_chain(folder / "vm", ("base.raw", *IMAGES), MIB), 1):
        form = image.suffix[1:]
        run("qemu-io", "-f", form, "-c", f"write -P {number} {number * 128}k 192k", image)
    (folder / "outside" / "precious.raw").write_bytes(b"\xee" * MIB)
    os.chmod(folder / "outside" / "precious.raw", 0o600)
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "outside" / "precious.qcow2", "1M")
    os.mkfifo(folder / "vm" / "fifo")
    (folder / "vm" / "folder").mkdir()
    return folder


@dataclass
class Seen:
    """Regular files below a folder, by inode: name, mode, contents."""

    files: dict[int, tuple[str, int, str]]

    @classmethod
    def of(cls, folder: Path) -> "Seen":
        found = {}
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.name.endswith("-lock"):
                status = file.stat()
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                found[status.st_ino] = (str(file.relative_to(folder)), status.st_mode, digest)
        return cls(found)


@dataclass
class Findings:
    """What went wrong with a chain, and what became of it."""

    wrong: list[str] = field(default_factory=list)
    tracebacks: int = 0
    written_outside: int = 0
    lost: int = 0
    merged: bool = False


class Case:
    """One mutilated chain. `play` it."""

    def __init__(self, stock: Path, folder: Path, seed: int) -> None:
        self._chance = random.Random(seed)
        self._folder = folder
        # Copies, whose holes stay holes; the FIFO is made again.
        shutil.copytree(stock, folder, ignore=shutil.ignore_patterns("fifo"))
        os.mkfifo(folder / "vm" / "fifo")
        self.what = [self._mutate() for _ in range(self._chance.choice([1, 1, 2, 3]))]
        self.found = Findings()

    def _mutate(self) -> str:
        path, mutation = self._folder / "vm" / self._chance.choice(IMAGES), self._chance.choice(MUTATIONS)
        data = bytearray(path.read_bytes())
        if len(data) > NAME_AT * 2:
            mutation(self._chance, data)
        path.write_bytes(data)
        return f"{mutation.__name__} of {path.name}"

    def play(self) -> Findings:
        """Look at it in all ways, then merge it or put an overlay on top, then look again and tidy up."""
        outside, before = Seen.of(self._folder / "outside"), Seen.of(self._folder / "vm")
        planned, marked = False, self._is_marked()
        for arguments in LOOKING:
            looked = self._run(*arguments)
            planned = planned or ("--dry-run" in arguments and arguments[0] == "commit" and looked.code == 0)
        self.compare(before, Seen.of(self._folder / "vm"), "looked at")
        if self._chance.random() < 0.3:
            self._run("snapshot", "c.qcow2", "c.qcow2=new.qcow2")
            self.compare(before, Seen.of(self._folder / "vm"), "an overlay on top", written=marked)
        else:
            self._merge(before, self._view("c.qcow2", "qcow2") if planned else None, marked)
        self._run("doctor", ".")
        if Seen.of(self._folder / "outside") != outside:
            self.found.written_outside += 1
            self.found.wrong.append("written outside")
        return self.found

    def _is_marked(self) -> bool:
        """Whether QEMU repairs the active image, or clears marks in its header, as it opens it for writing."""
        with (self._folder / "vm" / "c.qcow2").open("rb") as file:
            header = file.read(96)
        return len(header) == 96 and (header[79] & 1 != 0 or any(header[88:96]))

    def _merge(self, before: Seen, view: bytes | None, marked: bool) -> None:
        merged = self._run("commit", "c.qcow2", "--json")
        after = Seen.of(self._folder / "vm")
        if merged.code != 0:
            self.compare(before, after, f"exit code {merged.code}", written=marked or merged.code not in (3, 4))
            return
        self.compare(before, after, "merged", written=True)
        self.found.merged = merged.document["verdict"] == "pivoted"
        if self.found.merged and view is not None and self._view("base.raw", "raw") != view:
            self._lost("base shows other data")
        kept = {inode for inode, (name, _, _) in after.files.items() if ".merged" not in name}
        self._run("clean", ".")
        if not kept <= Seen.of(self._folder / "vm").files.keys():
            self._lost("cleaned away")

    def _run(self, *arguments: str) -> Run:
        done = attempt(*arguments, cwd=self._folder / "vm")
        told = complaints(done)
        self.found.tracebacks += "Traceback" in done.out + done.err
        self.found.wrong += [f"{' '.join(arguments)}: {one}: {(done.out + done.err)[-400:]!r}" for one in told]
        return done

    def compare(self, before: Seen, after: Seen, what: str, *, written: bool = False) -> None:
        """Every file is there still, under whatever name; with what it held, unless it may have been `written`."""
        if not before.files.keys() <= after.files.keys():
            self._lost(f"{what}: a file is gone")
        elif not written and any(after.files[inode] != one for inode, one in before.files.items()):
            self._lost(f"{what}: a file is another one")

    def _lost(self, what: str) -> None:
        self.found.lost += 1
        self.found.wrong.append(what)

    def _view(self, name: str, form: str) -> bytes | None:
        """What an image shows; None where QEMU cannot tell."""
        view = self._folder / "view"
        command = ["qemu-img", "convert", "-f", form, "-O", "raw", name, str(view)]
        done = subprocess.run(command, cwd=self._folder / "vm", capture_output=True, timeout=60, check=False)
        return view.read_bytes() if done.returncode == 0 else None
