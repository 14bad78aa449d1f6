"""Several targets of `doctor`: one stops no other, and of all outcomes the worst is the exit code."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.command import Run, invoke
from rig.disks import Setup, drive
from rig.machines import Content, make_chain, run

import qmpmerge
import qmpmerge.images.qemuimg
from qmpmerge.doctor.findings import EXIT_CODES
from qmpmerge.errors import NoSuchTarget
from qmpmerge.operations.examine import Examination, Examined

DOCS = Path(__file__).parents[2] / "docs"


def doctor(*targets: str | Path) -> Run:
    return invoke("doctor", "--exit-code", *map(str, targets), "--json")


def broken(folder: Path) -> Path:
    """An image whose base is gone: harm."""
    folder.mkdir()
    base, active = make_chain(folder, ["base.raw", "a.qcow2"])
    base.unlink()
    return active


def bare(folder: Path) -> Path:
    """An image that is called like one that a merge has put aside: care."""
    folder.mkdir()
    base, active = make_chain(folder, ["base.raw", "a.qcow2"])
    active.rename(f"{active}.merged")
    return base.parent


def old(folder: Path) -> Path:
    """A lock that keeps nobody out: a note."""
    folder.mkdir()
    active = make_chain(folder, ["base.raw", "a.qcow2"])[1]
    (folder / ".base.raw.qmpmerge-lock").touch()
    return active


def test_the_exit_code_says_what_was_found(tmp_path: Path) -> None:
    harm, care, note = broken(tmp_path / "harm"), bare(tmp_path / "care"), old(tmp_path / "note")
    told = {name: doctor(*targets) for name, targets in {
        "nothing": [*make_chain(tmp_path, ["base.raw"])], "note": [note], "care": [note, care], "harm": [care, harm],
    }.items()}  # fmt: skip
    assert {name: run.code for name, run in told.items()} == {"nothing": 0, "note": 0, "care": 10, "harm": 11}
    assert [one["severity"] for one in told["harm"].document["findings"]] == ["harm", "care"]
    assert {run.document["verdict"] for run in told.values()} == {"done"}
    assert invoke("doctor", str(harm)).code == 0
    page = (DOCS / "errors.md").read_text()
    rows = re.findall(r"^\| (\d+) \|  \| .*`doctor --exit-code`.* `(\w+)` \|$", page, re.MULTILINE)
    assert {**{severity: int(code) for code, severity in rows}, "note": 0, None: 0} == EXIT_CODES
    assert len(rows) == 2


def test_an_error_of_one_target_stops_no_other_and_comes_before_what_was_found(tmp_path: Path) -> None:
    harm = broken(tmp_path / "harm")
    done = doctor(tmp_path / "none", harm, "no-such-vm")
    assert (done.code, done.document["verdict"]) == (4, "unreachable")
    told = [(one["target"], one["verdict"], one["error"] and one["error"]["name"]) for one in done.document["targets"]]
    assert told == [
        (f"{tmp_path}/none", "unreachable", "no-such-target"),
        (str(harm), "done", None),
        ("no-such-vm", "unreachable", "no-such-target"),
    ]
    assert [one["target"] for one in done.document["findings"]] == [str(harm)]
    assert done.document["error"] == done.document["targets"][0]["error"]
    assert "only where every TARGET could be looked at" in (DOCS / "doctor.md").read_text()
    assert "What could not be looked at comes first" in invoke("doctor", "--help").out


def test_quiet_prints_nothing_where_nobody_has_to_do_anything(tmp_path: Path) -> None:
    note, harm = old(tmp_path / "note"), broken(tmp_path / "harm")
    assert invoke("doctor", "--exit-code", "-q", str(note)) == Run(0, "", "")
    told = invoke("doctor", "--exit-code", "-q", str(note), str(harm))
    assert told.code == 11 and told.out.startswith("harm: ") and "\nnote: " not in told.out
    said = invoke("doctor", f"{tmp_path}/none", str(harm), "no-such-vm")
    assert said.code == 4 and said.err.count("unreachable: ") == said.err.count("hint: ") == 2
    assert said.out.splitlines()[0] == f"harm: {harm} (image-unreadable)"
    assert said.out.splitlines()[-1] == f"looked at 0 VMs, 1 image, not at {tmp_path}/none, no-such-vm: 1 harm"


def test_a_name_that_a_merge_has_taken_away_is_refused_as_everywhere(tmp_path: Path) -> None:
    with drive(tmp_path, make_chain(tmp_path), Content()) as setup:
        assert invoke("commit", setup.machine.target).code == 0
    assert doctor(tmp_path / "c.qcow2").document["error"]["name"] == "stashed"


def test_the_worst_error_is_that_of_all() -> None:
    unreachable = NoSuchTarget(target="x")
    refused = qmpmerge.errors.CannotList(folder="/f", reason="no")
    report = Examination((Examined("/f", error=refused), Examined("vm"), Examined("x", error=unreachable)), 1, 0)
    assert (report.verdict, report.error) == ("unreachable", unreachable)
    assert Examination((Examined("vm"),), 1, 0).error is None


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with drive(tmp_path, make_chain(tmp_path), Content()) as setup:
        yield setup


def test_a_vm_of_two_names_is_one(setup: Setup) -> None:
    setup.machine.session.execute("cont")
    setup.machine.session.execute("stop")
    names = (setup.machine.target, f"pid:{setup.machine.process.pid}", setup.machine.target)
    done = doctor(*names).document
    assert done["looked_at"] == {"vms": 1, "images": 4}
    assert [one["target"] for one in done["targets"]] == list(names[:2])
    assert [one["name"] for one in done["findings"]] == ["guest-paused"]


def test_disks_of_one_name_are_told_apart_by_their_vms(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    other = make_chain(tmp_path / "two", ["base.raw", "a.qcow2"])
    with drive(tmp_path / "two", other, Content()) as second:
        for vm in (setup, second):
            vm.machine.session.execute("cont")
            vm.machine.session.execute("stop")
        done = invoke("doctor", setup.machine.target, second.machine.target)
    first = [line for line in done.out.splitlines() if line.startswith("care: ")]
    assert first == [f"care: {vm.machine.target} (guest-paused)" for vm in (setup, second)]
    assert done.out.endswith("looked at 2 VMs, 6 images: 2 care\n")


def test_without_a_target_an_example_is_named() -> None:
    done = invoke("doctor")
    assert done.code == 2 and "`qmpmerge doctor vm1`" in done.err


@pytest.mark.parametrize("reason", ["many on one", "pairs"])
async def test_a_thousand_images_need_no_process_each(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a header does not tell without a doubt QEMU is asked, of this image only."""
    asked: list[str] = []
    info = qmpmerge.images.qemuimg.info

    async def counted(file: str, form: str) -> object:
        asked.append(file)
        return await info(file, form)

    monkeypatch.setattr("qmpmerge.images.qemuimg.info", counted)
    base, active = make_chain(tmp_path, ["0000.qcow2", "a.qcow2"])
    for number in range(1, 100):
        if reason == "pairs":
            shutil.copy(base, tmp_path / f"{number:04}.qcow2")
        data = active.read_bytes()
        (tmp_path / f"a{number}.qcow2").write_bytes(
            data.replace(b"0000", b"%04d" % number) if reason == "pairs" else data
        )
    run("qemu-img", "bitmap", "--add", tmp_path / "a7.qcow2", "bits")
    report = await qmpmerge.examine_all([tmp_path])
    assert asked == [f"{tmp_path}/a7.qcow2"]
    assert report.images == (200 if reason == "pairs" else 101)


async def test_one_target_is_given_in_any_form(tmp_path: Path) -> None:
    active = broken(tmp_path / "off")
    async with qmpmerge.open(make_chain(tmp_path)[-1]) as images:
        assert await qmpmerge.examine(images) == await qmpmerge.examine(images.name) != ()
    assert "image-unreadable" in {finding.name for finding in await qmpmerge.examine(active)}


async def test_a_vm_is_given_as_a_session_or_by_name(setup: Setup) -> None:
    setup.machine.session.execute("cont")
    setup.machine.session.execute("stop")
    async with qmpmerge.live(setup.machine.target) as target:
        found = await qmpmerge.examine(target)
    assert [finding.name for finding in found] == ["guest-paused"]
    assert found == await qmpmerge.examine(setup.machine.target)
