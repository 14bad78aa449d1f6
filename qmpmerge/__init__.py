"""
Merge QEMU disk image chains, while the guest keeps writing, without libvirt.

    async with qmpmerge.live("/run/vm1.sock") as target:
        outcome = await qmpmerge.commit(target, "vda")

Names are imported when they are first used: the command line starts faster for it.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qmpmerge import errors
    from qmpmerge.chain.chain import Chain, Image
    from qmpmerge.chain.outcome import Outcome
    from qmpmerge.chain.plan import CommitPlan
    from qmpmerge.doctor.findings import Finding
    from qmpmerge.doctor.target import examine
    from qmpmerge.engine.pace.converge import Converge
    from qmpmerge.engine.pace.patience import Patience
    from qmpmerge.engine.pace.progress import Progress
    from qmpmerge.engine.resume import Recovery
    from qmpmerge.errors import Error
    from qmpmerge.operations.active import Active, active
    from qmpmerge.operations.clean import Cleaned, clean
    from qmpmerge.operations.commit import commit
    from qmpmerge.operations.control import control
    from qmpmerge.operations.examine import examine_path
    from qmpmerge.operations.follow import follow
    from qmpmerge.operations.recover import recover
    from qmpmerge.operations.snapshot import Overlay, snapshot
    from qmpmerge.processes.vms import Vm, vms
    from qmpmerge.qemu.blockgraph import Disk
    from qmpmerge.qemu.jobs import Job
    from qmpmerge.targets.live import live
    from qmpmerge.targets.offline import offline
    from qmpmerge.targets.open import opened
    from qmpmerge.targets.target import ChainView, Target

_HOME = {
    "Active": "operations.active",
    "Chain": "chain.chain",
    "ChainView": "targets.target",
    "Cleaned": "operations.clean",
    "CommitPlan": "chain.plan",
    "Converge": "engine.pace.converge",
    "Disk": "qemu.blockgraph",
    "Error": "errors",
    "Finding": "doctor.findings",
    "Image": "chain.chain",
    "Job": "qemu.jobs",
    "Outcome": "chain.outcome",
    "Overlay": "operations.snapshot",
    "Patience": "engine.pace.patience",
    "Progress": "engine.pace.progress",
    "Recovery": "engine.resume",
    "Target": "targets.target",
    "Vm": "processes.vms",
    "active": "operations.active",
    "clean": "operations.clean",
    "commit": "operations.commit",
    "control": "operations.control",
    "examine": "doctor.target",
    "examine_path": "operations.examine",
    "follow": "operations.follow",
    "live": "targets.live",
    "offline": "targets.offline",
    "opened": "targets.open",
    "recover": "operations.recover",
    "snapshot": "operations.snapshot",
    "vms": "processes.vms",
}

__all__ = [
    "Active",
    "Chain",
    "ChainView",
    "Cleaned",
    "CommitPlan",
    "Converge",
    "Disk",
    "Error",
    "Finding",
    "Image",
    "Job",
    "Outcome",
    "Overlay",
    "Patience",
    "Progress",
    "Recovery",
    "Target",
    "Vm",
    "active",
    "clean",
    "commit",
    "control",
    "errors",
    "examine",
    "examine_path",
    "follow",
    "live",
    "offline",
    "opened",
    "recover",
    "snapshot",
    "vms",
]


def __getattr__(name: str) -> object:
    if name == "errors":
        return importlib.import_module("qmpmerge.errors")
    if name in _HOME:
        return getattr(importlib.import_module(f"qmpmerge.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
