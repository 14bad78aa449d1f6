"""Every example of README, docs/library.md and the docstrings: run on a real QEMU, and checked against the wheel."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.examples import Example, in_docstrings, on_pages
from rig.machines import Content, Machine, machine, make_chain

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
