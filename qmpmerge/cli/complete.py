"""What the shell offers at TAB: running VMs, their disks, their layers, their jobs. Quick, and silent when it cannot."""

import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click
from click.shell_completion import CompletionItem

from qmpmerge.cli import no_tls
from qmpmerge.errors import Error

if TYPE_CHECKING:
    from qmpmerge.targets.target import Target


T = TypeVar("T")

SECONDS = 1.0
_PLAIN = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


def _ask(ctx: click.Context, question: "Callable[[Target], Awaitable[list[T]]]") -> list[T]:
    target = _given(ctx, "target", 0)
    if target is None:
        return []

    no_tls.import_asyncio()  # the shell's TAB waits for this module, most words of a line do not need a session
    import asyncio

    async def asking() -> list[T]:
        from qmpmerge.targets import open as door

        async with asyncio.timeout(2 * SECONDS), door.open(target, write=False, timeout=SECONDS) as opened:
            return await question(opened)

    try:
        return asyncio.run(asking())
    except (Error, TimeoutError):
        return []


def _given(ctx: click.Context, name: str, place: int) -> str | None:
    """An argument of the line so far. Where an option waits for its value, click has left the words where they stood."""
    value: str | None = ctx.params.get(name)
    return value if value is not None else next(iter(ctx.args[place : place + 1]), None)


def targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """
    The VMs whose monitors we may use: by name where that is plain and means one only, by pid where not, since anybody can
    start a process of any name. With a slash in it the shell completes files.
    """
    if "/" in incomplete or incomplete.startswith("."):
        return [CompletionItem(incomplete, type="file")]
    from qmpmerge.processes.vms import vms

    found = [vm for vm in vms() if not vm.libvirt and any(map(_may_use, vm.monitors))]
    named = Counter(vm.name for vm in found if vm.name)
    plain = [name for name in named if named[name] == 1 and re.fullmatch(_PLAIN, name) and not os.path.lexists(name)]
    others = [f"pid:{vm.pid}" for vm in found if vm.name not in plain]
    names = [CompletionItem(name) for name in (*plain, *others) if name.startswith(incomplete)]
    return [*names, *([CompletionItem(incomplete, type="file")] if not names else [])]


def _may_use(monitor: str) -> bool:
    return monitor.startswith("tcp:") or os.access(monitor, os.W_OK)


def disks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The target's disks."""

    async def names(target: "Target") -> list[tuple[str, str]]:
        return [(disk.name, str(disk.chain)) for disk in await target.disks() if disk.chain is not None]

    return [CompletionItem(name, help=chain) for name, chain in _ask(ctx, names) if name.startswith(incomplete)]


def assignments(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """DISK= for each disk."""
    if "=" in incomplete:
        return []
    return [CompletionItem(f"{item.value}=", help=item.help) for item in disks(ctx, param, incomplete)]


def layers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The images of the disk's chain: by index and by file name, by path after a slash."""

    async def images(target: "Target") -> list[tuple[str, str]]:
        chain = (await target.disk(_given(ctx, "disk", 1))).chain or ()
        if incomplete.startswith("/"):
            return [(image.file, "") for image in chain]
        names = Counter(image.name for image in chain)
        numbered = [(str(index), image.file) for index, image in enumerate(chain, 1)]
        return numbered + [(image.name, "") for image in chain if names[image.name] == 1]

    return [CompletionItem(name, help=note) for name, note in _ask(ctx, images) if name.startswith(incomplete)]


def jobs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The target's jobs."""

    async def ids(target: "Target") -> list[tuple[str, str]]:
        return [(job.id, job.status) for job in await target.jobs()]

    return [CompletionItem(name, help=status) for name, status in _ask(ctx, ids) if name.startswith(incomplete)]
