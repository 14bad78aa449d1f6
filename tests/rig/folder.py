"""What a folder holds."""

import os
from pathlib import Path
from typing import Any

import qmpmerge
from qmpmerge.chain.outcome import Outcome
from qmpmerge.images import notes, stashed
from rig.disks import Setup


async def live(setup: Setup, **options: Any) -> Outcome:
    async with qmpmerge.live(setup.machine.target) as target:
        return await qmpmerge.commit(target, setup.disk, **options)


def names(folder: Path) -> list[str]:
    """Images, whatever they are called; not what we keep beside them."""
    found = [file.name for file in folder.iterdir() if not file.name.startswith(".")]
    return sorted(name for name in found if "qcow2" in name or "raw" in name)


def litter(folder: Path) -> list[str]:
    """All else that begins with a dot, but for the notes beside what is stashed, or kept, which stay with it."""
    files = [str(file) for file in folder.iterdir()]
    told = {os.path.basename(stashed.note_path(file)) for file in files if stashed.is_stashed(file)}
    told |= {f".{os.path.basename(file)}{notes.MERGED}" for file in files if notes.base_of(file)}
    told |= {os.path.basename(note.path) for file in files for note in notes.pulled_into(file)}
    return sorted({file.name for file in folder.iterdir() if file.name.startswith(".")} - told)


def beside(folder: Path) -> list[str]:
    """All that lies there, but for those notes."""
    return sorted([file.name for file in folder.iterdir() if not file.name.startswith(".")] + litter(folder))
