"""What jobs write is whole clusters of the image they write to: what is around the data is compared too."""

import json
from pathlib import Path
from typing import Any

import pytest
from rig.disks import device
from rig.machines import MIB, machine, run

import qmpmerge
from qmpmerge.engine import safeguards
from qmpmerge.engine.run import Run
from qmpmerge.errors import Damaged, NotVerified, StillRunning

AROUND = MIB + 4096
CASES: dict[str, tuple[Any, str, dict[str, Any], type[Exception]]] = {
    "pull": (qmpmerge.pull, "top.qcow2", {"base": "[2]", "top": "[4]"}, Damaged),
    "intermediate": (qmpmerge.commit, "base.qcow2", {"base": "[2]", "top": "[3]"}, NotVerified),
    "active": (qmpmerge.commit, "base.qcow2", {"base": "[2]"}, NotVerified),
}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Something all over the lowest image, and two blocks above it that are small against the clusters of who gets them."""
    below: list[str] = []
    for name, cluster in (("golden", 65536), ("base", 2 * MIB), ("a", 4096), ("top", 2 * MIB)):
        backing = ["-u", "-F", "qcow2", "-b", f"{below[-1]}.qcow2"] if below else []
        options = ["-o", f"cluster_size={cluster}", *backing, f"{name}.qcow2", "8M"]
        run("qemu-img", "create", "-q", "-f", "qcow2", *options, cwd=tmp_path)
        below.append(name)
    run("qemu-io", "-c", "write -P 1 0 8M", tmp_path / "golden.qcow2")
    run("qemu-io", "-c", "write -P 2 1M 4k", "-c", "write -P 2 5M 4k", tmp_path / "a.qcow2")
    return tmp_path / "top.qcow2"


def held_at(image: Path, place: int) -> int | None:
    """Where in its file, where it holds it itself."""
    told = json.loads(run("qemu-img", "map", "-U", "--output=json", image))
    found = next(one for one in told if one["start"] <= place < one["start"] + one["length"])
    return found["offset"] + place - found["start"] if found["depth"] == 0 and "offset" in found else None


@pytest.mark.parametrize("case", CASES)
async def test_what_is_around_is_compared(case: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right, it is verified; damaged in between, it is found, and what lies below stays as it is."""
    act, into, options, error = CASES[case]
    receiver, see = disk.with_name(into), safeguards.see_what_is_compared
    run("qemu-img", "convert", "-O", "raw", disk, disk.with_name("before"))

    def damaging(run: Run) -> None:
        see(run)
        place = held_at(receiver, AROUND)
        if place is not None:
            with receiver.open("r+b") as file:
                file.seek(place)
                file.write(b"\xee" * 512)

    images = {image: image.read_bytes() for image in disk.parent.glob("*.qcow2")}
    async with qmpmerge.offline(disk) as target:
        monkeypatch.setattr(safeguards, "see_what_is_compared", damaging)
        with pytest.raises(error):
            await act(target, verify=True, **options)
        monkeypatch.undo()
    for image in disk.parent.glob(".*"):
        image.unlink()
    for image, content in images.items():
        image.write_bytes(content)
    async with qmpmerge.offline(disk) as target:
        outcome = await act(target, verify=True, **options)
    assert outcome.verified and not any("not checked" in hint for hint in outcome.hints)
    run("qemu-img", "compare", "-q", outcome.after.active.file, disk.with_name("before"))


async def test_what_base_held_before_an_earlier_run_is_not_known(tmp_path: Path, disk: Path) -> None:
    with machine(tmp_path, "-drive", f"file={disk},if=none,id=vda", *device("vda")) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(StillRunning):
                await qmpmerge.commit(target, base="[2]", top="[3]", speed=1, patience=qmpmerge.Patience(detach=True))
            outcome = await qmpmerge.commit(target, base="[2]", top="[3]", speed=0, merged_files="delete")
    assert (outcome.verdict, outcome.verified) == ("merged", False)
    assert any(hint.startswith("not checked: ") and "earlier run" in hint for hint in outcome.hints)
    assert {one.action for one in outcome.merged} == {"stash"}
