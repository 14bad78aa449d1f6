"""Every example of README, docs/library.md and the docstrings: run on a real QEMU, and checked against the wheel."""

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.examples import ROOT, Example, files_of, in_docstrings, on_pages
from rig.machines import Content, Machine, machine, make_chain, run

EXAMPLES = [*on_pages(), *in_docstrings()]
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.where)


@pytest.fixture
def vm(images: list[Path], content: Content, tmp_path: Path) -> Iterator[Machine]:
    """That of docs/library.md: two disks."""
    data = make_chain(tmp_path, ("data.raw", "data-a.qcow2"))
    drives = [
        f"file={active},format=qcow2,if=none,id={name}" for name, active in (("vda", images[-1]), ("vdb", data[-1]))
    ]
    arguments = [word for drive in drives for word in ("-drive", drive)]
    devices = [word for name in ("vda", "vdb") for word in ("-device", f"virtio-blk-pci,drive={name}")]
    with machine(tmp_path, *arguments, *devices) as vm:
        yield vm


def test_there_are_examples_on_each_page_and_in_docstrings() -> None:
    found = {example.where.rpartition(" ")[0] for example in EXAMPLES}
    assert found >= {"README.md", "library.md", "qmpmerge", "qmpmerge.sync"}
    assert all(example.promised for example in on_pages())


@every_example
def test_an_example_does_what_it_says(example: Example, vm: Machine) -> None:
    here = f"{vm.folder}/"
    program = example.program.replace("/run/vm1.sock", vm.target).replace("/vm/", here).replace('"/vm"', repr(here))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.replace(here, "/vm/").splitlines()
    for line in example.promised:
        found = [number for number, one in enumerate(printed) if one.startswith(line)]
        assert found, (line, printed)
        printed = printed[found[0] + 1 :]
    assert not vm.session.execute("query-jobs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has our wheel, and what it needs of this one."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, ROOT)
    (wheel,) = place.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv")
    python = place / "venv/bin/python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_types_of_the_examples_are_right_where_the_wheel_is_installed(installed: Path, tmp_path: Path) -> None:
    for number, example in enumerate(EXAMPLES):
        (tmp_path / f"example{number}.py").write_text(example.program)
    for name, text in files_of("testing.md").items():
        (tmp_path / name).write_text(text)
    (tmp_path / "wrong.py").write_text("import qmpmerge\n\nqmpmerge.sync.clean(7)\nqmpmerge.nonsense()\n")
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        str(installed),
        f"--cache-dir={ROOT}/.mypy_cache/wheel",
    ]
    done = subprocess.run([*mypy, "."], cwd=tmp_path, capture_output=True, text=True, check=False)
    *wrong, summary = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in wrong] == ["wrong.py:3", "wrong.py:4"], done.stdout + done.stderr
    assert f"checked {len(EXAMPLES) + 3} source files" in summary


def test_the_project_of_the_testing_page_is_tested_there(installed: Path, tmp_path: Path) -> None:
    for name, text in files_of("testing.md").items():
        (tmp_path / name).write_text(text)
    done = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert re.search(r"^6 passed", done, re.MULTILINE), done
    where = run(installed, "-c", "import qmpmerge.testing as it; print(it.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parents[1]))


def test_the_wheel_is_what_runs_there(installed: Path, vm: Machine) -> None:
    program = EXAMPLES[0].program.replace("/run/vm1.sock", vm.target).replace("/vm/", f"{vm.folder}/")
    shown = run(installed, "-c", f"{program}\nprint(qmpmerge.__file__)", cwd=vm.folder)
    assert EXAMPLES[0].promised[-1] in shown
    assert shown.splitlines()[-1].startswith(str(installed.parents[1]))
    version = run(installed.with_name("qmpmerge"), "--version")
    assert version.startswith("qmpmerge ")
