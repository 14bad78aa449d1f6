"""
The bench behind `scripts/bench`: whole commands, Python's start included, next to their peers.

The peers alternate run by run on the same images and the same machine, so that what else goes on hits all alike. Times
are medians; in brackets stands ours to the peer's, so that less than 1 means that we are faster.
"""

import argparse
import asyncio
import compileall
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig.machines import run

import qmpmerge
from speed import growth, guest, listing, live, offline, tidying, together, writes
from speed.figures import Figures
from speed.peers import Libvirt, install_libvirt, libvirt


@dataclass(frozen=True)
class Bench:
    """What is measured how often, and where; `peer` is libvirt where there is one."""

    figures: Figures
    folder: Path
    runs: int
    peer: Libvirt | None
    quick: bool

    def some(self, *sizes: int) -> list[int]:
        """All of these sizes; where it is to be quick only the first."""
        return list(sizes[:1] if self.quick else sizes)


Section = Callable[[Bench], None]


def look(bench: Bench) -> None:
    listing.start(bench.figures, bench.runs)
    listing.chains(bench.figures, bench.folder, bench.runs, bench.some(30, 3, 200, 1000))
    listing.images(bench.figures, bench.folder, bench.runs, bench.some(200, 1000))
    listing.checks_of_a_merge(bench.figures, bench.folder, bench.runs, *bench.some(1000))
    listing.vms(bench.figures, bench.folder, bench.runs, bench.some(1, 10, 50))


def merge_live(bench: Bench) -> None:
    live.measure(bench.figures, bench.folder, bench.runs, bench.peer, [0, *bench.some(64, 512, 1024)])
    live.deep(bench.figures, bench.folder, bench.runs, bench.peer, bench.some(200))


def merge_offline(bench: Bench) -> None:
    offline.measure(bench.figures, bench.folder, bench.runs, bench.some(512, 4096))
    offline.sparse(bench.figures, bench.folder, bench.runs, bench.some(2000))
    offline.deep(bench.figures, bench.folder, bench.runs, bench.some(200))


def feel(bench: Bench) -> None:
    asyncio.run(guest.measure(bench.figures, bench.runs, bench.peer))


def write(bench: Bench) -> None:
    writes.measure(bench.figures, bench.folder, bench.runs, bench.some(512))
    writes.pauses(bench.figures, bench.folder, 3 * bench.runs)


def grow(bench: Bench) -> None:
    growth.layers(bench.figures, bench.folder, bench.runs, bench.some(3, 30, 200))
    growth.data(bench.figures, bench.folder, bench.runs, bench.some(16, 128, 512))
    growth.disks(bench.figures, bench.folder, bench.runs, bench.some(8, 1, 24))


def merge_at_once(bench: Bench) -> None:
    together.measure(bench.figures, bench.folder, bench.runs, 10, bench.some(16, 64))


def tidy(bench: Bench) -> None:
    tidying.measure(bench.figures, bench.folder, bench.runs, *bench.some(20))


SECTIONS: dict[str, Section] = {
    "look": look,
    "live": merge_live,
    "offline": merge_offline,
    "guest": feel,
    "writes": write,
    "growth": grow,
    "at-once": merge_at_once,
    "tidy": tidy,
}
LIVE = {"live", "guest"}
"""The sections in which virsh is a peer."""


def surroundings(folder: Path) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "qemu": run("qemu-img", "--version").split()[2],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "load": os.getloadavg(),
        "filesystem": run("df", "--output=fstype", folder).split()[-1],
        "command": " ".join(["scripts/bench", *sys.argv[1:]]),
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)}; all of them unless named")
    parser.add_argument("--runs", type=int, help="of each case by each peer (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one size of each case, and two runs: some minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every run's figure in this file")
    parser.add_argument("--dir", type=Path, help="where the images are made; 15 GiB there (default: the system's)")
    parser.add_argument(
        "--peers", action="store_true", help="install libvirt to measure virsh (it is used if it is there)"
    )
    options = parser.parse_args()
    unknown = set(options.section) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}")
    if options.peers:
        install_libvirt()
    # As pip does when it installs: without it every start would compile the package where the environment forbids .pyc.
    compileall.compile_dir(Path(qmpmerge.__file__).parent, quiet=1)
    figures = Figures()
    sections = options.section or list(SECTIONS)
    with tempfile.TemporaryDirectory(prefix="speed-", dir=options.dir) as name, contextlib.ExitStack() as running:
        folder = Path(name)
        folder.chmod(0o755)  # libvirt's QEMU is another user's
        described = surroundings(folder)
        peer = running.enter_context(libvirt()) if LIVE & set(sections) else None
        if peer is None and LIVE & set(sections):
            print("no libvirt here: virsh is left out (`--peers` installs it)", file=sys.stderr)
        bench = Bench(figures, folder, options.runs or (2 if options.quick else 5), peer, options.quick)
        try:
            for section in sections:
                print(f"measuring: {section}", file=sys.stderr)
                SECTIONS[section](bench)
        finally:  # what was measured before a failure, or a Ctrl-C, is as good as ever
            show(figures, described, options.json)


def show(figures: Figures, described: dict[str, Any], file: Path | None) -> None:
    """Print the tables, and keep all in `file`."""
    print(" ".join(f"{key}={value}" for key, value in described.items() if key != "command"))
    print("\n".join(figures.table()))
    if file is not None:
        file.write_text(json.dumps({"machine": described, "cases": figures.document()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
