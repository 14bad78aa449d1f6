"""
Random chains, merged offline in either direction, and by how much the image has grown then beside what was foreseen.

Clusters from 512 bytes to 2 MiB, both versions of qcow2, subclusters, raw bases, odd sizes and disks that were enlarged; data,
zeros, discards, and what is compressed. What is foreseen is for the QEMU that copies: the one that is found first in PATH.
"""

import asyncio
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rig.machines import MIB, run
from rig.mutations import Findings

import qmpmerge

COUNT = 300
WORKERS = 2
CLUSTERS = (512, 1024, 4096, 16384, 65536, 65536, 131072, 1048576, 2 * MIB)
SIZES = (4 * MIB, 8 * MIB, 16 * MIB)
GRAINS = (512, 4096, 65536, MIB)
COMPRESSED = "write -c -P 1 "


@dataclass
class Layer:
    """An image: its file name, format, size in bytes, options of `qemu-img create`, and what `qemu-io` writes to it."""

    name: str
    form: str
    size: int
    options: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    cluster: int = 65536

    def make(self, folder: Path, below: "Layer | None") -> None:
        backing = ["-b", below.name, "-F", below.form] if below else []
        options = ["-o", ",".join(self.options)] if self.options else []
        run("qemu-img", "create", "-q", "-f", self.form, *options, *backing, self.name, str(self.size), cwd=folder)
        if self.writes:
            commands = [part for write in self.writes for part in ("-c", write)]
            run("qemu-io", "-d", "unmap", "-f", self.form, *commands, self.name, cwd=folder)


@dataclass(frozen=True)
class Chain:
    """The layers, and what is asked for of them: of `qmpmerge.commit` or `qmpmerge.pull`."""

    layers: list[Layer]
    direction: str
    asked: dict[str, Any]

    def __str__(self) -> str:
        layers = " <- ".join(" ".join([one.form, str(one.size), *one.options]) for one in self.layers)
        return f"{self.direction} {self.asked} of {layers}"

    @property
    def receiver(self) -> str:
        """The file that grows."""
        base, top = int(self.asked.get("base", "1")), int(self.asked.get("top", str(len(self.layers))))
        return self.layers[(base if self.direction == "commit" else top) - 1].name

    @classmethod
    def of(cls, seed: int) -> "Chain":
        """Always the same for the same seed."""
        chance = random.Random(seed)
        depth, size = chance.randint(2, 4), chance.choice(SIZES) + chance.choice((0, 0, 512 * chance.randint(1, 200)))
        layers = [_layer(chance, number, size) for number in range(depth)]
        if chance.random() < 0.3:  # the disk was enlarged
            for layer in layers[chance.randrange(1, depth) :]:
                layer.size += 512 * chance.randint(1, 16384)
        for layer in layers:
            writes = dict.fromkeys(_write(chance, layer) for _ in range(chance.randint(0, 6)))
            layer.writes = sorted(
                writes, key=lambda write: not write.startswith(COMPRESSED)
            )  # only where nothing is yet
        if chance.random() < 0.3:  # a base that is full
            layers[0].writes = [f"write -P 1 0 {layers[0].size}"]
        return cls(layers, *_asked(chance, depth))


def _layer(chance: random.Random, number: int, size: int) -> Layer:
    if number == 0 and chance.random() < 0.35:
        return Layer("l0.raw", "raw", size)
    cluster, options = chance.choice(CLUSTERS), list[str]()
    if cluster >= 16384 and chance.random() < 0.15:
        options.append("extended_l2=on")
    elif chance.random() < 0.2:
        options.append("compat=0.10")
    return Layer(f"l{number}.qcow2", "qcow2", size, [f"cluster_size={cluster}", *options], cluster=cluster)


def _write(chance: random.Random, layer: Layer) -> str:
    grain = chance.choice(GRAINS)
    start = chance.randrange(0, layer.size) // grain * grain
    length = min(grain * chance.randint(1, max(1, 4 * MIB // grain)), layer.size - start) // 512 * 512
    if layer.form == "raw":
        return f"write -P {chance.randint(1, 255)} {start} {length}"
    kind = chance.choice(("data", "data", "zero", "zero", "unmap", "discard", "compressed"))
    if kind == "compressed" and "extended_l2=on" not in layer.options:
        start = start // layer.cluster * layer.cluster
        return f"{COMPRESSED}{start} {min(layer.cluster, layer.size - start)}"
    if kind in ("data", "compressed"):
        return f"write -P {chance.randint(1, 255)} {start} {length}"
    return {"zero": f"write -z {start} {length}", "unmap": f"write -zu {start} {length}"}.get(
        kind, f"discard {start} {length}"
    )


def _asked(chance: random.Random, depth: int) -> tuple[str, dict[str, Any]]:
    direction = chance.choice(("commit", "pull"))
    if direction == "commit":
        base = chance.randint(1, depth - 1)
        return direction, {"base": str(base), "top": str(chance.randint(base + 1, depth))}
    top = chance.randint(2, depth)
    base = chance.randint(0, top - 2)
    return direction, {"top": str(top), **({"base": str(base)} if base else {})}


async def grown(chain: Chain, folder: Path) -> tuple[int, int] | str:
    """By how much it grows as foreseen, and as measured, in bytes; or why it is not merged."""
    for below, layer in zip([None, *chain.layers], chain.layers, strict=False):
        layer.make(folder, below)
    receiver = folder / chain.receiver
    act = qmpmerge.commit if chain.direction == "commit" else qmpmerge.pull
    async with qmpmerge.offline(folder / chain.layers[-1].name) as target:
        try:
            planned = await act(target, **chain.asked, dry_run=True)
        except qmpmerge.errors.Refused as refusal:
            return refusal.name
        before = _allocated(receiver)
        await act(target, **chain.asked, merged_files="keep", verify=False)
    assert planned.estimate is not None and planned.estimate.growth is not None, planned.estimate
    return planned.estimate.growth, _allocated(receiver) - before


def _allocated(file: Path) -> int:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return os.fstat(opened.fileno()).st_blocks * 512


def tries(seed: int, folder: Path) -> Iterator[tuple[str, Findings]]:
    """`COUNT` of them; what was refused is none."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else folder
    with tempfile.TemporaryDirectory(prefix="growing-", dir=memory) as name, ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(lambda number: _one(number, Path(name)), range(seed * COUNT, (seed + 1) * COUNT))


def _one(number: int, folder: Path) -> tuple[str, Findings]:
    own, chain, found = folder / str(number), Chain.of(number), Findings()
    own.mkdir()
    try:
        figures = asyncio.run(grown(chain, own))
    except (AssertionError, qmpmerge.errors.Error) as error:
        found.wrong.append(f"{type(error).__name__}: {error}")
    else:
        found.merged = not isinstance(figures, str)
        if not isinstance(figures, str) and figures[1] > figures[0]:
            found.wrong.append(f"{figures[0]} bytes were foreseen, and it grew by {figures[1]}")
    subprocess.run(["rm", "-rf", own], check=True)
    return f"{number}: {chain}", found
