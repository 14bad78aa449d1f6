"""
The bench behind `scripts/bench`: medians of whole commands, Python's start included, next to the bare QMP conversation.

The peers alternate run by run on the same machine, so that what else goes on hits all alike.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rig import MIB, Machine, Session, machine, make_chain, run
from setups import device

import qmpmerge
from qmpmerge import checks, plan

COMMAND = shutil.which("qmpmerge", path=os.path.dirname(sys.executable)) or "qmpmerge"
Figures = dict[str, list[float]]


def timed(figures: Figures, name: str, work: Callable[[], object]) -> None:
    """Add one run's seconds."""
    begun = time.perf_counter()
    work()
    figures.setdefault(name, []).append(time.perf_counter() - begun)


def command(*arguments: str) -> Callable[[], object]:
    """A whole `qmpmerge` command."""
    return lambda: subprocess.run([COMMAND, *arguments], check=True, capture_output=True)


def chain(folder: Path, layers: int) -> Path:
    """A chain of empty layers with absolute backing names; returns its top."""
    below: Path | None = None
    for number in range(layers):
        image = folder / f"layer{number}.qcow2"
        backing = ["-b", str(below), "-F", "qcow2"] if below else []
        run("qemu-img", "create", "-q", "-u", "-f", "qcow2", *backing, image, str(64 * MIB))
        below = image
    assert below is not None
    return below


def listing(figures: Figures, runs: int) -> None:
    """`disks` and `chain` on chains of several lengths."""
    for layers in (3, 30, 200):
        with tempfile.TemporaryDirectory() as name:
            top = chain(Path(name), layers)
            with machine(Path(name), "-drive", f"file={top},if=none,id=vda", *device("vda")) as vm:
                for _ in range(runs):
                    timed(figures, f"disks, {layers} layers", command("disks", vm.target))
                    timed(figures, f"chain, {layers} layers", command("chain", vm.target))


def bare(session: Session, top: str, base: str, *, active: bool, backing: str) -> None:
    """The shortest QMP conversation that merges: safe or not."""
    extra = {} if active else {"backing_file": backing}
    session.execute(
        "block-commit", job_id="bare", device="vda", top_node=top, base_node=base, auto_dismiss=False, **extra
    )
    while True:
        (job,) = session.execute("query-jobs")
        if job["status"] == "ready":
            session.execute("job-complete", id="bare")
        if job["status"] == "concluded":
            break
    session.execute("job-dismiss", id="bare")


def merging(figures: Figures, runs: int) -> None:
    """Commits of empty overlays: all that is not copying."""
    for _ in range(runs):
        for active in (True, False):
            for ours in (True, False):
                with tempfile.TemporaryDirectory() as folder:
                    top = chain(Path(folder), 4)
                    with machine(Path(folder), "-drive", f"file={top},if=none,id=vda", *device("vda")) as vm:
                        _merge_once(figures, vm, active=active, ours=ours)


def _merge_once(figures: Figures, vm: Machine, *, active: bool, ours: bool) -> None:
    details = vm.session.execute("query-named-block-nodes", flat=True)
    nodes = {os.path.basename(node["file"]): node["node-name"] for node in details if node["drv"] == "qcow2"}
    base, top = nodes["layer0.qcow2"], nodes["layer3.qcow2" if active else "layer2.qcow2"]
    name = f"{'active' if active else 'intermediate'} commit, {'qmpmerge' if ours else 'bare QMP'}"
    options = [] if active else ["--top", "[3]"]
    conversation = lambda: bare(vm.session, top, base, active=active, backing=f"{vm.folder}/layer0.qcow2")  # noqa: E731
    timed(figures, name, command("commit", vm.target, *options) if ours else conversation)


def offline(figures: Figures, runs: int) -> None:
    """Images that nobody holds, against qemu-img; durable at the end on both sides, 512 MiB of data."""
    for layers in (3, 10):
        for _ in range(runs):
            for ours in (True, False):
                for active in (True, False):
                    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
                        _merge_images(figures, Path(folder), layers, active=active, ours=ours)


def _merge_images(figures: Figures, folder: Path, layers: int, *, active: bool, ours: bool) -> None:
    images = make_chain(folder, [f"layer{number}.qcow2" for number in range(layers + 1)], size=4096 * MIB)
    each = 512 // (layers - 1)
    for number, image in enumerate(images[1:-1]):
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {number * each}M {each}M", image)
    os.sync()
    name = f"offline, {layers} layers, {'whole chain' if active else 'middle layers'}, {'qmpmerge' if ours else 'qemu-img'}"
    if ours:
        options = [] if active else ["--top", f"[{layers}]"]
        work = command("commit", str(images[-1]), *options, "--no-verify")
    else:
        work = lambda: _with_qemu_img(images, active=active)  # noqa: E731

    def durably() -> None:
        work()
        os.sync()

    timed(figures, name, durably)


def _with_qemu_img(images: list[Path], *, active: bool) -> None:
    top = images[-1] if active else images[-2]
    run("qemu-img", "commit", "-q", "-b", images[0], top)
    if not active:
        run("qemu-img", "rebase", "-u", "-b", images[0].name, "-F", "qcow2", images[-1])


def checking(figures: Figures, runs: int) -> None:
    """All checks of a merge, on a chain of ten layers in a folder of 1000 images; the command's start is in the second row."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        top = chain(folder, 10)
        run("qemu-img", "create", "-q", "-f", "qcow2", folder / "other0.qcow2", str(64 * MIB))
        template = (folder / "other0.qcow2").read_bytes()
        for number in range(1, 990):
            (folder / f"other{number}.qcow2").write_bytes(template)
        with machine(folder, "-drive", f"file={top},if=none,id=vda", *device("vda")) as vm:
            for _ in range(runs):
                timed(figures, "commit --dry-run, 10 layers, 1000 images", command("commit", vm.target, "--dry-run"))
                figures.setdefault("all checks of it", []).append(asyncio.run(_checks(vm.target)))


async def _checks(target: str) -> float:
    async with qmpmerge.live(target) as host:
        view = await host.chain()
        begun = time.perf_counter()
        await checks.check(host, view, plan.commit(view.chain, top="[9]"))
        return time.perf_counter() - begun


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    options = parser.parse_args()
    figures: Figures = {}
    for _ in range(options.runs):
        timed(figures, "python -c pass", lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
        timed(figures, "--version", command("--version"))
    listing(figures, options.runs)
    checking(figures, options.runs)
    merging(figures, options.runs)
    offline(figures, options.runs)
    for name, seconds in figures.items():
        print(f"{name:48}  median {statistics.median(seconds) * 1000:7.1f} ms   best {min(seconds) * 1000:7.1f} ms")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
