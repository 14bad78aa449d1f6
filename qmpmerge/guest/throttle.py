"""
The limits on a disk's guest: set for a while, and put back as they were whatever happens.

Limits belong to the device's block backend, so they are there with -drive and -blockdev and stay through a pivot. They
are set by the drive id or by the device's QOM path: QEMU does not take a plain qdev id of a virtio device. A storage
daemon has none.
"""

import contextlib
import os
import re
from collections.abc import AsyncIterator
from typing import Any

from qmpmerge import shield
from qmpmerge.errors import QemuRefused
from qmpmerge.guest import deadman
from qmpmerge.qemu.blockgraph import Disk, qdev_id
from qmpmerge.qemu.monitor import Monitor

GROUP = "qmpmerge-throttle-"
_SIX = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


class Throttle:
    """A limit on the writes of one disk's guest, in a throttle group of its own, and what was there before."""

    def __init__(self, monitor: Monitor, disk: Disk) -> None:
        self._monitor = monitor
        self._disk = disk
        self._device: dict[str, Any] = {}
        self.was: dict[str, Any] = {}
        self.target = 0
        self.refused = False

    @contextlib.asynccontextmanager
    async def undone(self) -> AsyncIterator[None]:
        """Put back what was there at the end of the block, and when we die in it. Raises QemuRefused, OSError."""
        await self._look()
        before = {**self._device, **self._limits()}
        async with deadman.armed(self._monitor.descriptor, deadman.qmp("block_set_io_throttle", **before)) as switch:
            try:
                yield
            finally:
                await shield.finished(self._monitor.execute("block_set_io_throttle", **before))
                switch.dismiss()

    async def limit(self, target: int) -> None:
        """Let the guest write `target` bytes a second at the most, but no more than it could before."""
        if self.was["bps"]:  # QEMU takes no limit on writes beside one on both
            limits: dict[str, Any] = {"bps": min(target, self.was["bps"]), "bps_rd": 0, "bps_wr": 0}
        else:
            limits = {"bps": 0, "bps_rd": self.was["bps_rd"], "bps_wr": min(target, self.was["bps_wr"] or target)}
        kept = {name: self.was[name] for name in ("iops", "iops_rd", "iops_wr")}
        self.target = target
        name = re.sub(r"[^A-Za-z0-9._-]", "-", self._disk.name)
        group = f"{GROUP}{os.getpid()}-{name}"
        await self._monitor.execute("block_set_io_throttle", **self._device, **limits, **kept, group=group)

    async def _look(self) -> None:
        for entry in await self._monitor.execute("query-block"):
            is_it = entry["device"] == self._disk.drive if self._disk.drive else self._is_device(entry)
            if is_it and "inserted" in entry:
                self._device = {"device": self._disk.drive} if self._disk.drive else {"id": entry["qdev"]}
                self.was = entry["inserted"]
                return
        raise QemuRefused(command="block_set_io_throttle", reason="QEMU tells no device of this disk")

    def _is_device(self, entry: Any) -> bool:
        return bool(self._disk.qdev) and qdev_id(entry.get("qdev", "")) == self._disk.qdev

    def _limits(self) -> dict[str, Any]:
        """All limits that there were, as the command takes them."""
        others = [
            name for name in self.was if re.fullmatch(r"(bps|iops)(_rd|_wr)?_max(_length)?|iops_size|group", name)
        ]
        return {name: self.was[name] for name in (*_SIX, *others)}
