"""
Both ways to a shorter chain, side by side; and wherever one of them is refused or planned, the command for the other, typed.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from rig.advice import typed
from rig.command import invoke
from rig.disks import WAYS, Images, Setup, form
from rig.machines import MIB, Content, fill, run


def view(image: Path) -> str:
    """What an image shows, by itself and what it is built on."""
    shown = image.with_name("view")
    run("qemu-img", "convert", "-U", "-f", form(image), "-O", "raw", image, shown)
    seen = hashlib.sha256(shown.read_bytes()).hexdigest()
    shown.unlink()
    return seen


def named(setup: Setup) -> str:
    """TARGET."""
    return setup.active if isinstance(setup, Images) else setup.machine.target


def carried_out(command: str) -> Any:
    """The object that comes of a command of ours, typed as it is printed."""
    done = typed(f"{command} --json")
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def chain(folder: Path, names: Sequence[str]) -> list[Path]:
    """A chain with absolute names."""
    images = [folder / name for name in names]
    run("qemu-img", "create", "-qf", form(images[0]), images[0], str(8 * MIB))
    for below, image in itertools.pairwise(images):
        run("qemu-img", "create", "-qf", "qcow2", "-b", below, "-F", form(below), image)
    return images


# --- what a refusal offers instead ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("drive", []), ("blockdev", ["--top", "3"]), ("offline", ["--top", "3"]), ("offline", ["--shallow"])],
)
def test_the_pull_that_dependents_names_is_made(
    kind: str, options: Sequence[str], tmp_path: Path, images: list[Path], content: Content
) -> None:
    other = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", "b.qcow2", "-F", "qcow2", other)
    before = view(other)
    with WAYS[kind](tmp_path, images, content) as setup:
        error = invoke("commit", named(setup), *options, "--json").document["error"]
        assert error["name"] == "dependents"
        assert f"`{error['facts']['pull']}` shortens" in error["hint"]
        pulled = carried_out(error["facts"]["pull"])
        assert pulled["verdict"] == "pulled" and len(pulled["after"]) < 4
        setup.check()
        setup.off()
    assert view(other) == before
    content.check(images[3])


@pytest.mark.parametrize(("kind", "depth"), [("drive", 3), ("offline", 2), ("offline", 3)])
def test_the_pull_that_shared_base_names_is_made(kind: str, depth: int, tmp_path: Path) -> None:
    """It keeps the golden image, unless there is nothing else to be pulled."""
    names = ["golden.raw", "vm/a.qcow2", "vm/b.qcow2"][:depth]
    (tmp_path / "vm").mkdir()
    images, content = chain(tmp_path, names), Content()
    fill(images, content)
    before = view(images[0])
    allow = ["--allow", str(images[0])] if kind == "offline" else []
    with WAYS[kind](tmp_path, images, content) as setup:
        error = invoke("commit", named(setup), *allow, "--json").document["error"]
        assert error["name"] == "shared-base"
        pulled = carried_out(error["facts"]["pull"])
        assert pulled["after"] == [str(image) for image in ([images[-1]] if depth == 2 else [images[0], images[-1]])]
        setup.check()
        setup.off()
    assert view(images[0]) == before


# --- what a dry run names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "after", "looked"),
    [
        (["commit"], ["c.qcow2"], True),
        (["commit", "--top", "3"], ["base.raw", "c.qcow2"], False),  # c.qcow2 is not looked into for this
        (["pull", "--base", "1"], ["base.raw", "a.qcow2"], True),
    ],
)
def test_a_dry_run_names_the_other_way(words: list[str], after: list[str], looked: bool, setup: Setup) -> None:
    command, *options = words
    planned = invoke(command, named(setup), "vda", *options, "--dry-run", "--json").document
    other = planned["other_way"]
    (line,) = [
        line
        for line in invoke(command, named(setup), "vda", *options, "--dry-run").out.splitlines()
        if line.startswith("  or      ")
    ]
    assert other["run"] in line
    foreseen = json.loads(typed(f"{other['run']} --dry-run --json").stdout)
    assert [Path(file).name for file in foreseen["after"]] == after
    assert (foreseen["estimate"]["copy"], foreseen["estimate"]["file"]) == (other["copy"] or ANY, other["file"])
    assert (other["copy"] is not None, " instead of " in line) == (looked, looked)
    assert len(
        carried_out(other["run"] + (" --yes" if other["run"].startswith("qmpmerge commit") else ""))["after"]
    ) == len(planned["after"])


def test_a_way_that_is_refused_is_not_named(tmp_path: Path) -> None:
    """Behind the end of the short one a merge would show what the base holds."""
    images = chain(tmp_path, ["low.qcow2", "mid.qcow2", "top.qcow2"])
    run("qemu-img", "resize", "-q", "--shrink", images[1], "4M")
    planned = invoke("pull", str(images[2]), "--dry-run", "--json").document
    assert (planned["verdict"], planned["other_way"]) == ("planned", None)
