"""The world of `rounds` as it is: a real QEMU that stands still, whose disk is written by its monitor, and the real command."""

import contextlib
import itertools
import subprocess
from pathlib import Path

from rig import advice, kills
from rig.command import invoke, scripted
from rig.disks import device
from rig.machines import Machine, machine, run
from rig.rounds import BLOCKS, Data

BLOCK = 64 * 1024
MOMENTS = (
    *(
        "=> put_on #1",
        "<= put_on #1",
        "<= take_away #1",
        "<= merged #1",
        "<= write #2",
        "=> rename #1",
        "<= rename #1",
        "<= rename #2",
        "=> remove #1",
    ),
    *("-> blockdev-add #1", "-> transaction #1", "<- transaction #1", "-> block-commit #1", "<- block-commit #1"),
    *("-> job-finalize #1", "<- job-finalize #1", "-> job-complete #1", "<- job-complete #1", "<- cont #1"),
    *("-> job-dismiss #1", "<- job-dismiss #1", "=> mark #1", "<= mark #2", "=> sync #2", "<= sync #3"),
)
VICTIMS = ("tool", "daemon", "both")


class Living:
    """Images in a folder, and the VM that is started on one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "far").mkdir()
        self.launch = str(folder / "base.raw")
        run("qemu-img", "create", "-q", "-f", "raw", self.launch, str(BLOCKS * BLOCK))
        self._vm = contextlib.ExitStack()
        self._machine: Machine | None = None
        self.commands: list[str] = []
        """All that was typed, for who looks into a failure."""
        assert self.boot(self.launch)

    def close(self) -> None:
        """The VM is killed: what the guest was told to be written is on the disk."""
        if self._machine is not None:
            self._machine.kill()
        self._vm.close()
        self._machine = None

    # --- the VM ---------------------------------------------------------------------------------------------------

    def boot(self, image: str) -> bool:
        self.close()
        form = "raw" if image.endswith(".raw") else "qcow2"
        disk = ["-drive", f"file={image},format={form},if=none,id=vda,file.locking=on", *device("vda")]
        try:
            self._machine = self._vm.enter_context(machine(self.folder, *disk))
        except AssertionError:  # it says why on stderr, and does not start
            return False
        return True

    def is_running(self) -> bool:
        return self._machine is not None and self._machine.process.poll() is None

    def read(self) -> Data:
        assert self._machine is not None
        return self._shown(invoke("disks", self._machine.target, "--json").document["disks"][0]["file"]) or {}

    def write(self, block: int, pattern: int) -> None:
        assert self._machine is not None
        self._machine.io("vda", f"write -P {pattern} {block * BLOCK} {BLOCK}")
        self._machine.io("vda", "flush")

    # --- what the tool does ---------------------------------------------------------------------------------------

    def snapshot(self, name: str) -> None:
        assert self._machine is not None
        self._type("snapshot", self._machine.target, f"vda={self.folder / name}")

    def merge(self, number: int, policy: str) -> bool:
        return self._type(*self._merging(number, policy)) == 0

    def _merging(self, number: int, policy: str) -> list[str]:
        assert self._machine is not None
        target = self._machine.target
        images = invoke("chain", target, "vda", "--json").document.get("images", ())
        ranges = list(itertools.combinations(range(1, len(images) + 1), 2))
        if not ranges:
            return ["commit", target, "vda"]
        base, top = (1, len(images)) if number == -1 else ranges[number % len(ranges)]
        name = images[base - 1]["file"]  # one in another folder must be named
        return ["commit", target, "vda", "--base", name, "--top", f"[{top}]", "--merged-files", policy]

    def clean(self) -> None:
        self._type("clean", str(self.folder), str(self.folder / "far"))

    def active(self) -> str | None:
        told = invoke("active", self.launch)
        self.commands.append(f"active: {told.code} {told.out}{told.err}")
        return told.out.removesuffix("\n") if told.code == 0 else None

    def kill(self, number: int) -> None:
        assert self._machine is not None
        kind, number = number % 3, number // 3
        if kind == 0:
            self.close()
            return
        victim, moment = VICTIMS[number % len(VICTIMS)], MOMENTS[number // 3 % len(MOMENTS)]
        words = self._merging(number, "stash")
        if kind == 1:
            words = ["snapshot", self._machine.target, f"vda={self.folder}/far/killed-{len(self.commands)}.qcow2"]
        notes = self.folder / "moments"
        environment = {"QMPMERGE_VICTIM": str(self._machine.process.pid)}
        scripted(kills.__file__, notes, victim, moment, *words, env=environment, seconds=60)
        self.commands.append(f"{victim} killed at {moment} of {' '.join(words)}")
        if victim != "tool":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._machine.process.wait(0)
        if not self.is_running():
            self.close()

    def recover(self) -> None:
        self._type("recover", str(self.folder))
        self._type("recover", str(self.folder / "far"))

    def advice(self) -> bool:
        target = self._machine.target if self._machine is not None and self.is_running() else self.launch
        found = advice.findings(target)
        self.commands += [f"doctor: {one['name']} {one['where']}: {one['fix']}" for one in found]
        self.commands += advice.carry_out(target)
        return any(one["severity"] == "harm" for one in found)

    # --- looks ----------------------------------------------------------------------------------------------------

    def views(self) -> dict[str, Data]:
        images = [path for path in self.folder.rglob("*.[qr]*") if path.suffix in (".raw", ".qcow2")]
        shown = {str(path): self._shown(str(path)) for path in images if "stale" not in path.parts}
        return {name: view for name, view in shown.items() if view is not None}

    def _shown(self, image: str) -> Data | None:
        """What an image shows, read beside a VM that may have it open; all that was flushed is on the disk."""
        view = self.folder / "view"
        form = "raw" if image.endswith(".raw") else "qcow2"
        line = ["qemu-img", "convert", "-U", "-f", form, "-O", "raw", image, str(view)]
        if subprocess.run(line, capture_output=True, check=False).returncode != 0:
            return None
        data = view.read_bytes()
        view.unlink()
        return {block: data[block * BLOCK] for block in range(BLOCKS) if data[block * BLOCK]}

    def _type(self, *words: str) -> int:
        told = invoke(*words)
        self.commands.append(f"{' '.join(words)}: {told.code} {told.err}")
        return told.code
