"""
Running the cases, and the table of what came of them.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.cases import Swept, Tested
from faults.fuzz import Fuzzed
from faults.sweeps import Bench

TESTS = Path(__file__).parent.parent
HEADINGS = f"{'case':<22}{'ends':<9}{'faults':>7}{'acked':>7}{'lost':>6}{'wrong':>6}{'plain block-commit':>20}  what"


@dataclass
class Result:
    """What one case came to; `base_line` is the same for a plain block-commit."""

    id: str
    title: str
    ends: str
    figures: dict[str, Any]
    base_line: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        return self.ends == "limit" or not self.figures["wrong"]

    def __str__(self) -> str:
        ours, plain = self.figures, self.base_line
        beside = f"{plain['wrong']} of {plain['faults']} wrong" if plain else ""
        return (
            f"{self.id:<22}{self.ends:<9}{ours['faults']:>7}{ours['writes_acknowledged']:>7}{ours['blocks_lost']:>6}"
            f"{ours['wrong']:>6}{beside:>20}  {self.title}"
        )


def run(chosen: Sequence[Swept | Tested | Fuzzed], places: Mapping[str, Bench], seed: int) -> Iterator[Result]:
    """Run the cases one after the other, and print a line for each as it is done."""
    print(HEADINGS)
    for case in chosen:
        if isinstance(case, Swept):
            yield told(swept(case, places[case.layout]))
        elif isinstance(case, Fuzzed):
            yield told(fuzzed(case, seed))
    tested = [case for case in chosen if isinstance(case, Tested)]
    if tested:
        yield from map(told, run_tests(tested))


def told(result: Result) -> Result:
    print(result, flush=True)
    for line in result.figures["wrong_at"]:
        print(f"    {line[:300]}")
    return result


def swept(case: Swept, bench: Bench) -> Result:
    begun = time.monotonic()
    plain = case.sweep(bench, case.story, "block-commit").figures() if case.base_line else {}
    ours = case.sweep(bench, case.story, "qmpmerge").figures()
    if not ours["faults"]:
        ours |= {"wrong": 1, "wrong_at": ["no fault was injected"]}
    title = f"{case.title}: {case.story}"
    return Result(case.id, title, case.ends, ours, plain, time.monotonic() - begun)


def fuzzed(case: Fuzzed, seed: int) -> Result:
    begun, figures = time.monotonic(), case.figures(seed)
    counts = ", ".join(
        f"{figures[key]} {key.replace('_', ' ')}" for key in ("tracebacks", "written_outside", "files_lost")
    )
    return Result(case.id, f"{case.title}: {counts}", case.ends, figures, seconds=time.monotonic() - begun)


# --- cases that the suite proves --------------------------------------------------------------------------------------


def run_tests(chosen: Sequence[Tested]) -> Iterator[Result]:
    """All their tests in one run of pytest."""
    wanted = dict.fromkeys(f"{TESTS}/{test}" for case in chosen for test in case.tests)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *wanted]
        environment = {"QMPMERGE_ROUNDS": "240", **os.environ}
        subprocess.run(command, cwd=TESTS.parent, stdout=subprocess.DEVNULL, env=environment)
        outcomes = read(report)
    for case in chosen:
        yield Result(case.id, case.title, case.ends, counted(case, outcomes))


def read(report: Path) -> dict[str, list[tuple[str, str]]]:
    """What pytest reported: for each test without its parameters the names of its runs and how they ended."""
    outcomes: dict[str, list[tuple[str, str]]] = {}
    for run in ET.parse(report).iter("testcase"):
        file = run.attrib["classname"].removeprefix("tests.").replace(".", "/")
        name = run.attrib["name"]
        ended = next((child.tag for child in run if child.tag in ("failure", "error", "skipped")), "passed")
        outcomes.setdefault(f"{file}.py::{name.partition('[')[0]}", []).append((name, ended))
    return outcomes


def counted(case: Tested, outcomes: Mapping[str, list[tuple[str, str]]]) -> dict[str, Any]:
    """The figures of a case of the suite; what was skipped is no fault that was injected."""
    runs = [run for test in case.tests for run in outcomes.get(test, [(test, "missing")]) if run[1] != "skipped"]
    failed = [f"{name}: {ended}" for name, ended in runs if ended != "passed"]
    return {
        "faults": len(runs),
        "wrong": len(failed),
        "wrong_at": failed,
        "blocks_lost": 0,
        "writes_acknowledged": 0,
        "machine_died": 0,
        "asked": 0,
        "stale_launch_path": 0,
        "leaks": 0,
        "left": 0,
        "verdicts": {},
    }


# --- all in all -------------------------------------------------------------------------------------------------------


def summary(results: Sequence[Result]) -> str:
    """The last lines of the table; known limits have one of their own."""
    limits = [result for result in results if result.ends == "limit"]
    results = [result for result in results if result.ends != "limit"]
    ours = {key: sum(result.figures[key] for result in results) for key in COUNTS}
    compared = [result for result in results if result.base_line]
    plain = {key: sum(result.base_line[key] for result in compared) for key in COUNTS}
    lines = ["", f"{'':<34}{'qmpmerge':>12}{'plain block-commit':>22}"]
    lines.append(f"{'cases':<34}{len(results):>12}{len(compared):>22}")
    lines += [f"{words:<34}{ours[key]:>12}{plain[key]:>22}" for key, words in COUNTS.items()]
    if limits:
        ours_wrong = sum(result.figures["wrong"] for result in limits)
        plain_wrong = sum(result.base_line["wrong"] for result in limits)
        lines.append(f"{'wrong at known limits':<34}{ours_wrong:>12}{plain_wrong:>22}")
    return "\n".join(lines)


COUNTS = {
    "faults": "faults injected",
    "writes_acknowledged": "guest writes acknowledged",
    "blocks_lost": "blocks lost (4 KiB)",
    "wrong": "faults with a wrong disk or verdict",
    "machine_died": "machines that died of an error",
    "asked": "left to the user to decide",
    "stale_launch_path": "old image still opens, stale",
    "left": "a flush's node left in QEMU",
}
