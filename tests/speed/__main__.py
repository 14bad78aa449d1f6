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
from pathlib import Path
from typing import Any

from rig.machines import run

import qmpmerge
from speed import growth, guest, listing, live, offline, tidying
from speed.figures import Figures
from speed.peers import Libvirt, install_libvirt, libvirt

Section = Callable[[Figures, Path, int, Libvirt | None], None]


def look(figures: Figures, folder: Path, runs: int, _peer: Libvirt | None) -> None:
    listing.start(figures, runs)
    listing.chains(figures, folder, runs, [3, 30, 200, 1000])
    listing.checks_of_a_merge(figures, folder, runs, 1000)
    listing.vms(figures, folder, runs, [1, 10, 50])


def merge_live(figures: Figures, folder: Path, runs: int, peer: Libvirt | None) -> None:
    live.measure(figures, folder, runs, peer, [0, 64, 1024])


def merge_offline(figures: Figures, folder: Path, runs: int, _peer: Libvirt | None) -> None:
    offline.measure(figures, folder, runs, [512, 4096])


def feel(figures: Figures, _folder: Path, runs: int, peer: Libvirt | None) -> None:
    asyncio.run(guest.measure(figures, runs, peer))


def grow(figures: Figures, folder: Path, runs: int, _peer: Libvirt | None) -> None:
    growth.layers(figures, folder, runs, [3, 30, 200])
    growth.data(figures, folder, runs, [16, 128, 512])
    growth.disks(figures, folder, runs, [1, 8, 24])


def tidy(figures: Figures, folder: Path, runs: int, _peer: Libvirt | None) -> None:
    tidying.measure(figures, folder, runs, 20)


SECTIONS: dict[str, Section] = {
    "look": look,
    "live": merge_live,
    "offline": merge_offline,
    "guest": feel,
    "growth": grow,
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
        "filesystem": run("stat", "-f", "-c", "%T", folder).strip(),
        "command": " ".join(["scripts/bench", *sys.argv[1:]]),
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)}; all of them unless named")
    parser.add_argument("--runs", type=int, default=5, help="of each case by each peer (default: 5)")
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
        try:
            for section in sections:
                print(f"measuring: {section}", file=sys.stderr)
                SECTIONS[section](figures, folder, options.runs, peer)
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
