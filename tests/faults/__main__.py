"""
``python -m faults [--seed N] [--quick] [--json FILE] [CASE...]``: run the cases and print what came of them.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from faults import cases, gate, table
from faults.stage import LAYOUTS, make_stock
from faults.sweeps import Bench

SAMPLE = 4
ABOUT = "Run the cases, print what came of them beside a plain block-commit. Exit 1 if anything was lost or wrong."


@contextlib.contextmanager
def benches(layouts: Collection[str], seed: int, sample: int | None) -> Iterator[dict[str, Bench]]:
    """A bench for each layout of images; in memory, where there is a filesystem for that."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory) as name:
        folder = Path(name)
        stocks = {layout: make_stock(folder / layout, LAYOUTS[layout]) for layout in layouts}
        yield {layout: Bench(stock, folder, seed, sample) for layout, stock in stocks.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=ABOUT)
    parser.add_argument("--seed", type=int, default=0, help="of the samples where all are too many (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{SAMPLE} points of each sweep, none of the suite's tests"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and every fault that went wrong")
    parser.add_argument("--list", action="store_true", help="name the cases and run none")
    parser.add_argument("case", nargs="*", help="ids, or beginnings of ids, of the cases to run (default: all)")
    options = parser.parse_args()
    chosen = cases.find(options.case)
    if not chosen:
        parser.error(f"no case is called like {', '.join(options.case)}: --list names them")
    if options.list:
        print(*(f"{case.id:<22}{case.title}" for case in chosen), sep="\n")
        return 0
    if problem := gate.available():
        print(f"faults: {problem}", file=sys.stderr)
        return 2
    if options.quick:
        chosen = [case for case in chosen if isinstance(case, cases.Swept)]
    layouts = {case.layout for case in chosen if isinstance(case, cases.Swept)}
    with benches(layouts, options.seed, SAMPLE if options.quick else None) as places:
        results = [*table.run(chosen, places, options.seed)]
    print(table.summary(results))
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "cases": [vars(one) for one in results]}, indent=1))
    return int(any(not result.is_right for result in results))


if __name__ == "__main__":
    sys.exit(main())
