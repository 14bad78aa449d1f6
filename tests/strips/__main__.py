"""See scripts/record."""

import argparse
import os
import tempfile
from pathlib import Path

from strips import film
from strips.layouts import LAYOUTS

FIXTURES = Path(__file__).parents[2] / "fixtures"


def main() -> None:
    """Record the layouts, and say where."""
    parser = argparse.ArgumentParser(prog="scripts/record", description="Record what a QEMU says of its disks.")
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help="all of them, where none is named")
    parser.add_argument("--qemu", metavar="DIR", type=Path, help="use the QEMU in DIR/bin")
    parser.add_argument("--into", metavar="DIR", type=Path, default=FIXTURES, help="instead of fixtures/")
    given = parser.parse_args()
    if given.qemu is not None:
        os.environ["PATH"] = f"{given.qemu.resolve() / 'bin'}:{os.environ['PATH']}"
    for name in given.layouts or LAYOUTS:
        with tempfile.TemporaryDirectory() as folder, LAYOUTS[name](Path(folder)) as machine:
            strip = film.record(machine)
        file = given.into / f"qemu-{film.version(strip)}" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(strip)
        print(file)


main()
