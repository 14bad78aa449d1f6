"""Ctrl-C before a command has begun its work: one line, or one JSON object, and nothing of Python's."""

import json
from pathlib import Path

import pytest
from rig.command import invoke
from rig.disks import Setup

IMPORTED = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""
"""A module that Python imports at its start: SIGINT comes when another one is about to be."""

MODULES = ["click", "qmpmerge.cli.commands.commit", "qmpmerge.cli.run", "asyncio", "qmpmerge.qemu.monitor"]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_it_is_told_and_nothing_was_begun(module: str, as_json: bool, setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(IMPORTED.format(module=module))
    given = ["commit", setup.machine.target, *(["--json"] if as_json else [])]
    ended = invoke(*given, env={"PYTHONPATH": str(tmp_path)})
    assert ended.code == 130
    if as_json:
        assert (ended.err, json.loads(ended.out)["verdict"]) == ("", "cancelled")
    else:
        told, hint = ended.err.splitlines()
        assert (ended.out, told, hint[:6]) == ("", "cancelled: the disks show what they did", "hint: ")
    assert invoke("jobs", setup.machine.target).out == ""
    setup.check()


def test_what_needs_no_session_is_ended_too(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(IMPORTED.format(module="qmpmerge.cli.commands.active"))
    ended = invoke("active", str(images[0]), env={"PYTHONPATH": str(tmp_path)})
    assert (ended.code, ended.out) == (130, "") and ended.err.startswith("cancelled: ")
