"""
The state of the virtual machine: whether anything may be changed on its disks now.

A VM that waits for its guest, or whose guest was migrated away, has *inactive* images (BDRV_O_INACTIVE): another QEMU may be
writing to them. To rewrite a header there kills QEMU, and an NBD export of such a node, even a read-only one, makes it
active again, from 7.2 to 11.1. While a migration is under way its other side has the chain open as it was at the start.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from qmpmerge.errors import QemuRefused, VmState
from qmpmerge.qemu.monitor import Monitor

if TYPE_CHECKING:
    from qmpmerge.qemu.blockgraph import Node

OVER = frozenset({"none", "completed", "failed", "cancelled"})
"""The MigrationStatus of a migration that is not under way (qapi/migration.json)."""

_GONE = ("postmigrate", "finish-migrate")
_ELSEWHERE = "work on the images where the guest runs now"
_CONT = "send `cont` to its monitor, once no other QEMU has the images"
_SET_ACTIVE = "make its nodes active with `blockdev-set-active`, once nobody else has the images"
_UNTOLD = "QEMU does not tell whether a migration is under way"


async def check(monitor: Monitor, nodes: "Collection[Node]" = ()) -> str:
    """
    See that the images may be written to; `nodes` are those of the disk, as the block graph shows them.

    A storage daemon has no state, and from 10.0 on nodes that can be inactive. Returns what could not be looked at, empty
    where there is nothing. Raises VmState, QemuRefused.
    """
    told, migration = await monitor.execute_all([("query-status", {}), ("query-migrate", {})])
    is_vm = not isinstance(told, QemuRefused)
    if isinstance(told, QemuRefused) and not told.is_unheard_of:
        raise told
    if is_vm and told["status"] == "inmigrate":
        reason = "it waits for an incoming migration, and its images are inactive"
        raise _refusal(monitor, "inmigrate", reason, f"{_ELSEWHERE}, or wait until it is here")
    _refuse_migration(monitor, migration)
    if is_vm and told["status"] in _GONE:
        reason = "its guest was migrated away, and its images are inactive"
        raise _refusal(monitor, told["status"], reason, f"{_ELSEWHERE}; or {_CONT}")
    if any(node.info.get("active") is False for node in nodes):
        reason = "its images are inactive, another QEMU may be writing to them"
        raise _refusal(monitor, "inactive", reason, _CONT if is_vm else _SET_ACTIVE)
    if is_vm and not told["running"] and _may_be_inactive(monitor, migration, nodes):
        reason = "it was migrated and stands still, and its images are inactive, or it is not told"
        raise _refusal(monitor, told["status"], reason, _CONT)
    return _UNTOLD if is_vm and isinstance(migration, QemuRefused) else ""


async def check_migration(monitor: Monitor) -> None:
    """
    See that no migration is under way; for whoever has a job at work, since images that a job holds cannot be made inactive
    (the migration fails). Raises VmState.
    """
    _refuse_migration(monitor, *await monitor.execute_all([("query-migrate", {})]))


def preconfig(monitor: Monitor) -> VmState:
    """The refusal of a QEMU that tells of nothing yet: its machine has not been made."""
    reason = "its machine is not set up yet (`-preconfig`), and QEMU tells of no jobs before that"
    return _refusal(monitor, "preconfig", reason, "send `x-exit-preconfig` to its monitor")


def _refuse_migration(monitor: Monitor, migration: Any) -> None:
    if isinstance(migration, QemuRefused) or migration.get("status", "none") in OVER:
        return
    reason = "a migration is under way, and its other side has opened the chain as it is"
    instead = "wait for its end, or send `migrate_cancel` to the monitor"
    raise _refusal(monitor, f"migration {migration['status']}", reason, instead)


def _may_be_inactive(monitor: Monitor, migration: Any, nodes: "Collection[Node]") -> bool:
    """
    Whether a guest that stands still may have inactive images though neither its state nor its nodes say so: before 10.0 that
    is so after an outgoing migration and `system_reset`, and after an incoming one with ``late-block-activate``.

    There an image of qcow2 lets others write to its file while it is inactive, and at no other time (block.c,
    `bdrv_default_perms_for_storage`).
    """
    if monitor.version >= (10, 0, 0) or isinstance(migration, QemuRefused) or migration.get("status") != "completed":
        return False
    signs = {node.lets_write for node in nodes if node.driver == "qcow2"}
    return signs != {False}


def _refusal(monitor: Monitor, state: str, reason: str, instead: str) -> VmState:
    return VmState(target=monitor.name, state=state, reason=reason, instead=instead)
