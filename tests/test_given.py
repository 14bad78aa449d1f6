"""A mistake in a program that calls the library: it is told before anything is done, and means nothing else."""

import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rig.disks import Setup
from rig.machines import make_chain

import qmpmerge
from qmpmerge.errors import ForeignName
from qmpmerge.targets.target import Target

MISTAKES: dict[str, Callable[[Target], Awaitable[Any]]] = {
    "ending": lambda target: qmpmerge.commit(target, ending="keep-overlay"),  # type: ignore[arg-type]
    "merged_files": lambda target: qmpmerge.commit(target, merged_files="x"),  # type: ignore[arg-type]
    "speed": lambda target: qmpmerge.commit(target, speed="10M"),  # type: ignore[arg-type]
    "no speed": lambda target: qmpmerge.commit(target, speed=-1, dry_run=True),
    "parts of a byte": lambda target: qmpmerge.commit(target, speed=1.5),  # type: ignore[arg-type]
    "parts of an image": lambda target: qmpmerge.commit(target, keep=1.5, dry_run=True),  # type: ignore[arg-type]
    "polite": lambda target: qmpmerge.commit(target, polite=-1.0),
    "force": lambda target: qmpmerge.commit(target, force={"bogus"}),
    "force of pull": lambda target: qmpmerge.pull(target, force="bogus"),
    "force of snapshot": lambda target: qmpmerge.snapshot(target, {"vda": "/nowhere"}, force=["dependent"]),
    "verb": lambda target: qmpmerge.control(target, "vda", "bogus"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_word_that_is_none_is_a_value_error_and_does_nothing(mistake: str, setup: Setup) -> None:
    async with setup.target() as target:
        before = await target.layout()
        with pytest.raises(ValueError, match="is one of|is a (whole )?number"):
            await MISTAKES[mistake](target)
        assert (await target.layout()).disks == before.disks


async def test_true_is_no_layer(setup: Setup) -> None:
    async with setup.target() as target:
        with pytest.raises(TypeError, match="a layer is"):
            await qmpmerge.commit(target, top=True)


async def test_one_path_stands_for_itself_and_not_for_its_letters(tmp_path: Path) -> None:
    """The first letter of an absolute path would allow every file there is."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    chain, overlay = make_chain(tmp_path / "elsewhere"), tmp_path / "here" / "o.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", chain[-1], "-F", "qcow2", overlay], check=True)
    with pytest.raises(ForeignName):
        async with qmpmerge.offline(overlay, allow=str(tmp_path / "nowhere")):
            raise AssertionError("it was opened")
    async with qmpmerge.offline(overlay, allow=tmp_path / "elsewhere") as target:
        assert len((await target.chain()).chain) == len(chain) + 1
    assert await qmpmerge.clean(str(tmp_path)) == []
