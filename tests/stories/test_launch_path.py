"""
Nightly snapshots, weekly merges, launch scripts that never change: four stories in which version 0.1 lost acknowledged writes
by its own advice, or came to a standstill.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from rig import advice
from rig.command import invoke
from rig.disks import device
from rig.machines import MIB, Content, Machine, machine, make_chain


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_chain(tmp_path, ["base.raw"])[0]


@contextmanager
def boot(image: str | Path, drive: str = "") -> Iterator[Machine]:
    """A start that names this image."""
    drive = drive or f"file={image},format={'raw' if str(image).endswith('raw') else 'qcow2'}"
    folder = Path(image) if Path(image).is_dir() else Path(image).parent
    with machine(folder, "-drive", f"{drive},if=none,id=vda", *device("vda")) as vm:
        yield vm


def boot_active(path: Path) -> AbstractContextManager[Machine]:
    """A start by a launch script that asks."""
    told = invoke("active", "--drive", str(path))
    assert told.code == 0, told.err
    return boot(path, told.out.removesuffix("\n"))


def guest(vm: Machine, command: str) -> None:
    vm.io("vda", command)
    vm.io("vda", "flush")


def done(*arguments: str | Path) -> None:
    told = invoke(*map(str, arguments))
    assert told.code == 0, (arguments, told.out, told.err)


def test_a_snapshot_and_a_reboot_by_the_old_launch_path(base: Path, tmp_path: Path) -> None:
    """The newest image was called stale, the fix marked it as merged, and `clean` removed it."""
    night, content = tmp_path / "night.qcow2", Content()
    with boot(base) as vm:
        guest(vm, content.put(0x11, 0, MIB))
        told = invoke("snapshot", vm.target, f"vda={night}")
        assert f"{base} shows older data" in told.out
        guest(vm, content.put(0x22, 0, MIB))
    assert invoke("active", str(base)).out == f"{night}\n"
    with boot(base) as vm:
        found = {finding["name"]: finding for finding in advice.findings(vm.target)}
        assert (found["started-stale"]["severity"], found["started-stale"]["fix"]) == ("harm", None)
        assert all(word in found["started-stale"]["message"] for word in (str(base), str(night), "last written", "MiB"))
        advice.carry_out(vm.target)
        done("clean", tmp_path)
    for path in (tmp_path, base, night):
        advice.carry_out(path)
    done("clean", tmp_path)
    with boot_active(base) as vm:
        guest(vm, f"read -P 0x22 0 {MIB}")
        done("commit", vm.target)
    content.check(base)


def test_a_launch_path_that_stays(base: Path, tmp_path: Path) -> None:
    """`relink` put an empty overlay there, which the next snapshot ruined; asking for the active image does without."""
    assert invoke("commit", str(base), "--merged-files", "relink").code == 2
    content = Content()
    for number in range(1, 4):
        with boot_active(base) as vm:
            done("snapshot", vm.target, f"vda={tmp_path}/snap{number}.qcow2")
            guest(vm, content.put(number, 0, MIB))
            found = advice.findings(vm.target)
            assert not [one for one in found if one["severity"] == "harm" or one["name"] == "stale-image"]
        with boot_active(tmp_path) as vm:
            guest(vm, f"read -P {number} 0 {MIB}")
            done("snapshot", vm.target, f"vda={tmp_path}/again{number}.qcow2")
            guest(vm, content.put(0x10 + number, MIB, MIB))
            done("commit", vm.target)
    content.check(base)


@pytest.mark.parametrize("name", ["e.img", "e.raw"])
def test_an_overlay_that_is_not_called_qcow2(base: Path, tmp_path: Path, name: str) -> None:
    """The launch script took it for raw: the guest saw the overlay's header, and could write to it."""
    content = Content()
    with boot(base) as vm:
        done("snapshot", vm.target, f"vda={tmp_path / name}")
        guest(vm, content.put(1, 0, MIB))
    with boot_active(base) as vm:
        guest(vm, f"read -P 1 0 {MIB}")
        done("commit", vm.target)
    content.check(base)


@pytest.mark.parametrize("policy", ["stash", "delete"])
def test_one_overlay_name_for_years(base: Path, tmp_path: Path, policy: str) -> None:
    """It worked twice, and then every merge was refused because of what the earlier ones had stashed."""
    snap, content = tmp_path / "snap.qcow2", Content()
    with boot(base) as vm:
        for number in range(1, 7):
            done("snapshot", vm.target, f"vda={snap}")
            guest(vm, content.put(number, number * MIB // 2, MIB))
            done("commit", vm.target, "--merged-files", policy)
            commands = advice.carry_out(vm.target) if number == 4 else advice.findings(vm.target)
            assert "mv " not in str(commands)
        assert invoke("active", str(base)).out == f"{base}\n"
    content.check(base)
    if policy == "stash":
        done("clean", tmp_path)
    assert not list(tmp_path.glob("*.merged*"))


@pytest.mark.parametrize("live", [False, True])
def test_no_command_takes_away_what_nothing_proves_to_be_merged(base: Path, tmp_path: Path, live: bool) -> None:
    """Any image on the chain that was not in it was to be renamed."""
    with boot(base) as vm:
        done("snapshot", vm.target, f"vda={tmp_path}/a.qcow2")
    with boot(tmp_path / "a.qcow2") as vm:
        guest(vm, f"write -P 1 0 {MIB}")
        done("snapshot", vm.target, f"vda={tmp_path}/b.qcow2")
        guest(vm, f"write -P 2 0 {MIB}")
    before = sorted(tmp_path.glob("*.[qr]*"))
    if live:
        for image in (base, tmp_path / "a.qcow2"):
            with boot(image) as vm:
                assert "started-stale" in advice.names(vm.target)
                advice.carry_out(vm.target)
    else:
        for path in (tmp_path, *before):
            advice.carry_out(path)
    assert sorted(tmp_path.glob("*.[qr]*")) == before
    with boot_active(base) as vm:
        guest(vm, f"read -P 2 0 {MIB}")
