"""A folder with all that is below: what is looked at, what is not, and that this is said."""

import os
import shlex
import shutil
from pathlib import Path

import pytest
from rig import advice
from rig.command import invoke
from rig.devices import mounted
from rig.disks import drive
from rig.machines import Content, make_chain, run
from rig.nobody import as_nobody, public

import qmpmerge
from qmpmerge.doctor.findings import Finding
from qmpmerge.errors import CannotList

SHORT = ["base.raw", "a.qcow2"]


async def found(folder: Path) -> dict[str, Finding]:
    told = await qmpmerge.examine(folder)
    assert len({finding.name for finding in told}) == len(told), told
    return {finding.name: finding for finding in told}


def chain(folder: Path, names: list[str] = SHORT) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return make_chain(folder, names)


def break_chain(folder: Path) -> Path:
    """A chain that no VM can be started on; its active image."""
    base, active = chain(folder)
    base.unlink()
    return active


async def test_folders_below_are_looked_at(tmp_path: Path) -> None:
    chain(tmp_path)
    broken = break_chain(tmp_path / "deep" / "deeper")
    assert {name: one.where for name, one in (await found(tmp_path)).items()} == {"image-unreadable": str(broken)}


async def test_links_to_folders_are_not_followed_and_come_to_an_end(tmp_path: Path) -> None:
    chain(tmp_path / "vm")
    break_chain(tmp_path / "elsewhere")
    os.symlink("..", tmp_path / "vm" / "up")
    os.symlink(tmp_path / "elsewhere", tmp_path / "vm" / "away")
    assert await found(tmp_path / "vm") == {}


async def test_an_image_with_two_names_is_one(tmp_path: Path) -> None:
    _base, active = chain(tmp_path)
    os.symlink(active.name, tmp_path / "link.qcow2")
    os.link(active, tmp_path / "hard.qcow2")
    assert "shared-image" not in await found(tmp_path)


async def test_a_base_in_another_folder_below_is_no_stranger(tmp_path: Path) -> None:
    (base,) = chain(tmp_path / "golden", ["base.raw"])
    (tmp_path / "vms").mkdir()
    for name in ("a", "b"):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "vms" / f"{name}.qcow2")
    (shared,) = (await found(tmp_path)).values()
    assert (shared.name, shared.severity, shared.where) == ("shared-image", "note", str(base))


async def test_of_many_images_on_one_some_are_named(tmp_path: Path) -> None:
    _base, active = chain(tmp_path)
    for number in range(11):
        shutil.copy(active, tmp_path / f"more{number}.qcow2")
    shared = (await found(tmp_path))["shared-image"]
    assert shared.severity == "care" and shared.message.endswith(" and 2 more")


async def test_what_was_put_out_of_reach_is_not_looked_into(tmp_path: Path) -> None:
    chain(tmp_path)
    break_chain(tmp_path / "stale")
    (told,) = (await found(tmp_path)).values()
    assert (told.name, told.severity, told.where) == ("out-of-reach", "note", str(tmp_path / "stale"))


async def test_a_folder_that_cannot_be_listed_is_said() -> None:
    with public() as folder:
        chain(folder / "open")
        closed = break_chain(folder / "closed").parent
        await qmpmerge.examine(folder)  # nobody may not import what is needed
        closed.chmod(0)
        with as_nobody():
            (told,) = (await found(folder)).values()
            assert (told.severity, told.where) == ("care", str(closed)) and "cannot be listed" in told.message
            with pytest.raises(CannotList):
                await qmpmerge.examine(closed)
        closed.chmod(0o755)


async def test_another_filesystem_is_not_entered_and_told_with_the_command_that_does(tmp_path: Path) -> None:
    with mounted(tmp_path / "mounted", "-t", "tmpfs", "none") as mount:
        broken = break_chain(mount / "vm")
        told = (await found(tmp_path))["not-looked-at"]
        assert (told.severity, told.where) == ("care", str(mount))
        done = invoke(*shlex.split(told.fix or "")[1:], "--json")
        assert [one["where"] for one in done.document["findings"]] == [str(broken)]


async def test_images_of_a_vm_are_looked_at_once(tmp_path: Path) -> None:
    images = make_chain(tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", tmp_path / "old.qcow2")
    (tmp_path / ".base.raw.qmpmerge-lock").touch()
    with drive(tmp_path, images, Content()) as vm:
        document = invoke("doctor", str(tmp_path), vm.machine.target, "--json").document
        assert document["looked_at"] == {"vms": 1, "images": 5}
        assert [one["target"] for one in document["targets"]] == [str(tmp_path), vm.machine.target]
        told = [(one["name"], one["target"]) for one in document["findings"]]
        assert {"in-use", "old-lock"} <= advice.names(tmp_path)
    assert [one for one in told if one[0] in ("in-use", "old-lock")] == [("old-lock", vm.machine.target)]
