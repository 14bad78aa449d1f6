"""What the tests of pull have in common: its ranges, what images show by themselves, and one that does not end."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import qmpmerge
from rig.disks import Setup, form
from rig.machines import Machine, run

JOB = "qmpmerge-pull-vda"

RANGES: dict[str, tuple[dict[str, Any], str]] = {
    "whole": ({}, "c.qcow2"),
    "partial": ({"base": "[1]"}, "base.raw <-- c.qcow2"),
    "shallow": ({"shallow": True}, "base.raw <-- a.qcow2 <-- c.qcow2"),
    "middle": ({"top": "[3]"}, "b.qcow2 <-- c.qcow2"),
    "middle-partial": ({"top": "[3]", "base": "[1]"}, "base.raw <-- b.qcow2 <-- c.qcow2"),
}


def views(images: Iterable[Path]) -> dict[str, str]:
    """What each of them shows, by itself and what it is built on."""
    seen = {}
    for image in images:
        view = image.with_name("view")
        run("qemu-img", "convert", "-U", "-f", form(image), "-O", "raw", image, view)
        seen[image.name] = hashlib.sha256(view.read_bytes()).hexdigest()
        view.unlink()
    return seen


def stream(vm: Machine, **more: object) -> None:
    """A plain block-stream, to its end."""
    vm.session.execute("block-stream", job_id="j", **more)
    while (found := vm.session.execute("query-jobs")) and found[0]["status"] != "concluded":
        pass


@contextlib.asynccontextmanager
async def slow(setup: Setup, **options: Any) -> AsyncIterator["asyncio.Task[qmpmerge.Outcome]"]:
    """A pull that has begun and will not end by itself."""
    begun = asyncio.Event()
    async with setup.target() as target:
        work = qmpmerge.pull(target, setup.disk, speed=1, report=lambda told: begun.set(), **options)
        pull = asyncio.ensure_future(work)
        await asyncio.wait([pull, asyncio.ensure_future(begun.wait())], return_when=asyncio.FIRST_COMPLETED)
        if pull.done():
            await pull  # refused: say why
        yield pull


def version_of(vm: Machine) -> tuple[int, int]:
    """Of its QEMU."""
    told = vm.session.execute("query-version")["qemu"]
    return told["major"], told["minor"]
