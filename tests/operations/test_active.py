"""`active`: the one image that a VM must be started from, whatever was done to its chain, or a loud no."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import advice, kills, nobody
from rig.command import COMMAND, invoke, scripted
from rig.devices import loop
from rig.disks import Setup, device, drive
from rig.machines import MIB, SIZE, Content, machine, make_chain, run

import qmpmerge
from qmpmerge.errors import ActiveUnknown, NoActive, SeveralActive
from qmpmerge.images import files, notes


def active(path: Path) -> str:
    return Path(qmpmerge.active(path).file).name


def overlay(path: Path, below: Path | str, form: str = "qcow2") -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", form, path, str(SIZE))
    return path


# --- headers ------------------------------------------------------------------------------------------------------


def test_any_image_of_the_chain_and_its_folder_lead_to_the_active_one(images: list[Path], tmp_path: Path) -> None:
    for path in (*images, tmp_path):
        told = invoke("active", str(path))
        assert (told.code, told.out, told.err) == (0, f"{images[3]}\n", "")
    document = invoke("active", str(images[0]), "--json").document
    assert document == {
        "schema": 1,
        "command": "active",
        "verdict": "done",
        "file": str(images[3]),
        "format": "qcow2",
        "drive": f"file={images[3]},format=qcow2",
    }


def test_a_raw_image_alone(tmp_path: Path) -> None:
    (base,) = make_chain(tmp_path, ["base.raw"])
    assert (qmpmerge.active(base).file, qmpmerge.active(base).format) == (str(base), "raw")
    assert active(tmp_path) == "base.raw"


def test_no_program_is_run_and_nothing_is_written(images: list[Path], tmp_path: Path) -> None:
    before = {(path, path.stat().st_ino, path.stat().st_ctime_ns) for path in tmp_path.iterdir()}
    program = "import sys, qmpmerge; sys.addaudithook(lambda e, a: e == 'subprocess.Popen' and sys.exit(9)); "
    run(sys.executable, "-c", program + "print(qmpmerge.active(sys.argv[1]))", images[0])
    assert {(path, path.stat().st_ino, path.stat().st_ctime_ns) for path in tmp_path.iterdir()} == before


def test_more_than_one_leaf(images: list[Path], tmp_path: Path) -> None:
    """A golden image with an overlay for each VM: only that of one VM says which."""
    other = overlay(tmp_path / "vm2.qcow2", "base.raw", "raw")
    told = invoke("active", str(images[0]), "--json")
    assert (told.code, told.document["error"]["name"]) == (3, "several-active")
    assert told.document["error"]["facts"]["images"] == [str(images[3]), str(other)]
    assert invoke("active", str(tmp_path)).code == 3
    assert (active(images[1]), active(other)) == ("c.qcow2", "vm2.qcow2")


def test_two_chains_in_a_folder(images: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copy(images[0], tmp_path / "other.raw"))
    with pytest.raises(SeveralActive) as found:
        qmpmerge.active(tmp_path)
    assert found.value.images == [str(images[3]), str(other)]
    assert active(images[0]) == "c.qcow2"


def test_what_is_no_image_is_passed_over(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "vm.log").write_text("QFI is what qcow2 begins with")
    (tmp_path / "broken.qcow2").write_bytes(b"QFI\xfb" + bytes(8))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert active(tmp_path) == "c.qcow2"


# --- whose first bytes these are ----------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    """What is said where nothing is told."""
    told = invoke("active", str(path), "--json")
    assert (told.code, told.document["error"]["name"]) == (3, "no-active"), told.out
    return f"{told.document['error']['message']}: {told.document['error']['hint']}"


@pytest.mark.parametrize("name", ["vm1.img", "vm1.raw", "vm1.iso", "vm1"])
def test_a_guest_cannot_say_from_which_image_another_vm_is_started(tmp_path: Path, name: str) -> None:
    """A raw image's guest writes a header into it that names the image of another VM in the same folder."""
    (base,) = make_chain(tmp_path, ["vm2.raw"])
    evil = overlay(tmp_path / name, base, "raw")
    assert str(evil) in refusal(base) and "a folder of its own" in refusal(base)
    (tmp_path / "own").mkdir()
    evil.rename(tmp_path / "own" / name)  # as the hint says
    assert active(base) == "vm2.raw"


def test_nor_with_a_header_of_another_format(tmp_path: Path) -> None:
    (base,) = make_chain(tmp_path, ["vm2.qcow2"])
    run("qemu-img", "create", "-q", "-f", "qed", "-b", base, "-F", "qcow2", tmp_path / "vm1.img")
    assert "vm1.img" in refusal(base)


def test_a_guest_cannot_say_of_which_format_its_own_image_is(tmp_path: Path) -> None:
    """`format=qcow2` for a raw image: its header may name any file of the host."""
    image = tmp_path / "vm1.img"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    for path in (image, tmp_path):
        assert ".qcow2" in refusal(path)
    os.truncate(image, MIB)
    raw, qcow2 = image.rename(tmp_path / "vm1.raw"), tmp_path / "vm1.qcow2"
    assert qmpmerge.active(raw).format == "raw"
    raw.rename(qcow2)
    assert qmpmerge.active(qcow2).format == "qcow2"


@pytest.mark.parametrize("name", ["a.raw", "a.img", "a.snap1"])
def test_an_overlay_that_is_not_called_like_one(tmp_path: Path, name: str) -> None:
    """Nobody but its maker knows that it is one; what is built on it records that."""
    (base,) = make_chain(tmp_path, ["base.raw"])
    middle = overlay(tmp_path / name, base, "raw")
    assert str(middle) in refusal(base)
    overlay(tmp_path / "b.qcow2", middle)
    assert active(base) == active(middle) == active(tmp_path) == "b.qcow2"


def test_what_a_header_above_records_wins(tmp_path: Path) -> None:
    """An image whose guest has written a header, and which the overlay on it records as raw, is built on nothing."""
    (other,) = make_chain(tmp_path, ["vm2.raw"])
    evil = overlay(tmp_path / "vm1.img", other, "raw")
    top = overlay(tmp_path / "vm1.qcow2", evil, "raw")
    assert (active(other), active(evil), active(top)) == ("vm2.raw", "vm1.qcow2", "vm1.qcow2")


def test_what_is_no_image(tmp_path: Path) -> None:
    """What any other path led to was printed with `raw`."""
    run("qemu-img", "create", "-q", "-f", "vmdk", tmp_path / "v.vmdk", "1M")
    (tmp_path / "passwd").write_text("root:x:0:0")
    assert "vmdk" in refusal(tmp_path / "v.vmdk")
    assert "512" in refusal(tmp_path / "passwd")
    fill_up = invoke("active", str(tmp_path / "passwd"), "--json").document["error"]["hint"].split("`")[1]
    assert advice.typed(fill_up).returncode == 0 and (tmp_path / "passwd").stat().st_size == 512
    assert active(tmp_path / "passwd") == "passwd"
    (convert,) = invoke("active", str(tmp_path / "v.vmdk"), "--json").document["error"]["hint"].split("`")[1::2]
    assert advice.typed(convert).returncode == 0 and active(tmp_path / "v.vmdk.qcow2") == "v.vmdk.qcow2"
    assert "regular file" in refusal(Path("/dev/null"))
    for arguments in (("active", ""), ("active", "", "--json")):
        assert invoke(*arguments).code == 2


def test_the_drive_option(tmp_path: Path) -> None:
    """The name of the launch script; QEMU reads a comma as the end of a value."""
    (base,) = make_chain(tmp_path, ["base.raw"])
    top = overlay(tmp_path / "a,b.qcow2", base, "raw")
    told = invoke("active", "--drive", str(base))
    assert (told.code, told.out) == (0, f"file={tmp_path}/a,,b.qcow2,format=qcow2\n")
    with machine(tmp_path, "-drive", f"{told.out.strip()},if=none,id=vda", *device("vda")) as vm:
        assert invoke("disks", vm.target, "--json").document["disks"][0]["file"] == str(top)


def test_a_reply_that_nobody_got_is_a_failure(images: list[Path]) -> None:
    """A launch script would start with an empty name."""
    for words in ("active", "active --json"):
        command = f'"{sys.executable}" -m qmpmerge {words} "{images[0]}" > /dev/full'
        assert subprocess.run(["sh", "-c", command], capture_output=True, check=False).returncode == 5


def test_a_folder_with_two_disks(tmp_path: Path) -> None:
    for name in ("vda.raw", "vdb.raw"):
        make_chain(tmp_path, [name])
    told = invoke("active", str(tmp_path))
    assert told.code == 3 and "separate disks" in told.err
    overlay(tmp_path / "1.qcow2", "vda.raw", "raw")
    overlay(tmp_path / "2.qcow2", "vda.raw", "raw")
    told = invoke("active", str(tmp_path))
    assert told.code == 3 and "separate disks" not in told.err


def test_a_base_that_is_a_device(tmp_path: Path) -> None:
    """A note beside it would be gone at the next boot, and then the device was told, without its overlay."""
    with loop(make_chain(tmp_path, ["disk.raw"])[0]) as path:
        base, far = Path(path), tmp_path / "far"
        far.mkdir()
        before = set(Path("/dev").glob(".*qmpmerge*"))
        with machine(tmp_path, "-drive", f"file={base},format=raw,if=none,id=vda", *device("vda")) as vm:
            told = invoke("snapshot", vm.target, f"vda={far}/a.qcow2")
            assert told.code == 0 and "device" in told.err
            assert f"for launch scripts: `qmpmerge active {far}/a.qcow2`" in told.err
            assert not set(Path("/dev").glob(f".{base.name}.*qmpmerge-overlay")) - before
            assert "overlay" in refusal(base)
            assert active(far / "a.qcow2") == active(far) == "a.qcow2"
            assert invoke("commit", vm.target, "--base", path).code == 0
            assert active(far / "a.qcow2") == active(far) == base.name
            assert qmpmerge.active(far).format == "raw"
            assert invoke("snapshot", vm.target, f"vda={far}/b.qcow2").code == 0
            assert active(far / "a.qcow2") == active(far) == "b.qcow2"


def test_a_folder_that_may_not_be_listed() -> None:
    """The hint was a usage error of `recover`."""
    with nobody.public() as folder:
        (base,) = make_chain(folder, ["base.raw"])
        folder.chmod(0o711)
        with nobody.as_nobody():
            for path in (base, folder):
                with pytest.raises(NoActive) as found:
                    qmpmerge.active(path)
                assert "cannot be listed" in str(found.value) and "run it as a user who may" in found.value.hint


def test_a_symlink_leads_to_what_is_built_on_the_file(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "disk"
    link.symlink_to(images[1])
    assert active(link) == "c.qcow2"
    (tmp_path / "a-name-before-c").symlink_to(images[3])
    assert active(link) == "c.qcow2"


def test_nothing_there_an_empty_folder_and_a_broken_chain(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "empty"):
        told = invoke("active", str(path), "--json")
        assert (told.code, told.document["error"]["name"]) == (3, "no-active")
    images[0].unlink()
    with pytest.raises(NoActive) as found:
        qmpmerge.active(images[2])
    assert str(images[0]) in str(found.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_an_overlay_of_a_stranger_is_not_the_one(images: list[Path], tmp_path: Path) -> None:
    """In a folder that all may write to anybody can put an overlay on our image."""
    planted = overlay(tmp_path / "planted.qcow2", "c.qcow2")
    os.chown(planted, 65534, 65534)
    with pytest.raises(NoActive) as found:
        qmpmerge.active(images[0])
    assert "another user" in str(found.value)
    assert active(planted) == "planted.qcow2"


def test_a_stash_in_the_way(images: list[Path], tmp_path: Path) -> None:
    """What is built on a name that a merge has taken away: whether base or that is right cannot be told from here."""
    invoke("commit", str(images[3]), "--top", "[2]")
    assert active(images[0]) == "c.qcow2"
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "a.qcow2", images[2])
    for path in (images[0], images[2], images[3], tmp_path):
        with pytest.raises(NoActive):
            qmpmerge.active(path)


def test_what_is_only_called_like_a_stashed_image(images: list[Path]) -> None:
    images[3].rename(f"{images[3]}.merged")
    with pytest.raises(NoActive) as found:
        qmpmerge.active(images[0])
    assert "nothing says" in str(found.value)


# --- live ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_chain(tmp_path, ["base.raw"])[0]


@pytest.fixture
def vm(tmp_path: Path, base: Path) -> Iterator[Setup]:
    with drive(tmp_path, [base], Content()) as setup:
        yield setup


def now(vm: Setup) -> str:
    """Where the guest's writes go, as QEMU tells it."""
    return str(invoke("disks", vm.machine.target, "--json").document["disks"][0]["file"])


def put(vm: Setup, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    assert invoke("snapshot", vm.machine.target, f"vda={path}").code == 0


def all_lead_to_what_the_guest_uses(vm: Setup, *paths: Path) -> None:
    for path in paths:
        told = invoke("active", str(path))
        assert (told.code, told.out.strip()) == (0, now(vm)), (path, told.err)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*qmpmerge*"))


@pytest.mark.parametrize(("place", "policy"), [(".", "stash"), (".", "keep"), ("far", "delete"), ("far", "keep")])
def test_snapshots_and_merges(vm: Setup, base: Path, tmp_path: Path, place: str, policy: str) -> None:
    """Whatever is merged, from whichever image one asks."""
    overlays = [tmp_path / place / f"{name}.qcow2" for name in "abc"]
    there = [base]
    for number, path in enumerate(overlays):
        put(vm, path)
        there.append(path)
        all_lead_to_what_the_guest_uses(vm, *there)
        vm.write(0x11 + number, number * MIB, MIB)
    assert len(left(tmp_path)) == (1 if place == "far" else 0)
    middle = invoke("commit", vm.machine.target, "--base", str(base), "--top", "[3]", "--merged-files", policy)
    assert middle.code == 0, middle.err
    all_lead_to_what_the_guest_uses(vm, base, overlays[2], *(overlays[:2] if policy != "delete" else []))
    pivot = invoke("commit", vm.machine.target, "--base", str(base), "--merged-files", policy, "--force", "dependents")
    assert pivot.code == 0, pivot.err
    assert now(vm) == str(base)
    all_lead_to_what_the_guest_uses(vm, base, *(overlays if policy != "delete" else []))
    all_lead_to_what_the_guest_uses(vm, *tmp_path.rglob("*.merged"))
    assert not [name for name in left(tmp_path) if "overlay" in name]
    if policy != "keep":
        put(vm, overlays[2])
        all_lead_to_what_the_guest_uses(vm, base, overlays[2])


@pytest.mark.parametrize("place", [".", "far"])
def test_a_pull_changes_nothing_of_what_is_started(vm: Setup, base: Path, tmp_path: Path, place: str) -> None:
    """Whatever is pulled, from whichever image one asks, until others use what the pull has left."""
    overlays = [tmp_path / place / f"{name}.qcow2" for name in "abcd"]
    for path in overlays[:3]:
        put(vm, path)
    for asked in (["--base", "[1]"], []):
        assert invoke("pull", vm.machine.target, *asked).code == 0
        all_lead_to_what_the_guest_uses(vm, base, *overlays[:3], *([tmp_path] if place == "." else []))
        told = invoke("doctor", vm.machine.target, str(tmp_path), "--json").document["findings"]
        assert {one["name"] for one in told} <= {"launch-path", "shared-image"}, told
    put(vm, overlays[3])
    assert invoke("pull", vm.machine.target, "--merged-files", "stash").code == 0
    all_lead_to_what_the_guest_uses(vm, base, *overlays[:2], overlays[3])
    other = overlay(tmp_path / "other.qcow2", base, "raw")
    assert invoke("active", str(base)).code == 3
    assert invoke("active", str(other)).out.strip() == str(other)
    vm.off()
    overlays[3].unlink()
    told = invoke("active", str(overlays[0]))
    assert told.code == 3 and "left by a pull" in told.err, told.err


def test_what_a_pull_has_left_leads_on_when_what_it_leads_to_is_pulled_itself(tmp_path: Path) -> None:
    """However that goes: with the pull, with `clean`, by hand. No hint helps an old one to a start."""
    (first, last), folder = make_chain(tmp_path, ["l0.qcow2", "l1.qcow2"]), str(tmp_path)
    assert invoke("pull", str(last)).code == 0
    for number, policy in enumerate(("keep", "delete", "stash"), 2):
        last, gone = overlay(tmp_path / f"l{number}.qcow2", last), last
        assert invoke("pull", str(last), "--merged-files", policy).code == 0
        if policy == "keep":
            gone.unlink()
        elif policy == "stash":
            assert invoke("clean", folder).code == 0
        assert [invoke("active", place).out.strip() for place in (str(first), folder)] == [str(last)] * 2, policy
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f".l0.qcow2.{last.stat().st_ino:x}.qmpmerge-pulled",
        "l0.qcow2",
        "l4.qcow2",
    ]
    last.unlink()
    told = invoke("active", str(first))
    assert (told.code, "rm " in told.err, f"{first} holds older data" in " ".join(told.err.split())) == (3, False, True)


@pytest.mark.parametrize("policy", ["keep", "stash"])
def test_what_two_were_pulled_off_leads_to_neither(tmp_path: Path, policy: str) -> None:
    """Two VMs on one base, both pulled off it, and also when one of them is merged away then."""
    base, first = make_chain(tmp_path, ["base.qcow2", "first.qcow2"])
    other = overlay(tmp_path / "other.qcow2", base)
    for image, what in ((first, "keep"), (other, policy)):
        assert (invoke("pull", str(image), "--merged-files", what).code, invoke("active", str(base)).code) == (0, 3)
    last = overlay(tmp_path / "last.qcow2", other)
    assert invoke("commit", str(last), "--merged-files", "delete", "--yes").code == 0
    told = invoke("active", str(base))
    assert told.code == 3 and str(first) in told.err and str(other) in told.err, told.err
    assert [active(image) for image in (first, other)] == ["first.qcow2", "other.qcow2"]


def test_who_once_was_pulled_off_a_base_is_not_who_goes_on_from_it(tmp_path: Path) -> None:
    """The first VM is pulled off, the other merged into the base: it names neither until somebody says whose it is."""
    base, first = make_chain(tmp_path, ["base.qcow2", "first.qcow2"])
    other = overlay(tmp_path / "other.qcow2", base)
    assert invoke("pull", str(first)).code == 0
    merged = invoke("commit", str(other), "--yes")
    cure = " ".join(merged.err.split()).partition("for them, `")[2].partition("`")[0]
    told = [invoke("active", str(place)) for place in (base, other, tmp_path)]
    assert [(one.code, cure in " ".join(one.err.split())) for one in told] == [(3, True)] * 3, (cure, told)
    assert active(first) == "first.qcow2"
    subprocess.run(cure, shell=True, check=True)
    assert [active(image) for image in (base, first, other)] == ["base.qcow2", "first.qcow2", "base.qcow2"]


def test_an_image_left_by_a_pull_that_is_written_to_leads_nowhere(tmp_path: Path) -> None:
    """Somebody's VM writes to it. A pull into it changes nothing of that, and nothing of what nobody writes to."""
    base, middle, other = make_chain(tmp_path, ["base.qcow2", "middle.qcow2", "other.qcow2"])
    last = overlay(tmp_path / "last.qcow2", middle)
    assert invoke("pull", str(last)).code == 0
    other.unlink()
    top = overlay(tmp_path / "top.qcow2", middle)
    assert invoke("pull", str(top), "--top", str(middle)).code == 0
    assert invoke("active", str(middle)).code == 3
    top.unlink()
    assert [active(image) for image in (base, middle)] == ["last.qcow2"] * 2
    for command in (["qemu-io", "-c", "write -P 7 0 64k", middle], [COMMAND, "pull", middle]):
        run(*map(str, command))
        for path in (base, middle, tmp_path):
            told = invoke("active", str(path))
            assert (told.code, f"{middle} was written to since" in " ".join(told.err.split())) == (3, True), told.err
        assert active(last) == "last.qcow2"


def test_a_kept_image_that_is_used_again_is_a_no(vm: Setup, base: Path, tmp_path: Path) -> None:
    put(vm, tmp_path / "a.qcow2")
    assert invoke("commit", vm.machine.target, "--merged-files", "keep").code == 0
    assert active(base) == "base.raw"
    vm.off()
    run("qemu-io", "-c", "write -P 7 0 64k", tmp_path / "a.qcow2")
    for path in (base, tmp_path / "a.qcow2", tmp_path):
        with pytest.raises(NoActive) as found:
            qmpmerge.active(path)
        assert "written to since" in str(found.value)


def test_a_base_that_was_merged_itself(vm: Setup, base: Path, tmp_path: Path) -> None:
    """What was kept of it knows its name of then, as does its header."""
    for name in ("a.qcow2", "b.qcow2", "c.qcow2"):
        put(vm, tmp_path / name)
        vm.write(0x11, 0, MIB)
    for range in (
        ["--base", "[2]", "--top", "[3]", "--merged-files", "keep"],
        ["--top", "[2]", "--force", "dependents"],
    ):
        assert invoke("commit", vm.machine.target, *range).code == 0
        all_lead_to_what_the_guest_uses(vm, base, tmp_path / "b.qcow2", tmp_path / "c.qcow2", tmp_path)


def test_a_kept_name_may_be_used_again(vm: Setup, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    put(vm, path)
    assert invoke("commit", vm.machine.target, "--merged-files", "keep").code == 0
    path.unlink()
    put(vm, path)
    all_lead_to_what_the_guest_uses(vm, base, path)


@pytest.mark.parametrize("name", ["a.raw", "a.img", "a"])
def test_a_snapshot_notes_an_overlay_that_is_not_called_like_one(
    vm: Setup, base: Path, tmp_path: Path, name: str
) -> None:
    """It was told as raw, or not at all: the VM was started from the image below."""
    path = tmp_path / name
    put(vm, path)
    all_lead_to_what_the_guest_uses(vm, base, path)
    assert (qmpmerge.active(base).format, active(base)) == ("qcow2", name)
    put(vm, tmp_path / "b.qcow2")
    assert invoke("commit", vm.machine.target, "--base", str(path)).code == 0
    all_lead_to_what_the_guest_uses(vm, base, path)
    assert invoke("commit", vm.machine.target).code == 0
    all_lead_to_what_the_guest_uses(vm, base, path)
    assert not [name for name in left(tmp_path) if "overlay" in name]


def test_snapshot_tells_the_launch_path(vm: Setup, base: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    told = invoke("snapshot", vm.machine.target, f"vda={first}")
    assert "start the VM from it from now on" in told.out and str(base) in told.out
    assert f"qmpmerge active {base}" in told.err
    third = invoke("snapshot", vm.machine.target, f"vda={tmp_path}/c.qcow2")
    assert f"for launch scripts: `qmpmerge active {base}`" in third.err
    (made,) = invoke("snapshot", vm.machine.target, f"vda={second}", "--json").document["overlays"]
    assert (made["file"], made["backing_file"]) == (str(second), f"{tmp_path}/c.qcow2")


# --- notes --------------------------------------------------------------------------------------------------------


def test_a_note_that_does_not_agree_is_a_no(vm: Setup, base: Path, tmp_path: Path) -> None:
    far = tmp_path / "far" / "a.qcow2"
    put(vm, far)
    (note,) = tmp_path.glob(".*qmpmerge-overlay")
    away = far.rename(tmp_path / "moved")
    with pytest.raises(NoActive):  # perhaps its filesystem is not mounted
        qmpmerge.active(base)
    far.write_bytes(b"another file")
    with pytest.raises(NoActive):
        qmpmerge.active(base)
    away.rename(far)
    assert active(base) == "a.qcow2"
    note.write_text("{}")
    with pytest.raises(NoActive):
        qmpmerge.active(base)
    note.unlink()
    note.symlink_to(far)
    with pytest.raises(NoActive):
        qmpmerge.active(base)


def test_folders_that_were_restored(vm: Setup, base: Path, tmp_path: Path) -> None:
    """Names, headers and notes are what they were, inode numbers are not; the hint was to remove the note."""
    far = tmp_path / "far" / "a.qcow2"
    put(vm, far)
    vm.off()
    inode = far.stat().st_ino
    backup = (tmp_path / "far").rename(tmp_path / "backup")
    run("cp", "-a", backup, tmp_path / "far")
    shutil.rmtree(backup)
    assert far.stat().st_ino != inode
    assert qmpmerge.active(base).file == str(far)


def test_who_starts_a_vm_need_not_be_who_has_merged() -> None:
    """The notes are for all who may look at the images."""
    with nobody.public() as folder:
        base, a, b = (folder / name for name in ("base.qcow2", "a.qcow2", "b.qcow2"))
        run("qemu-img", "create", "-qf", "qcow2", base, str(SIZE))
        overlay(a, base.name)
        overlay(b, a.name)
        assert invoke("commit", str(b)).code == 0
        with nobody.as_nobody():
            assert qmpmerge.active(b).file == str(base)
            assert qmpmerge.active(folder).file == str(base)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_note_of_a_stranger_is_not_believed(vm: Setup, base: Path, tmp_path: Path) -> None:
    put(vm, tmp_path / "far" / "a.qcow2")
    (note,) = tmp_path.glob(".*qmpmerge-overlay")
    os.chown(note, 65534, 65534)
    with pytest.raises(NoActive):
        qmpmerge.active(base)


def test_a_snapshot_that_is_refused_leaves_no_note(vm: Setup, base: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    vm.machine.session.execute(
        "blockdev-add", driver="null-co", node_name="elsewhere", read_only=True
    )  # two disks, the second of which cannot be taken
    two = invoke("snapshot", vm.machine.target, f"vda={tmp_path}/far/a.qcow2", f"elsewhere={tmp_path}/far/b.qcow2")
    assert two.code == 3
    assert left(tmp_path) == [] and not list((tmp_path / "far").iterdir())
    assert active(base) == "base.raw"


def test_a_place_that_takes_no_note_is_told(
    vm: Setup, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far").mkdir()
    far = tmp_path / "far" / "a.qcow2"
    (tmp_path / f".{base.name}.blocker").mkdir()
    long = tmp_path / f"{'n' * 240}.raw"
    base.rename(long)
    vm.machine.stop()
    with machine(tmp_path, "-drive", f"file={long},format=raw,if=none,id=vda", *device("vda")) as again:
        told = invoke("snapshot", again.target, f"vda={far}", "--json")
    assert told.code == 0
    assert "could not be noted" in told.document["hints"][0]


MOMENTS = ("=> put_on #1", "<= put_on #1", "-> blockdev-add #1", "-> transaction #1", "<- transaction #1")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("place", [".", "far"])
def test_a_snapshot_killed_anywhere(vm: Setup, base: Path, tmp_path: Path, place: str, moment: str) -> None:
    """What `active` names afterwards shows all that was written until then, and what the guest writes is not lost."""
    (tmp_path / place).mkdir(exist_ok=True)
    vm.write(0x11, 0, MIB)
    arguments = ["snapshot", vm.machine.target, f"vda={tmp_path / place}/a.qcow2"]
    scripted(kills.__file__, tmp_path / "moments", "tool", moment, *arguments)
    reached = kills.KILLED in (tmp_path / "moments").read_text()
    assert reached or (moment in MOMENTS[:2] and place == "."), moment
    if now(vm) != str(base):
        vm.write(0x22, MIB, MIB)
    vm.off()
    told = qmpmerge.active(base)
    vm.content.check(told.file, told.format)


def test_a_merge_that_is_not_finished(base: Path, vm: Setup, tmp_path: Path) -> None:
    for name in ("far/a.qcow2", "far/b.qcow2"):
        put(vm, tmp_path / name)
        vm.write(0x11, 0, MIB)
    ready = invoke("commit", vm.machine.target, "--base", str(base), "--wait-ready", "--json")
    assert ready.document["verdict"] == "ready"
    vm.machine.kill()
    for path in (base, tmp_path / "far" / "a.qcow2", tmp_path / "far" / "b.qcow2", tmp_path / "far"):
        told = invoke("active", str(path), "--json")
        assert (told.code, told.document["error"]["name"]) == (6, "active-unknown"), path
    assert invoke("recover", str(base)).code == 0
    assert active(base) == "b.qcow2"


def test_a_record_that_is_not_believed(images: list[Path]) -> None:
    (images[3].parent / ".c.qcow2.qmpmerge-record").write_text("{}")
    for path in images:
        with pytest.raises(ActiveUnknown):
            qmpmerge.active(path)


def test_the_notes_are_small_files_of_ours(base: Path, tmp_path: Path) -> None:
    far = overlay(tmp_path / "far.qcow2", base, "raw")
    path = Path(notes.put_on(str(base), files.inode(str(base)), str(far)))
    told = json.loads(path.read_text())
    assert (told, path.stat().st_mode & 0o777) == ({"overlay": str(far), "inode": far.stat().st_ino}, 0o644)
    assert files.inode(str(far)) == (far.stat().st_dev, told["inode"])
    with pytest.raises(FileNotFoundError):
        notes.put_on(str(base), files.inode(str(far)), str(far))  # its name leads to another file by now


def test_a_chain_with_a_gap_is_a_no_from_below_too(images: list[Path], tmp_path: Path) -> None:
    """What lies above the gap is newer than what lies below it."""
    (tmp_path / "elsewhere").mkdir()
    images[2].rename(tmp_path / "elsewhere" / "b.qcow2")
    for path in (images[0], images[1], images[3], images[0].parent):
        with pytest.raises(NoActive) as found:
            qmpmerge.active(path)
        assert str(images[2]) in str(found.value)


@pytest.mark.parametrize("how", ["-a", "-r"])
def test_a_copied_folder_with_an_image_that_kept_its_name_is_a_no(how: str, images: list[Path], tmp_path: Path) -> None:
    assert invoke("commit", str(images[3]), "--merged-files", "keep").code == 0
    run("qemu-io", "-f", "raw", "-c", "write -P 9 0 64k", images[0])
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in images[0].parent.iterdir():
        if file != copied:
            run("cp", how, file, copied)
    for path in (copied / "base.raw", copied / "c.qcow2", copied):
        with pytest.raises(NoActive):
            qmpmerge.active(path)
