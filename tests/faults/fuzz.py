"""
Long runs of what the suite tries a little of: images that were mutilated, and words that make no sense.

The figures that matter are tracebacks, files written outside the folder, and files lost.
"""

import itertools
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rig import nasty
from rig.command import CODES, COMMAND, Run, attempt, complaints, held, prints_json
from rig.machines import have
from rig.mutations import Case, Findings, Seen, make_stock

from faults import conversations, growing

IMAGES = 500
WORKERS = 2
PLACES = 5
"""At which a process of its own is given a word: a fork takes a tenth of the time."""


@dataclass(frozen=True)
class Fuzzed:
    """A case that is tried again and again, from a seed on. It is right where nothing was found."""

    id: str
    title: str
    tries: Callable[[int, Path], Iterator[tuple[str, Findings]]]
    ends = "either"

    def figures(self, seed: int) -> dict[str, Any]:
        """As those of a sweep, and three of its own."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            tried = [*self.tries(seed, Path(folder))]
        wrong = [f"{what}: {'; '.join(one.wrong)}" for what, one in tried if one.wrong]
        nothing = ("writes_acknowledged", "machine_died", "asked", "stale_launch_path", "leaks", "left")
        return {
            **dict.fromkeys(nothing, 0),
            "faults": len(tried),
            "wrong": len(wrong),
            "wrong_at": wrong,
            "blocks_lost": 0,
            "verdicts": {},
            "merged": sum(one.merged for _, one in tried),
            "tracebacks": sum(one.tracebacks for _, one in tried),
            "written_outside": sum(one.written_outside for _, one in tried),
            "files_lost": sum(one.lost for _, one in tried),
        }


# --- images -------------------------------------------------------------------------------------------------------------


def images(seed: int, folder: Path) -> Iterator[tuple[str, Findings]]:
    """`IMAGES` chains with a mutilated image, each looked at in all ways, merged or put under an overlay, and cleaned up."""
    stock = make_stock(folder / "stock")
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from itertools.chain.from_iterable(
            pool.map(
                lambda first: _some_images(stock, folder, range(seed * IMAGES + first, (seed + 1) * IMAGES, WORKERS)),
                range(WORKERS),
            )
        )


def _some_images(stock: Path, folder: Path, seeds: range) -> list[tuple[str, Findings]]:
    found = []
    with tempfile.TemporaryDirectory(dir=folder) as own:
        for seed in seeds:
            case = Case(stock, Path(own) / str(seed), seed)
            found.append((f"{seed}: {', '.join(case.what)}", case.play()))
            subprocess.run(["rm", "-rf", Path(own) / str(seed)], check=True)
    return found


# --- names --------------------------------------------------------------------------------------------------------------


def names(seed: int, folder: Path) -> Iterator[tuple[str, Findings]]:
    """
    Each word in three locales: in UTF-8 wherever a command takes one, in forks; in each of them at some places by processes
    whose arguments the locale decodes.
    """
    stock, chance = make_stock(folder / "stock"), random.Random(seed)
    for number, word in enumerate(nasty.WORDS):
        lines = [*nasty.command_lines(word)]
        yield f"everywhere: {word!r}", _word(stock, folder / f"{number}", word, lines, _fork)
    for name, environment in _locales(folder).items():
        for number, word in enumerate(nasty.WORDS):
            lines = chance.sample([*nasty.command_lines(word)], PLACES)
            run = partial(_process, environment)
            yield f"{name}: {word!r}", _word(stock, folder / f"{name}-{number}", word, lines, run)


def _locales(folder: Path) -> Mapping[str, Mapping[str, str]]:
    """C.UTF-8, one in which names are ASCII, and one in which they are Latin-1, where that can be made."""
    found = {"utf8": {"LC_ALL": "C.UTF-8"}, "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}}
    if have("localedef"):
        subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / "latin1"], stderr=subprocess.DEVNULL)
        if (folder / "latin1").exists():
            found["latin1"] = {"LOCPATH": str(folder), "LC_ALL": "latin1"}
    return found


def _word(stock: Path, own: Path, word: str, lines: list[list[str]], run: Callable[[list[str], Path], Run]) -> Findings:
    subprocess.run(["cp", "-a", stock, own], check=True)
    os.symlink("loop", own / "vm" / "loop")
    before, found = Seen.of(own), Findings()
    for arguments in lines:
        _judge(found, arguments, run(arguments, own / "vm"))
    if word != "c.qcow2":  # which makes sense, and is merged
        after = Seen.of(own)
        found.lost += not before.files.keys() <= after.files.keys()
        found.written_outside += any(after.files.get(inode, one) != one for inode, one in before.files.items())
        found.wrong += ["files are others than before"] if after != before else []
    subprocess.run(["rm", "-rf", own], check=True)
    return found


def _fork(arguments: list[str], folder: Path) -> Run:
    return attempt(*arguments, cwd=folder)


def _process(environment: Mapping[str, str], arguments: list[str], folder: Path) -> Run:
    line = [os.fsencode(part) for part in (COMMAND, *arguments)]
    done = subprocess.run(
        line, capture_output=True, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL
    )
    said = [stream.decode(errors="surrogateescape") for stream in (done.stdout, done.stderr)]
    run = Run(done.returncode, *said)
    return held(run) if prints_json(arguments) and run.code in CODES else run


def _judge(found: Findings, arguments: list[str], run: Run) -> None:
    told = complaints(run)
    found.tracebacks += "Traceback" in run.out + run.err
    found.wrong += [f"{' '.join(arguments)[:100]!r}: {one}: {(run.out + run.err)[-300:]!r}" for one in told]


FUZZED = [
    Fuzzed("FI-images", f"{IMAGES} chains with mutilated images", images),
    Fuzzed(
        "FQ-conversations",
        f"{conversations.COUNT} conversations, QEMU says one wrong thing in each",
        conversations.tries,
    ),
    Fuzzed("FG-growth", f"{growing.COUNT} chains that grow by no more than was foreseen", growing.tries),
    Fuzzed("FN-names", "words that make no sense, everywhere, in three locales", names),
]
