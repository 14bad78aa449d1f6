"""
What tests of chains and block jobs stand on: real QEMUs, paused, on tiny images. A plugin for pytest, inert unless used.

    def test_my_tool(qcow2_chain: MakeChain, qemu_vm: StartVm, guest_reads: GuestReads) -> None:
        vm = qemu_vm(qcow2_chain("base.raw", "a.qcow2", "b.qcow2"))
        my_tool(vm.monitor)
        vm.check()

Fixtures  `qcow2_chain` (`MakeChain`), `qemu_vm` (`StartVm`), `guest_writes`, `guest_reads`, `frozen_job` (`FreezeJob`),
          `kill_at` (`KillAt`), `qemu_programs` (`Programs`, by ``--qemu-path``)
Without pytest the same is to be had from what they stand on: `create`, `machine`, `started`, `Wire`.

Nothing of qmpmerge imports this; pytest comes with ``qmpmerge[testing]``.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpmerge.testing.content import Content
    from qmpmerge.testing.jobs import FreezeJob, Job, Kind, Status
    from qmpmerge.testing.kills import KillAt, Killer, Moment, Victim
    from qmpmerge.testing.layers import Layer, Layers, MakeChain, create
    from qmpmerge.testing.machines import Machine, machine
    from qmpmerge.testing.programs import Programs
    from qmpmerge.testing.session import Session
    from qmpmerge.testing.vms import Disk, GuestReads, GuestWrites, StartVm, Style, Vm, started
    from qmpmerge.testing.wire import Wire

_HOME = {
    "Content": "content",
    "Disk": "vms",
    "FreezeJob": "jobs",
    "GuestReads": "vms",
    "GuestWrites": "vms",
    "Job": "jobs",
    "KillAt": "kills",
    "Killer": "kills",
    "Kind": "jobs",
    "Layer": "layers",
    "Layers": "layers",
    "Machine": "machines",
    "MakeChain": "layers",
    "Moment": "kills",
    "Programs": "programs",
    "Session": "session",
    "StartVm": "vms",
    "Status": "jobs",
    "Style": "vms",
    "Victim": "kills",
    "Vm": "vms",
    "Wire": "wire",
    "create": "layers",
    "machine": "machines",
    "started": "vms",
}
__all__ = [
    "Content",
    "Disk",
    "FreezeJob",
    "GuestReads",
    "GuestWrites",
    "Job",
    "KillAt",
    "Killer",
    "Kind",
    "Layer",
    "Layers",
    "Machine",
    "MakeChain",
    "Moment",
    "Programs",
    "Session",
    "StartVm",
    "Status",
    "Style",
    "Victim",
    "Vm",
    "Wire",
    "create",
    "machine",
    "started",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
