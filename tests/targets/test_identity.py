"""Which file an image is, by what a process has open; and what is said of one whose name leads elsewhere."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpmerge.chain.chain import Image, Inode
from qmpmerge.processes import proc
from qmpmerge.targets import identity
from qmpmerge.targets.identity import Opened

ME = os.getpid()


def inode(path: Path) -> Inode:
    return path.stat().st_dev, path.stat().st_ino


def image(path: Path, known: Inode | None = None) -> Image:
    return Image(str(path), "raw", 0, node="n", inode=known)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file that we have open, as QEMU would."""
    file = tmp_path / "base.raw"
    file.write_bytes(b"data")
    with file.open():
        yield file


def replace(file: Path) -> None:
    (file.parent / "other").write_bytes(b"other")
    (file.parent / "other").rename(file)


# --- which file a name means ----------------------------------------------------------------------------------------


def test_a_name_means_the_file_that_is_open(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    assert Opened(ME).located(str(file), None) == Opened(ME).located(str(link), None) == inode(file)


@pytest.mark.parametrize("through", ["itself", "a symlink"])
@pytest.mark.parametrize("how", ["removed", "replaced", "put aside", "put aside twice"])
def test_a_name_that_was_taken_away_means_the_file_that_is_open(how: str, through: str, file: Path) -> None:
    meant, name = inode(file), file
    if through == "a symlink":
        name = file.with_name("link")
        name.symlink_to(file)
    if how == "removed":
        file.unlink()
    elif how == "replaced":
        replace(file)
    else:
        if how == "put aside twice":
            file.with_name(f"{file.name}.merged").write_bytes(b"older")
        file.rename(file.with_name(f"{file.name}.merged{'.2' if how == 'put aside twice' else ''}"))
    assert Opened(ME).located(str(name), None) == meant


@pytest.mark.parametrize("is_taken", [False, True])
def test_where_a_file_was_renamed_to_is_not_guessed(is_taken: bool, file: Path) -> None:
    meant = inode(file)
    file.rename(file.with_name("elsewhere"))
    if is_taken:
        file.write_bytes(b"another")
    assert Opened(ME).located(str(file), None) is None
    assert Opened(ME).located(str(file), meant) == meant  # somebody saw it before


def test_what_a_name_was_is_no_evidence_once_it_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "base.raw"
    file.write_bytes(b"data")
    assert Opened(ME).located(str(file), inode(file)) is None


def test_of_two_open_files_that_a_name_may_mean_none_is_taken(file: Path) -> None:
    meant = inode(file)
    replace(file)
    with file.open():
        assert Opened(ME).located(str(file), None) == inode(file)
        assert Opened(ME).located(str(file), meant) is None


def test_where_nobody_may_look_a_name_is_all_there_is(file: Path) -> None:
    meant, unseen = inode(file), Opened(None)
    assert not unseen and unseen.located(str(file), None) == meant
    file.rename(file.with_name("elsewhere"))
    assert unseen.located(str(file), meant) == meant  # nothing else can have been opened by this name
    assert unseen.located(str(file), None) is None
    file.write_bytes(b"another")
    assert unseen.located(str(file), meant) is None  # it may have been opened since, or not


# --- an image that is astray ----------------------------------------------------------------------------------------


def test_where_all_is_well_a_stat_is_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest may stand still meanwhile."""
    known = image(file, inode(file))
    monkeypatch.setattr(proc, "open_files", None)
    assert identity.astray(known, ME) is None
    file.unlink()
    with pytest.raises(TypeError):
        identity.astray(known, ME)


def test_an_image_that_is_astray_is_told_apart(file: Path) -> None:
    known = image(file, inode(file))
    file.rename(file.with_name("else where"))
    file.write_bytes(b"another")
    astray = identity.astray(known, ME)
    assert astray is not None and astray.inode is not None
    assert (astray.there, astray.inode, astray.now) == (inode(file), known.inode, str(file.with_name("else where")))
    assert f"inode {inode(file)[1]}, QEMU has inode {astray.inode[1]} open, now {astray.now}" in astray.found
    assert os.path.samestat(os.stat(f"/proc/{ME}/fd/{astray.descriptor}"), file.with_name("else where").stat())


def test_an_image_that_is_not_known_is_astray_where_its_name_is_no_open_file(file: Path) -> None:
    assert identity.astray(image(file), ME) is None
    file.rename(file.with_name("elsewhere"))
    for there in (False, True):
        astray = identity.astray(image(file), ME)
        assert astray is not None and (astray.inode, astray.there is not None) == (None, there)
        file.write_bytes(b"another")
    assert identity.astray(image(file), None) is None  # nobody may look


@pytest.mark.parametrize("name", ["nbd://host/disk", "/dev/fdset/2"])
def test_what_is_no_name_of_a_file_leads_nowhere_and_is_not_astray(name: str) -> None:
    assert identity.astray(Image(name, "raw", 0, node="n"), ME) is None
