"""What a folder holds."""

from pathlib import Path
from typing import Any

import qmpmerge
from qmpmerge.chain.outcome import Outcome
from rig.disks import Setup


async def live(setup: Setup, **options: Any) -> Outcome:
    async with qmpmerge.live(setup.machine.target) as target:
        return await qmpmerge.commit(target, setup.disk, **options)


def names(folder: Path) -> list[str]:
    """Images, whatever they are called; not what we keep beside them."""
    found = [file.name for file in folder.iterdir() if not file.name.startswith(".")]
    return sorted(name for name in found if "qcow2" in name or "raw" in name)
