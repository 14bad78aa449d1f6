"""docs/share/: it is what the code says, all of it is ours, and two readers of manual pages have nothing against it."""

import subprocess

import pytest

from pages.man import exit_codes
from pages.shared import SHARE, SHARED
from qmpmerge.cli.commands.group import FILES
from qmpmerge.doctor import findings
from qmpmerge.errors import EXIT_CODES

MANUAL = sorted(str(page) for page in (SHARE / "man/man1").iterdir())


@pytest.mark.parametrize("name", SHARED)
def test_a_file_is_what_the_code_says(name: str) -> None:
    assert (SHARE / name).read_text() == SHARED[name](), (
        f"docs/share/{name} is not what the code says: run scripts/docs"
    )


def test_nothing_else_is_installed() -> None:
    assert {str(file.relative_to(SHARE)) for file in SHARE.rglob("*") if file.is_file()} == set(SHARED)
    assert len(MANUAL) == 1 + len(FILES)


def test_the_manual_has_every_exit_code() -> None:
    assert {code for code, _ in exit_codes()} == {1, 2, *EXIT_CODES.values(), *findings.EXIT_CODES.values()}


def test_mandoc_and_groff_have_nothing_against_the_manual() -> None:
    lint = subprocess.run(["mandoc", "-T", "lint", *MANUAL], capture_output=True, text=True, check=False)
    assert lint.stdout + lint.stderr == ""
    groff = ["groff", "-man", "-Tutf8", "-Kutf8", "-wall", "-rLL=80n", *MANUAL]
    done = subprocess.run(groff, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for name in FILES:
        assert f"QMPMERGE-{name.upper()}(1)" in done.stdout
