"""All packages as `scripts/package` builds them, and the Debian one in clean systems: `scripts/package --check`."""

import sys
from pathlib import Path

import pytest
from rig.debian import REPOSITORY, root
from rig.machines import run

pytestmark = [pytest.mark.package, pytest.mark.timeout(1500)]

TESTS = REPOSITORY / "debian/tests/installed"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dist")
    run(REPOSITORY / "scripts/package", place)
    return place


def test_what_is_built_elsewhere_and_later_is_the_same(built: Path, tmp_path: Path) -> None:
    script = f"umask 077; TZ=Asia/Kathmandu LANG=C HOME={tmp_path} exec scripts/package {tmp_path}/new"
    run("sh", "-c", script, cwd=REPOSITORY)
    names = {file.name for file in built.iterdir()}
    assert {Path(name).suffix for name in names} == {".gz", ".whl", ".deb", ".dsc", ".xz", ".changes", ".buildinfo"}
    of_one_build = {name for name in names if name.endswith((".buildinfo", ".changes"))}
    assert names == {file.name for file in (tmp_path / "new").iterdir()}
    assert [
        one for one in names - of_one_build if (built / one).read_bytes() != (tmp_path / "new" / one).read_bytes()
    ] == []


def test_twine_and_lintian_have_nothing_against_them(built: Path) -> None:
    run(
        Path(sys.executable).with_name("twine"),
        "check",
        "--strict",
        *built.glob("*.whl"),
        *built.glob("qmpmerge-*.tar.gz"),
    )
    run("lintian", "--fail-on", "error,warning", *built.glob("*.changes"))


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_it_works_in_a_clean_system_and_goes_without_a_trace(suite: str, built: Path, tmp_path: Path) -> None:
    (deb,) = built.glob("*.deb")
    with root(suite, tmp_path / suite) as debian:
        debian.apt("update")
        debian.apt("satisfy", run("dpkg-deb", "--field", deb, "Depends"))
        before = debian.files()
        assert "\n  qmpmerge\n0 upgraded, 1 newly" in debian.apt("install", debian.put(deb))
        assert "/usr/bin/qmpmerge" in debian.files() - before
        debian.run("bash", debian.put(TESTS))
        debian.apt("purge", "qmpmerge")
        assert debian.files() ^ before == set()
