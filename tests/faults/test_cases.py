"""The matrix names what it promises to name."""

import subprocess
import sys
from collections import Counter

from faults import cases, table


def test_there_are_a_hundred_and_each_has_a_name_of_its_own() -> None:
    assert len(cases.CASES) >= 100
    assert [name for name, count in Counter(case.id for case in cases.CASES).items() if count > 1] == []


def test_the_suite_has_the_tests_that_they_name() -> None:
    wanted = {test for case in cases.CASES if isinstance(case, cases.Tested) for test in case.tests}
    files = sorted({f"{table.TESTS}/{test.partition('::')[0]}" for test in wanted})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    listed = subprocess.run(command, cwd=table.TESTS.parent, capture_output=True, text=True).stdout
    there = {line.partition("[")[0].removeprefix("tests/") for line in listed.splitlines()}
    assert wanted - there == set()


def test_what_the_suite_reports_is_found_again() -> None:
    (case,) = (case for case in cases.CASES if case.id == "H-locklink")
    assert isinstance(case, cases.Tested)
    (result,) = table.run_tests([case])
    assert (result.figures["faults"], result.figures["wrong"]) == (5, 0)
