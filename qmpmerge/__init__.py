"""
Merge QEMU disk image chains, while the guest keeps writing, without libvirt.

    async with qmpmerge.open("/run/vm1.sock") as target:
        outcome = await qmpmerge.commit(target, "vda")
        print(outcome.verdict, outcome.after)

To disks       `open`, or by name `live` (a running QEMU) and `offline` (images not in use): each gives a `Target`
To their chain `snapshot`, `plan`, `commit`, `pull`, `follow` and `control` (its jobs); `tidy` (all disks)
After a crash  `recover`, `clean`, `active` (which image to start from), `examine` and `examine_all` (what is wrong)
To understand  `graph` (the block graph, with who uses what)
Without asyncio the same functions are in `qmpmerge.sync`. What can go wrong is in `qmpmerge.errors`, all of it an `Error`.

Each step is told to the logger `qmpmerge`; `record` writes it down, with all that is said to QEMU. Names are imported when they
are first used: the command line starts faster for it.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qmpmerge import errors, sync
    from qmpmerge.chain.chain import Chain, Image, Slice
    from qmpmerge.chain.outcome import Checked, Ending, Estimate, MergedFile, OtherWay, Outcome, Policy, Verdict
    from qmpmerge.chain.plan import CommitPlan, PullPlan
    from qmpmerge.doctor.findings import Finding, Severity
    from qmpmerge.engine.pace.converge import Converge
    from qmpmerge.engine.pace.patience import Patience
    from qmpmerge.engine.pace.progress import Progress, Shortage
    from qmpmerge.engine.resume import Recovery
    from qmpmerge.errors import Error
    from qmpmerge.images.headers import Oddity
    from qmpmerge.operations.active import Active, active
    from qmpmerge.operations.clean import Cleaned, clean
    from qmpmerge.operations.commit import commit
    from qmpmerge.operations.control import Verb, control
    from qmpmerge.operations.examine import Examination, Examined, examine, examine_all
    from qmpmerge.operations.follow import follow
    from qmpmerge.operations.graph import Graph, GraphNode, Mark, graph
    from qmpmerge.operations.places import LeftOut
    from qmpmerge.operations.plan import Sharer, Way, Ways, plan
    from qmpmerge.operations.pull import pull
    from qmpmerge.operations.recover import recover
    from qmpmerge.operations.snapshot import Overlay, snapshot
    from qmpmerge.operations.tidy import Tidied, Tidying, tidy
    from qmpmerge.processes.vms import Vm, vms
    from qmpmerge.qemu.bitmaps import Bitmap
    from qmpmerge.qemu.blockgraph import Disk, Layout
    from qmpmerge.qemu.details import Device, DiskDetails, ImageDetails
    from qmpmerge.qemu.jobs import Job
    from qmpmerge.qemu.usage import Export, GraphEdge
    from qmpmerge.recording.record import record
    from qmpmerge.targets.live import live
    from qmpmerge.targets.offline import OfflineTarget, offline
    from qmpmerge.targets.open import open
    from qmpmerge.targets.target import ChainView, Target

_HOME = {
    "Active": "operations.active",
    "Bitmap": "qemu.bitmaps",
    "Chain": "chain.chain",
    "ChainView": "targets.target",
    "Checked": "chain.outcome",
    "Cleaned": "operations.clean",
    "CommitPlan": "chain.plan",
    "Converge": "engine.pace.converge",
    "Device": "qemu.details",
    "Disk": "qemu.blockgraph",
    "DiskDetails": "qemu.details",
    "Ending": "chain.outcome",
    "Error": "errors",
    "Estimate": "chain.outcome",
    "Examination": "operations.examine",
    "Examined": "operations.examine",
    "Export": "qemu.usage",
    "Finding": "doctor.findings",
    "Graph": "operations.graph",
    "GraphEdge": "qemu.usage",
    "GraphNode": "operations.graph",
    "Image": "chain.chain",
    "ImageDetails": "qemu.details",
    "Job": "qemu.jobs",
    "Layout": "qemu.blockgraph",
    "LeftOut": "operations.places",
    "Mark": "operations.graph",
    "MergedFile": "chain.outcome",
    "Oddity": "images.headers",
    "OfflineTarget": "targets.offline",
    "OtherWay": "chain.outcome",
    "Outcome": "chain.outcome",
    "Overlay": "operations.snapshot",
    "Patience": "engine.pace.patience",
    "Policy": "chain.outcome",
    "Progress": "engine.pace.progress",
    "PullPlan": "chain.plan",
    "Recovery": "engine.resume",
    "Severity": "doctor.findings",
    "Sharer": "operations.plan",
    "Shortage": "engine.pace.progress",
    "Slice": "chain.chain",
    "Target": "targets.target",
    "Tidied": "operations.tidy",
    "Tidying": "operations.tidy",
    "Verb": "operations.control",
    "Verdict": "chain.outcome",
    "Vm": "processes.vms",
    "Way": "operations.plan",
    "Ways": "operations.plan",
    "active": "operations.active",
    "clean": "operations.clean",
    "commit": "operations.commit",
    "control": "operations.control",
    "errors": "",
    "examine": "operations.examine",
    "examine_all": "operations.examine",
    "follow": "operations.follow",
    "graph": "operations.graph",
    "live": "targets.live",
    "offline": "targets.offline",
    "open": "targets.open",
    "plan": "operations.plan",
    "pull": "operations.pull",
    "record": "recording.record",
    "recover": "operations.recover",
    "snapshot": "operations.snapshot",
    "sync": "",
    "tidy": "operations.tidy",
    "vms": "processes.vms",
}
"""The file that each public name is in; none for a file that is public as a whole."""

__all__ = [
    "Active",
    "Bitmap",
    "Chain",
    "ChainView",
    "Checked",
    "Cleaned",
    "CommitPlan",
    "Converge",
    "Device",
    "Disk",
    "DiskDetails",
    "Ending",
    "Error",
    "Estimate",
    "Examination",
    "Examined",
    "Export",
    "Finding",
    "Graph",
    "GraphEdge",
    "GraphNode",
    "Image",
    "ImageDetails",
    "Job",
    "Layout",
    "LeftOut",
    "Mark",
    "MergedFile",
    "Oddity",
    "OfflineTarget",
    "OtherWay",
    "Outcome",
    "Overlay",
    "Patience",
    "Policy",
    "Progress",
    "PullPlan",
    "Recovery",
    "Severity",
    "Sharer",
    "Shortage",
    "Slice",
    "Target",
    "Tidied",
    "Tidying",
    "Verb",
    "Verdict",
    "Vm",
    "Way",
    "Ways",
    "active",
    "clean",
    "commit",
    "control",
    "errors",
    "examine",
    "examine_all",
    "follow",
    "graph",
    "live",
    "offline",
    "open",
    "plan",
    "pull",
    "record",
    "recover",
    "snapshot",
    "sync",
    "tidy",
    "vms",
]


if not TYPE_CHECKING:  # a checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(f"{__name__}.{_HOME[name] or name}")
        globals()[name] = value = getattr(home, name) if _HOME[name] else home
        return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name, value in globals().items() if name.startswith("__") and not callable(value))]
