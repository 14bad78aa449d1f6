"""A record that is there and does not tell is *unknown*: each command says so, with a way out that fits the reason."""

import errno
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.command import JOB, invoke
from rig.disks import Setup
from rig.left import record
from rig.machines import make_chain, run
from rig.nobody import as_nobody, public

import qmpmerge
from qmpmerge.doctor import leftovers
from qmpmerge.errors import RecordNotBelieved, StillRunning
from qmpmerge.images import files
from qmpmerge.journal import store
from qmpmerge.journal.record import Record
from qmpmerge.journal.store import Disbelieved, Unlisted
from qmpmerge.operations.clean import clean
from qmpmerge.operations.control import Verb
from qmpmerge.operations.recover import recover


@pytest.fixture
def told(tmp_path: Path) -> Record:
    return store.write(record(make_chain(tmp_path, ("base.raw", "a.qcow2", "c.qcow2")), 2))


def cure(path: str) -> str:
    found = store.read(path)
    assert isinstance(found, Disbelieved)
    assert [one.why.endswith(found.cure) for one in leftovers.in_folder(os.path.dirname(path))] == [True]
    return found.cure


def typed(words: str) -> list[str]:
    """The last command of a hint."""
    return shlex.split(words.split("`")[-2])


@pytest.mark.parametrize("kind", ["text", "symlink", "fifo", "folder", "link"])
def test_what_is_no_record_is_moved_out_of_the_way(kind: str, told: Record, tmp_path: Path) -> None:
    """A folder, a FIFO and a link too, and none of it is lost."""
    path = Path(told.path)
    if kind == "link":
        os.link(path, tmp_path / "other")
    else:
        path.unlink()
    ways: dict[str, Callable[[], object]] = {
        "text": lambda: path.write_text("garbage"),
        "symlink": lambda: path.symlink_to(tmp_path / "base.raw"),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "link": path.exists,
    }
    ways[kind]()
    run(*typed(cure(told.path)))
    assert store.read(told.path) is None and os.path.lexists(f"{path}.not-believed")
    assert invoke("recover", str(tmp_path)).code == 0


def test_one_that_may_not_be_read_is_for_who_may(told: Record) -> None:
    """To remove it, as was said, is to lose what it tells."""
    if os.geteuid() != 0:
        os.chmod(told.path, 0)
        assert cure(told.path) == f"run `qmpmerge recover {told.chain.active.file}` as root, or as who wrote it"
        return
    with public() as folder:
        theirs = store.write(record(make_chain(folder, ("base.raw", "c.qcow2")), 2))
        with as_nobody():
            found = store.read(theirs.path)
        assert isinstance(found, Disbelieved) and found.reason == os.strerror(errno.EACCES)
        assert found.cure == f"run `qmpmerge recover {theirs.chain.active.file}` as root, or as who wrote it"
        assert store.read(theirs.path) == theirs


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_one_of_another_user_is_for_that_user(told: Record) -> None:
    os.chown(told.path, 65534, -1)
    words = cure(told.path)
    assert words.startswith(f"run `qmpmerge recover {told.chain.active.file}` as that user")
    assert typed(words)[0] == "mv"


def test_one_of_another_version_is_for_that_version(told: Record) -> None:
    path = Path(told.path)
    path.write_bytes(path.read_bytes().replace(b'"schema": ', b'"schema": 9'))
    assert "of the qmpmerge that wrote it" in cure(told.path)


@pytest.fixture
def unlistable() -> Iterator[Path]:
    """A folder of root's through which others may go, and not look."""
    if os.geteuid() != 0:
        pytest.skip("only root can have a folder that others may not list")
    with public() as folder:
        make_chain(folder, ("base.raw", "c.qcow2"))
        for image in folder.iterdir():
            image.chmod(0o666)
        folder.chmod(0o711)
        yield folder


async def test_a_folder_that_cannot_be_listed_is_not_called_finished(unlistable: Path) -> None:
    image = unlistable / "c.qcow2"
    os.rename(image, f"{image}.merged")
    os.link(f"{image}.merged", image)
    with as_nobody():
        assert [type(one) for one in store.in_folder(str(unlistable))] == [Unlisted]
        for path in (unlistable, image):
            with pytest.raises(RecordNotBelieved, match="cannot be listed") as unknown:
                await recover(path)
            assert "somebody who may list it" in unknown.value.hint
        (stays,) = await clean([f"{image}.merged"])
        assert "cannot be listed" in (stays.obstacle or "")
        assert [one.name for one in leftovers.in_folder(str(unlistable))] == ["not-looked-at"]


async def test_beside_an_image_it_is_found_though_the_folder_cannot_be_listed(unlistable: Path) -> None:
    told = store.write(record([unlistable / "base.raw", unlistable / "c.qcow2"], 2))
    with as_nobody():
        assert [(type(one), one.path) for one in store.about(told.chain)] == [(Disbelieved, told.path)]


async def test_a_job_of_ours_is_not_cancelled_past_what_it_was_begun_with(setup: Setup, images: list[Path]) -> None:
    """Names may have been taken away, which the record alone tells."""
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            await qmpmerge.commit(target, top="[3]", speed=1, patience=qmpmerge.Patience(detach=True))
        os.truncate(store.path_of(str(images[3])), 300)
        hints = []
        harmful: tuple[Verb, ...] = ("cancel", "follow")
        for verb in harmful:
            with pytest.raises(RecordNotBelieved) as refused:
                await qmpmerge.control(target, JOB, verb)
            hints.append(refused.value.hint)
        await qmpmerge.control(target, JOB, "pause")
        await qmpmerge.control(target, JOB, "resume")
        run(*typed(hints[0]))
        await qmpmerge.control(target, JOB, "cancel")
    setup.check()


# --- a disk that is full --------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_is_noticed_before_anything_is_begun(tmp_path: Path) -> None:
    """0.1 kept the first 4096 bytes of the record, and merged."""
    names = ["base.raw", *(f"{'layer' * 40}-{number}.qcow2" for number in range(12))]
    images = make_chain(tmp_path, names)
    before = sorted(os.listdir(tmp_path))
    limited = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'qmpmerge', *sys.argv[1:]])"
    )
    words = [sys.executable, "-c", limited, "commit", str(images[-1]), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, '"cannot-record"' in done.stdout) == (3, True), done
    assert sorted(os.listdir(tmp_path)) == before
    assert invoke("commit", str(images[-1])).code == 0


@pytest.mark.parametrize("free", [0, 1, 2])
def test_a_filesystem_that_is_full_keeps_the_record_that_was_there(free: int, tmp_path: Path) -> None:
    """By a page or two it has room for: what is cut short takes nobody's place."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root can mount")
    try:
        told = record(make_chain(small, ("base.raw", "c.qcow2"), 65536), 2)
        store.write(told)
        page = resource.getpagesize()
        with open(small / "filler", "wb") as filler:
            with pytest.raises(OSError, match="No space"):
                while True:
                    os.write(filler.fileno(), bytes(page))
            room = os.fstat(filler.fileno()).st_size - free * page
            os.ftruncate(filler.fileno(), max(room, 0))
        longer = record([Path(image.file) for image in told.chain], 2, disk="d" * 3 * page)
        with pytest.raises(OSError, match="No space"):
            store.write(longer)
        assert store.read(told.path) == told and not os.path.exists(f"{told.path}.new")
        assert files.seen(told.path).size < 3 * page
    finally:
        run("umount", small)
