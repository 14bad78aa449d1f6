"""sdist and wheel: the same bytes from the same files, all that is needed to build them anew, and where things are put."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rig.machines import run

import qmpmerge

REPOSITORY = Path(__file__).parents[2]
FIRST_RELEASE = 1_000_000_000
"""A time, for what is built."""


def build(source: Path, place: Path, **environment: str) -> None:
    settings = os.environ | {"SOURCE_DATE_EPOCH": str(FIRST_RELEASE)} | environment
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(place)]
    subprocess.run(command, cwd=source, env=settings, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dist")
    build(REPOSITORY, place)
    return place


def test_what_is_built_of_the_sdist_is_the_same(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    run("sh", "-c", f"umask 077; tar --extract --touch --file {sdist} --directory {tmp_path}")
    build(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "new", TZ="Asia/Kathmandu", LC_ALL="C")
    assert {one.name: one.read_bytes() for one in built.iterdir()} == {
        one.name: one.read_bytes() for one in (tmp_path / "new").iterdir()
    }


def test_the_manual_and_completions_of_the_wheel_are_found(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", f"--prefix={tmp_path}", wheel)
    found = run("env", f"PATH={tmp_path}/bin:{os.environ['PATH']}", "man", "-w", "qmpmerge", "qmpmerge-commit").split()
    assert found == [f"{tmp_path}/share/man/man1/{name}.1" for name in ("qmpmerge", "qmpmerge-commit")]
    shared = REPOSITORY / "docs" / "share"
    names = [file.relative_to(shared) for file in shared.rglob("*") if file.is_file()]
    assert [name for name in names if (tmp_path / "share" / name).read_bytes() != (shared / name).read_bytes()] == []


def test_all_speak_of_the_same_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    debian = re.match(r"qmpmerge \((.*)-\d+\) ", (REPOSITORY / "debian/changelog").read_text())
    changelog = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert debian is not None and changelog is not None
    assert {project["version"], debian[1], changelog[1]} == {qmpmerge.__version__}
