"""The doctor's advice, carried out as a user would: each command typed into a shell."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rig.command import invoke


def findings(target: str | Path) -> list[dict[str, Any]]:
    """What the doctor has to say."""
    found: list[dict[str, Any]] = invoke("doctor", str(target), "--json").document["findings"]
    return found


def names(target: str | Path) -> set[str]:
    return {finding["name"] for finding in findings(target)}


def carry_out(target: str | Path) -> list[str]:
    """Type every command that the doctor names; returns them."""
    commands = [finding["fix"] for finding in findings(target) if finding["fix"]]
    for command in commands:
        typed(command)
    return commands


def typed(command: str) -> "subprocess.CompletedProcess[str]":
    """A command as a shell takes it."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    return subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, check=False)
