"""
Merge QEMU disk image chains, while the guest keeps writing, without libvirt.

    async with qmpmerge.live("/run/vm1.sock") as host:
        outcome = await qmpmerge.commit(host, "vda")

Names are imported when they are first used: the command line starts faster for it.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qmpmerge import errors
    from qmpmerge.blockgraph import Disk
    from qmpmerge.chain import Chain, Image
    from qmpmerge.cleaning import Cleaned, clean
    from qmpmerge.converge import Converge
    from qmpmerge.diskdoctor import examine_path
    from qmpmerge.doctor import examine
    from qmpmerge.doors import opened
    from qmpmerge.doors.live import live
    from qmpmerge.doors.offline import offline
    from qmpmerge.errors import Error
    from qmpmerge.findings import Finding
    from qmpmerge.hosts import ChainView, Host
    from qmpmerge.jobs import Job, Progress
    from qmpmerge.merge import commit, follow
    from qmpmerge.outcome import Outcome
    from qmpmerge.patience import Patience
    from qmpmerge.plan import CommitPlan
    from qmpmerge.processes import Vm, vms
    from qmpmerge.recovery import Recovery, recover
    from qmpmerge.snapshots import Overlay, snapshot
    from qmpmerge.verbs import steer

_HOME = {
    "Chain": "chain",
    "ChainView": "hosts",
    "Cleaned": "cleaning",
    "CommitPlan": "plan",
    "Converge": "converge",
    "Disk": "blockgraph",
    "Error": "errors",
    "Finding": "findings",
    "Host": "hosts",
    "Image": "chain",
    "Job": "jobs",
    "Outcome": "outcome",
    "Overlay": "snapshots",
    "Patience": "patience",
    "Progress": "jobs",
    "Recovery": "recovery",
    "Vm": "processes",
    "clean": "cleaning",
    "commit": "merge",
    "examine": "doctor",
    "examine_path": "diskdoctor",
    "follow": "merge",
    "live": "doors.live",
    "offline": "doors.offline",
    "opened": "doors",
    "recover": "recovery",
    "snapshot": "snapshots",
    "steer": "verbs",
    "vms": "processes",
}

__all__ = [
    "Chain",
    "ChainView",
    "Cleaned",
    "CommitPlan",
    "Converge",
    "Disk",
    "Error",
    "Finding",
    "Host",
    "Image",
    "Job",
    "Outcome",
    "Overlay",
    "Patience",
    "Progress",
    "Recovery",
    "Vm",
    "clean",
    "commit",
    "errors",
    "examine",
    "examine_path",
    "follow",
    "live",
    "offline",
    "opened",
    "recover",
    "snapshot",
    "steer",
    "vms",
]


def __getattr__(name: str) -> object:
    if name == "errors":
        return importlib.import_module("qmpmerge.errors")
    if name in _HOME:
        return getattr(importlib.import_module(f"qmpmerge.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
