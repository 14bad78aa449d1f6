"""How a VM was started, next to what its images are now."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import advice
from rig.command import invoke
from rig.devices import loop
from rig.disks import Setup, blockdev, drive
from rig.machines import MIB, Content, machine, make_chain, run

import qmpmerge
from qmpmerge.images import files, notes, qcow2


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_chain(tmp_path, ["base.raw"])[0]


@pytest.fixture
def vm(tmp_path: Path, base: Path) -> Iterator[Setup]:
    with drive(tmp_path, [base], Content()) as setup:
        yield setup


def overlay(path: Path, below: Path, form: str) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", form, path)
    return path


def found(vm: Setup) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in advice.findings(vm.machine.target)}


def test_a_start_by_the_same_line_after_a_snapshot_and_after_a_pivot(vm: Setup, base: Path, tmp_path: Path) -> None:
    assert found(vm) == {}
    invoke("snapshot", vm.machine.target, f"vda={tmp_path}/a.qcow2")
    (one,) = found(vm).values()
    assert (one["name"], one["severity"], one["where"]) == ("launch-path", "note", str(base))
    assert one["fix"] == f"qmpmerge active {base}"
    assert invoke("commit", vm.machine.target).code == 0
    assert set(found(vm)) == {"stashed"}


@pytest.mark.parametrize(
    ("policy", "names"), [("stash", {"stashed", "launch-path"}), ("keep", {"stale-image", "launch-path"})]
)
def test_a_launch_path_that_was_merged_away(
    images: list[Path], content: Content, tmp_path: Path, policy: str, names: set[str]
) -> None:
    with drive(tmp_path, images, content) as vm:
        assert invoke("commit", vm.machine.target, "--merged-files", policy).code == 0
        told = found(vm)
        assert set(told) == names
        assert told["launch-path"]["where"] == str(images[3])
        assert invoke(*shlex.split(told["launch-path"]["fix"])[1:]).out == f"{images[0]}\n"


def test_a_launch_path_for_which_active_tells_no_image(vm: Setup, base: Path, tmp_path: Path) -> None:
    """A pull has gone on from what the base is used for again since: a script that asks fails too, and no fix says to ask."""
    night = overlay(tmp_path / "night.qcow2", base, "raw")
    vm.off()
    assert invoke("pull", str(night)).code == 0
    night.unlink()
    with drive(tmp_path, [base, overlay(night, base, "raw")], Content()) as again:
        assert invoke("commit", again.machine.target).code == 0
        told, refused = found(again)["launch-path"], invoke("active", str(night), "--json")
        assert (refused.document["error"]["name"], told["severity"], told["fix"]) == ("no-active", "care", None)
        assert all(refused.document["error"][word] in told["why"] for word in ("message", "hint"))


def test_a_chain_that_is_named_node_by_node(images: list[Path], content: Content, tmp_path: Path) -> None:
    with blockdev(tmp_path, images, content) as vm:
        assert found(vm) == {}
        invoke("snapshot", vm.machine.target, f"{vm.disk}={tmp_path}/d.qcow2")
        assert [(name, one["where"]) for name, one in found(vm).items()] == [("launch-path", str(images[3]))]


@pytest.mark.parametrize("place", [".", "far"])
def test_a_vm_that_was_started_stale(vm: Setup, base: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    night = overlay(tmp_path / place / "night.qcow2", base, "raw")
    if place != ".":
        notes.put_on(str(base), files.inode(str(base)), str(night))
    run("qemu-io", "-c", f"write -P 1 0 {MIB}", night)
    for _ in range(2):  # and once it has an overlay of its own
        stale = found(vm)["started-stale"]
        assert (stale["severity"], stale["fix"]) == ("harm", None)
        assert str(night) in stale["message"] and "holds 1." in stale["message"]
        invoke("snapshot", vm.machine.target, f"vda={tmp_path}/other.qcow2")


@pytest.mark.parametrize("place", [".", "far"])
def test_an_overlay_that_holds_nothing_may_go(vm: Setup, base: Path, tmp_path: Path, place: str) -> None:
    """What a snapshot leaves that was killed before QEMU put it on top."""
    (tmp_path / place).mkdir(exist_ok=True)
    night = overlay(tmp_path / place / "night.qcow2", base, "raw")
    if place != ".":
        notes.put_on(str(base), files.inode(str(base)), str(night))
    assert set(found(vm)) == {"empty-overlay"}
    advice.carry_out(vm.machine.target)
    assert found(vm) == {}
    assert invoke("active", str(base)).out == f"{base}\n"


def test_what_is_kept_goes_out_of_reach_time_and_again(vm: Setup, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    for number in (1, 2):
        assert invoke("snapshot", vm.machine.target, f"vda={path}").code == 0
        vm.write(number, 0, MIB)
        assert invoke("commit", vm.machine.target, "--merged-files", "keep").code == 0
        assert set(found(vm)) == {"stale-image"}
        advice.carry_out(vm.machine.target)
        assert not path.exists() and found(vm) == {}
    assert sorted(os.listdir(tmp_path / "stale")) == ["a.qcow2", "a.qcow2.~1~"]


def test_an_image_that_is_not_the_active_one(images: list[Path]) -> None:
    one = next(finding for finding in advice.findings(images[2]) if finding["name"] == "not-active")
    assert (one["where"], one["fix"]) == (str(images[2]), f"qmpmerge active {images[2]}")
    assert advice.typed(one["fix"]).stdout == f"{images[3]}\n"


def test_a_note_that_is_not_right(vm: Setup, base: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    night = overlay(tmp_path / "far" / "night.qcow2", base, "raw")
    path = notes.put_on(str(base), files.inode(str(base)), str(night))
    night.unlink()
    one = found(vm)["odd-note"]
    assert (one["where"], one["fix"], "is not there" in one["message"]) == (path, None, True)


def test_when_an_image_holds_nothing(tmp_path: Path, base: Path) -> None:
    night = str(overlay(tmp_path / "night.qcow2", base, "raw"))
    assert qcow2.is_empty(night)
    run("qemu-img", "snapshot", "-c", "first", night)
    assert not qcow2.is_empty(night)
    run("qemu-img", "snapshot", "-d", "first", night)
    assert qcow2.is_empty(night)
    run("qemu-io", "-c", "write -z 0 64k", night)
    assert not qcow2.is_empty(night)


def test_what_active_refuses_is_told_of_the_folder(images: list[Path], tmp_path: Path) -> None:
    """By the name alone it was put aside; no finding said so, and no VM was started any more."""
    assert advice.findings(tmp_path) == []
    images[3].rename(f"{images[3]}.merged")
    assert invoke("active", str(images[0])).code == 3
    (told,) = advice.findings(tmp_path)
    assert (told["name"], told["severity"], told["where"]) == ("no-active", "care", f"{images[3]}.merged")
    assert "find out what it holds" in told["why"]


def test_what_is_told_is_not_told_twice(base: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    far = overlay(tmp_path / "far" / "a.qcow2", base, "raw")
    notes.put_on(str(base), files.inode(str(base)), str(far))
    far.unlink()
    assert invoke("active", str(base)).code == 3
    (told,) = advice.findings(tmp_path)
    assert "is not there" in told["message"]


def test_an_active_image_on_a_loop_device_that_a_vm_uses(base: Path, tmp_path: Path) -> None:
    image = overlay(tmp_path / "dev.img", base, "raw")
    with loop(image) as device, machine(tmp_path, "-drive", f"file={device},format=qcow2,if=none,id=vda"):
        told = advice.findings(image)
    assert {one["name"] for one in told} == {"in-use"}
    assert any("VM" in one["message"] or "qemu" in one["message"] for one in told)
    assert not any("losetup" in (one["fix"] or "") for one in told)


def test_an_empty_overlay_that_was_made_for_a_snapshot_is_no_harm(vm: Setup, base: Path, tmp_path: Path) -> None:
    """With tables and room of its own, and still what `snapshot --reuse` takes."""
    assert invoke("snapshot", vm.machine.target, f"vda={tmp_path}/p.qcow2").code == 0
    options = ["-o", "preallocation=metadata,extended_l2=on"]
    prepared = tmp_path / "prepared.qcow2"
    run(
        "qemu-img",
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        base,
        "-F",
        "raw",
        *options,
        prepared,
        str(base.stat().st_size),
    )
    assert set(found(vm)) == {"launch-path", "empty-overlay"}


async def test_an_empty_overlay_on_which_another_is_built_is_needed(base: Path, tmp_path: Path) -> None:
    empty = overlay(tmp_path / "empty.qcow2", base, "raw")
    above = overlay(tmp_path / "above.qcow2", empty, "qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", above)
    with machine(tmp_path, "-drive", f"file={base},format=raw,if=none,id=vda") as vm:
        async with qmpmerge.live(vm.target) as target:
            found = await qmpmerge.examine(target)
    assert found and not any("rm " in (finding.fix or "") for finding in found)


def test_a_vm_that_runs_from_an_image_that_was_merged_and_kept_its_name(
    images: list[Path], content: Content, tmp_path: Path
) -> None:
    with drive(tmp_path, images, content) as vm:
        assert invoke("commit", vm.machine.target, "--merged-files", "keep").code == 0
    with drive(tmp_path, images, Content()) as vm:
        for _ in range(2):  # before the guest has written to it, and since
            stale = found(vm)["started-stale"]
            assert (stale["severity"], stale["where"], stale["fix"]) == ("harm", str(images[3]), None)
            assert f"merged into {images[0]}" in stale["message"]
            vm.write(9, 0, MIB)
    written = invoke("active", str(images[0]), "--json").document["error"]
    assert "it was written to since it was merged" in written["message"]
    advice.typed(written["hint"].split("`")[1]).check_returncode()
    assert invoke("active", str(images[0])).code == 0


def test_what_a_pull_has_left_is_not_stale(images: list[Path], content: Content, tmp_path: Path) -> None:
    """It shows what it always did: others may be started on it, and nothing moves it away."""
    with blockdev(tmp_path, images, content) as vm:
        assert invoke("pull", vm.machine.target, "--base", "[1]").code == 0
        assert found(vm) == {}
        theirs = tmp_path / "other"
        theirs.mkdir()
        other = overlay(theirs / "other.qcow2", images[2], "qcow2")
        with drive(theirs, [other], Content()) as second:
            assert set(found(second)) == {"dependent"}  # a merge would change what the first VM sees
            told = {finding["name"] for finding in advice.findings(str(tmp_path))}
    assert not told & {"stale-image", "started-stale"}, told


def test_the_command_of_a_pull_tells_whether_an_old_file_may_go(tmp_path: Path) -> None:
    """Who is built on it in another folder is known as long as he runs, or where the folder is named."""
    golden, disk = make_chain(tmp_path, ("golden.qcow2", "a.qcow2"))
    theirs = tmp_path / "other"
    theirs.mkdir()
    other = overlay(theirs / "other.qcow2", golden, "qcow2")
    hint = invoke("pull", str(disk), "--json").document["hints"][-1]
    command = hint.split("`")[1]
    assert command == f"qmpmerge doctor {golden}" and "--search FOLDER" in hint and "merge" not in hint.split("`")[2]
    with drive(theirs, [other], Content()):
        assert str(other) in invoke(*shlex.split(command)[1:]).out
    assert str(other) not in invoke(*shlex.split(command)[1:]).out
    assert str(other) in invoke(*shlex.split(command)[1:], "--search", str(theirs)).out


def test_a_snapshot_of_a_vm_that_was_started_stale_is_warned_of(vm: Setup, base: Path, tmp_path: Path) -> None:
    night = overlay(tmp_path / "night.qcow2", base, "raw")
    run("qemu-io", "-c", f"write -P 1 0 {MIB}", night)
    told = invoke("snapshot", vm.machine.target, f"vda={tmp_path}/new.qcow2", "--json").document
    assert (
        told["verdict"] == "created" and str(night) in told["hints"][0] and "to which the VM wrote" in told["hints"][0]
    )


def test_what_an_image_is_below_is_asked_only_where_there_is_one_answer(images: list[Path], tmp_path: Path) -> None:
    def told() -> list[str | None]:
        return [one["fix"] for one in advice.findings(images[0]) if one["name"] == "not-active"]

    assert told() == [f"qmpmerge active {images[0]}"]
    overlay(tmp_path / "other.qcow2", images[0], "raw")
    assert told() == [None, None]
