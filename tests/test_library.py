"""What `import qmpmerge` shows: the same names to Python, to `help()` and to type checkers, and nothing of the command."""

import ast
import dataclasses
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rig import contract
from rig.disks import Setup

import qmpmerge

PUBLIC = qmpmerge.__all__
FUNCTIONS = [name for name in PUBLIC if inspect.isroutine(getattr(qmpmerge, name))]


def test_the_three_lists_of_public_names_agree() -> None:
    tree = ast.parse(Path(qmpmerge.__file__).read_text())
    checked = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in checked for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = [alias.name for node in imports for alias in node.names]
    assert sorted(typed) == sorted(PUBLIC) == sorted(qmpmerge._HOME)


def test_dir_shows_the_public_names_and_no_others() -> None:
    assert {name for name in dir(qmpmerge) if not name.startswith("__")} == set(PUBLIC)
    assert "__version__" in dir(qmpmerge)
    assert {"ShorterLayer", "Refused", "StillRunning", "EXIT_CODES"} < set(dir(qmpmerge.errors))
    assert not {"re", "shlex", "Any", "refuse"} & set(dir(qmpmerge.errors))
    assert {name for name in dir(qmpmerge.sync) if not name.startswith("__")} == set(qmpmerge.sync.__all__)
    assert "__doc__" in dir(qmpmerge.sync)


@pytest.mark.parametrize("module", [qmpmerge, qmpmerge.sync])
def test_help_shows_each_function_with_its_signature_and_its_docstring(module: object) -> None:
    shown = pydoc.plain(pydoc.render_doc(module))
    for name in FUNCTIONS:
        function = getattr(module, name)
        first = next(iter(inspect.signature(function).parameters), "")
        assert re.search(rf" {name}\(\s*[*]?{re.escape(first)}", shown), (
            name
        )  # long ones have a line for each from Python 3.13 on
        assert inspect.cleandoc(function.__doc__ or "").splitlines()[0] in shown, name
        assert " at 0x" not in str(inspect.signature(function)), name


def test_help_shows_the_errors() -> None:
    shown = pydoc.plain(pydoc.render_doc(qmpmerge.errors))
    assert "class ShorterLayer(Refused)" in shown or "class ShorterLayer(qmpmerge.errors.base.Refused)" in shown


def test_what_is_not_there_is_told_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'qmpmerge' has no attribute 'comit'"):
        _ = qmpmerge.comit  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("program", "unwanted"),
    [
        ("import qmpmerge", ["click", "rich", "asyncio", "logging", "psutil"]),
        ("import qmpmerge.sync; qmpmerge.commit, qmpmerge.open, qmpmerge.errors.Refused", ["click", "rich"]),
    ],
)
def test_the_library_does_not_load_what_only_the_command_needs(program: str, unwanted: list[str]) -> None:
    program = f"import sys; {program}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "qmpmerge" in loaded
    assert not set(unwanted) & set(loaded)


IN_JSON: dict[str, type] = {
    "outcome": qmpmerge.Outcome,
    "merged": qmpmerge.MergedFile,
    "check": qmpmerge.Checked,
    "estimate": qmpmerge.Estimate,
    "other way": qmpmerge.OtherWay,
    "plan": qmpmerge.Ways,
    "way": qmpmerge.Way,
    "sharer": qmpmerge.Sharer,
    "job": qmpmerge.Job,
    "vm": qmpmerge.Vm,
    "disk": qmpmerge.Disk,
    "image": qmpmerge.Image,
    "oddity": qmpmerge.Oddity,
    "overlay": qmpmerge.Overlay,
    "active": qmpmerge.Active,
    "recovery": qmpmerge.Recovery,
    "stashed": qmpmerge.Cleaned,
    "looked at": qmpmerge.Examination,
    "target": qmpmerge.Examined,
    "finding": qmpmerge.Finding,
    "progress": qmpmerge.Progress,
    "shortage": qmpmerge.Shortage,
    "slice": qmpmerge.Slice,
    "image details": qmpmerge.ImageDetails,
    "bitmap": qmpmerge.Bitmap,
    "disk details": qmpmerge.DiskDetails,
    "tidy": qmpmerge.Tidying,
    "tidied": qmpmerge.Tidied,
    "left out": qmpmerge.LeftOut,
}

ELSEWHERE = {
    # of the chain's active image, and of the chain itself
    "disk": {"disk", "node", "file", "format", "depth", "virtual_size", "allocated", "read_only"},
    # of the chain that the image is in, and of the image's `data`
    "image": {"index", "active", "details", "data_file"},
    "disk details": {"bus", "address", "iothread", "removable", "tray_open"},  # of its `device`
    "finding": {"target"},
    "progress": {"event"},
}


@pytest.mark.parametrize("table", IN_JSON)
def test_a_value_has_the_names_that_its_json_has(table: str) -> None:
    value = IN_JSON[table]
    attributes = {field.name for field in dataclasses.fields(value)} | vars(value).keys()
    assert contract.TABLES[table].keys() - attributes == ELSEWHERE.get(table, set())


UNLIKE = {"outcome": {"disk", "seconds", "after"}}
"""Null in JSON of a job of which nothing else is known, where there is no value at all; and `after` of what is ``running``."""


@pytest.mark.parametrize("table", IN_JSON)
def test_what_can_be_null_in_json_can_be_none(table: str) -> None:
    value = IN_JSON[table]
    types = {
        name: str(one.fget.__annotations__["return"]) for name, one in vars(value).items() if isinstance(one, property)
    }
    types |= {field.name: str(field.type) for field in dataclasses.fields(value)}
    unlike = {
        key
        for key, kind in contract.TABLES[table].items()
        if key in types and kind.endswith(" or null") != bool(re.search("None|Optional", types[key]))
    }
    assert unlike == UNLIKE.get(table, set())


async def test_disks_and_layers_are_named_as_python_names_them(setup: Setup, images: list[Path]) -> None:
    async with qmpmerge.open(Path(setup.machine.target)) as target:
        assert (await target.disk(images[3])).name == (await target.chain(images[3])).disk.name == "vda"
        for top in (3, -2, images[2], "b.qcow2"):
            plan = await qmpmerge.commit(target, images[3], base=images[1], top=top, dry_run=True)
            assert str(plan.after) == "base.raw <-- a.qcow2 <-- c.qcow2"
        outcome = await qmpmerge.commit(target, images[3], base=1, top=-2)
        assert str(outcome.after) == "base.raw <-- c.qcow2"
    setup.check()
