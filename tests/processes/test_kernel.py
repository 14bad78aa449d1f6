"""What the kernel has put on an image, on real loop devices, mounts and swap."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.devices import loop, mounted
from rig.machines import MIB, run
from rig.nobody import as_nobody, public

from qmpmerge.processes import holders, kernel

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes loop devices")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image that holds a filesystem."""
    return filesystem(tmp_path / "disk image.raw")


def filesystem(file: Path) -> Path:
    file.write_bytes(bytes(8 * MIB))
    run("mkfs.ext4", "-q", file)
    return file


def told(*files: Path | str) -> list[tuple[str, str]]:
    """What has the files, and the command that ends it."""
    return [(use.what, use.release) for use in kernel.look([str(file) for file in files]).uses]


@pytest.fixture
def shown() -> Iterator[Path]:
    """A folder into which everybody may look."""
    with public() as folder:
        yield folder


# --- loop devices -------------------------------------------------------------------------------------------------------


def test_nobody_has_it(image: Path) -> None:
    assert kernel.look([str(image), str(image.parent / "not there")]) == kernel.Look((), ())


def test_a_loop_device_and_what_is_mounted_from_it(image: Path, tmp_path: Path) -> None:
    with loop(image) as device:
        detach = f"losetup -d {device}"
        assert told(image) == [(f"loop device {device}", detach)]
        with mounted(tmp_path / "a b", device) as place:
            what = f"loop device {device} (mounted on {place})"
            assert told(image) == [(what, f"umount '{place}' && {detach}")]
        assert [str(user) for user in holders.users([str(image)])] == [f"loop device {device}"]


def test_mounts_over_mounts_go_first(image: Path, tmp_path: Path) -> None:
    with loop(image) as device, mounted(tmp_path / "m", device) as place:
        (place / "in").mkdir()
        with mounted(place / "in", "--bind", place):
            ((_what, release),) = told(image)
            run("sh", "-c", release)
    assert told(image) == []


def test_a_file_is_known_whatever_it_is_called(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    os.link(image, other)
    with loop(image, "--offset", "4096", "--read-only") as device:
        assert told(other) == [(f"loop device {device}", f"losetup -d {device}")]
        shutil.copy(image, tmp_path / "new")
        os.rename(tmp_path / "new", image)
        assert (told(image), len(told(other))) == ([], 1)


@contextlib.contextmanager
def elsewhere(folder: Path, script: str, *arguments: str | Path) -> Iterator[str]:
    """A shell in a mount namespace of its own, where it stays when the script is done; yields what that said."""
    command = ["unshare", "--mount", "sh", "-ec", f"{script}\necho; read end", "sh", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder, text=True) as shell:
        assert shell.stdin is not None and shell.stdout is not None
        said = shell.stdout.readline().strip()
        if shell.poll() is not None:
            pytest.skip("no leave for another mount namespace")
        yield said
        shell.stdin.close()


def test_a_name_of_another_mount_namespace(shown: Path) -> None:
    """The kernel tells a name that means nothing here, or another file: it is asked for the file itself."""
    image = filesystem(shown / "disk.raw")
    (shown / "alias").mkdir()
    with loop(image):
        pass  # or it is skipped
    with elsewhere(shown, "mount --bind . alias && losetup --find --show $PWD/alias/disk.raw") as device:
        try:
            assert told(image) == [(f"loop device {device}", f"losetup -d {device}")]
            with as_nobody():
                look = kernel.look([str(image)])
            assert look.uses == ()
            assert f"{device} lies on {shown}/alias/disk.raw, which cannot be seen from here" in look.unseen
        finally:
            run("losetup", "--detach", device)


def test_everybody_is_told_of_loop_devices(shown: Path) -> None:
    image = filesystem(shown / "disk.raw")
    with loop(image) as device, as_nobody():
        assert told(image) == [(f"loop device {device}", f"losetup -d {device}")]


# --- block devices --------------------------------------------------------------------------------------------------------


def test_a_device_of_which_nothing_is_mounted(image: Path) -> None:
    with loop(image) as device:
        assert told(device) == []


def test_a_mounted_device_under_any_of_its_names(image: Path, tmp_path: Path) -> None:
    with loop(image) as device, mounted(tmp_path / "m", device) as place:
        os.mknod(tmp_path / "node", 0o600 | 0o060000, os.stat(device).st_rdev)
        (tmp_path / "link").symlink_to(device)
        for name in (device, tmp_path / "node", tmp_path / "link"):
            assert told(name) == [(f"mounted on {place}", f"umount {place}")]


def test_swap(tmp_path: Path, image: Path) -> None:
    run("mkswap", image)
    with loop(image) as device:
        if subprocess.run(["swapon", device], capture_output=True, check=False).returncode != 0:
            pytest.skip("no leave for swap")
        try:
            assert told(device) == [("swap", f"swapoff {device}")]
            assert told(image) == [(f"loop device {device} (swap)", f"swapoff {device} && losetup -d {device}")]
        finally:
            run("swapoff", device)


def test_a_partition_of_it_is_mounted(tmp_path: Path, image: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB) + image.read_bytes())
    with loop(disk, "--partscan") as device:
        run("addpart", device, "1", str(MIB // 512), str(8 * MIB // 512))
        assert told(device) == []
        with mounted(tmp_path / "m", f"{device}p1") as place:
            assert told(device) == [(f"mounted on {place}", f"umount {place}")]
            assert told(disk)[0][0] == f"loop device {device} (mounted on {place})"


def test_mounted_in_another_mount_namespace(image: Path, shown: Path) -> None:
    """Which our own list of mounts does not show; who may not open the device cannot know."""
    (shown / "m").mkdir()
    with loop(image) as device, elsewhere(shown, "mount $1 m", device):
        ((what, release),) = told(device)
        assert (what.startswith("the kernel, exclusively"), release) == (True, "")
        with as_nobody():
            look = kernel.look([device])
        assert look.uses == ()
        assert f"whether the kernel uses {device} cannot be seen: Permission denied" in look.unseen


def test_what_other_devices_are_made_of_it(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a copy of what sysfs shows where there is device-mapper and RAID: not every kernel of a test machine has them."""
    with loop(image) as device:
        number = os.stat(device).st_rdev
        mine = tmp_path / "sys" / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
        for name, dev in (("dm-3", "253:3"), ("md5", "9:5")):
            (mine / "holders" / name).mkdir(parents=True)
            (tmp_path / "sys" / "class" / "block" / name / "dm").mkdir(parents=True)
            (tmp_path / "sys" / "class" / "block" / name / "dev").write_text(f"{dev}\n")
            (tmp_path / "sys" / "dev" / "block" / dev / "holders").mkdir(parents=True)
        (tmp_path / "sys" / "class" / "block" / "dm-3" / "dm" / "name").write_text("vg-two\n")
        (tmp_path / "sys" / "dev" / "block" / "253:3" / "holders" / "md5").mkdir()
        (tmp_path / "sys" / "block").mkdir()
        monkeypatch.setattr(kernel, "SYS", str(tmp_path / "sys"))
        release = "mdadm --stop /dev/md5 && dmsetup remove vg-two"
        assert told(device) == [("device-mapper vg-two (RAID /dev/md5)", release)]


def test_without_sysfs_nothing_is_said(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in some containers."""
    monkeypatch.setattr(kernel, "SYS", str(tmp_path / "not-there"))
    look = kernel.look([str(image)])
    assert look.uses == ()
    assert "cannot be seen" in look.unseen[0]
