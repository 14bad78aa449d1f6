"""
The peers: whole commands, timed, with their memory; the bare QMP conversation; libvirt's own daemon and its virsh.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rig.machines import Session

COMMAND = shutil.which("qmpmerge", path=os.path.dirname(sys.executable)) or "qmpmerge"
STARTING_SECONDS = 60


@dataclass(frozen=True)
class Ran:
    """
    A command that has run: milliseconds from before its start to after its end, and of the processors' time that it took,
    with all processes that it has waited for.
    """

    milliseconds: float
    cpu: float
    stderr: str


def timed(*command: str | Path, stdin: int | None = subprocess.DEVNULL) -> Ran:
    """Run a command to its end; a failure ends the bench."""
    with tempfile.TemporaryFile("w+") as complaints:
        begun = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdin=stdin, stdout=subprocess.DEVNULL, stderr=complaints)
        _, status, usage = os.wait4(process.pid, 0)
        milliseconds = (time.perf_counter() - begun) * 1000
        process.returncode = code = os.waitstatus_to_exitcode(status)
        complaints.seek(0)
        said = complaints.read()
    if code != 0:
        raise SystemExit(f"bench: {command} failed with {code}: {said}")
    return Ran(milliseconds, (usage.ru_utime + usage.ru_stime) * 1000, said)


def ours(*arguments: str | Path) -> Ran:
    """A whole `qmpmerge` command, Python's start included."""
    return timed(COMMAND, *arguments)


LAUNCHER = """
import os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
os.write(2, str(usage.ru_maxrss).encode())
"""
"""A process starts with the most memory that its parent ever had: this one has less than any command of ours."""


def memory(*arguments: str | Path) -> float:
    """The most memory that a `qmpmerge` command has, in MiB."""
    return int(timed(sys.executable, "-I", "-S", "-c", LAUNCHER, COMMAND, *arguments).stderr.split()[-1]) / 1024


# --- the floor -------------------------------------------------------------------------------------------------------


def node_of(session: Session, file: Path) -> str:
    """The format node of an image, as -drive has named it."""
    details = session.execute("query-named-block-nodes", flat=True)
    return next(str(node["node-name"]) for node in details if node["file"] == str(file) and node["drv"] != "file")


@dataclass(frozen=True)
class Merge:
    """What is merged on the disk with the id `disk`: down from `top` into `base`; an `active` one pivots."""

    base: Path
    top: Path
    active: bool
    disk: str = "vda"


def bare(session: Session, *merges: Merge, still: bool = False) -> float:
    """
    Merge by the shortest QMP conversation that does it, safe or not, all at once; returns its milliseconds. With `still` the
    guest is stopped for the pivot, as ours is.

    It runs in a session that is there already, and waits for events: asked every millisecond QEMU takes half as long again.
    Those that are not about its jobs are left in the session.
    """
    jobs = {f"bare-{merge.disk}": _arguments(session, merge) for merge in merges}
    session.events.clear()
    begun = time.perf_counter()
    for job, arguments in jobs.items():
        session.execute("block-commit", job_id=job, auto_dismiss=False, **arguments)
    copying, running, others = set(jobs), set(jobs), []
    while running:
        event = session.event()
        if event["event"] != "JOB_STATUS_CHANGE" or event["data"]["id"] not in running:
            others.append(event)
            continue
        job, status = event["data"]["id"], event["data"]["status"]
        if status == "ready" and job in copying:  # a stopped guest makes it ready once more
            copying.remove(job)
            for command, arguments in [*([("stop", {})] if still else []), ("job-complete", {"id": job})]:
                session.execute(command, **arguments)
        elif status == "concluded":
            for command, arguments in [*([("cont", {})] if still else []), ("job-dismiss", {"id": job})]:
                session.execute(command, **arguments)
            running.remove(job)
    took = (time.perf_counter() - begun) * 1000
    session.events[:0] = others
    return took


def _arguments(session: Session, merge: Merge) -> dict[str, str]:
    nodes = {"top_node": node_of(session, merge.top), "base_node": node_of(session, merge.base)}
    return {"device": merge.disk, **nodes, **({} if merge.active else {"backing_file": str(merge.base)})}


# --- libvirt ---------------------------------------------------------------------------------------------------------


class Libvirt:
    """A libvirtd of the bench's own, for one user's session: nothing of the system's is touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = {"HOME": "home", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache"}
        self._environment = {**os.environ, **{name: str(folder / place) for name, place in names.items()}}
        for place in names.values():
            (folder / place).mkdir()
        self.let_in(folder)

    def let_in(self, folder: Path) -> None:
        """As root the session is `nobody`'s, since root has none: give that user all files in a folder."""
        if os.geteuid() == 0:
            for path in (folder, *folder.rglob("*")):
                if not path.is_symlink():
                    shutil.chown(path, "nobody")

    def command(self, *words: str | Path) -> list[str]:
        """A command as the session's user, in its surroundings."""
        surroundings = [f"{name}={value}" for name, value in self._environment.items() if str(self.folder) in value]
        user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
        return [*user, "env", *surroundings, *map(str, words)]

    def virsh(self, *words: str | Path) -> list[str]:
        return self.command("virsh", "-q", "-c", "qemu:///session", *words)

    def run(self, *words: str | Path) -> None:
        """Run a virsh command that is not timed."""
        timed(*self.virsh(*words))

    def wait(self) -> None:
        """Until the daemon answers; it asks every QEMU what it can do first."""
        deadline = time.monotonic() + STARTING_SECONDS
        while subprocess.run(self.virsh("version"), capture_output=True, check=False).returncode != 0:
            if time.monotonic() > deadline:
                raise SystemExit(f"bench: libvirtd does not answer: {(self.folder / 'log').read_text()[-500:]}")
            time.sleep(0.1)

    @contextlib.contextmanager
    def domain(self, disk: Path, *, os_words: str = "", devices: str = "") -> Iterator[str]:
        """A transient, paused VM with one disk; yields its name."""
        name = "peer"
        description = self.folder / "domain.xml"
        description.write_text(DOMAIN.format(name=name, disk=disk, format=disk.suffix[1:], os=os_words, devices=devices,
                                             emulator=shutil.which("qemu-system-x86_64")))  # fmt: skip
        self.run("create", "--paused", description)
        try:
            yield name
        finally:
            subprocess.run(self.virsh("destroy", name), capture_output=True, check=False)


DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <cpu mode='custom' match='exact'><model>qemu64</model><feature policy='require' name='rdrand'/></cpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{os}</os>
  <features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{format}' discard='unmap'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/><memballoon model='none'/>
    {devices}
  </devices>
</domain>
"""


@contextlib.contextmanager
def libvirt() -> Iterator[Libvirt | None]:
    """A running libvirtd and its virtlogd; None where libvirt is not installed."""
    if shutil.which("libvirtd") is None or shutil.which("virsh") is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="libvirt-") as name, contextlib.ExitStack() as daemons:
        peer = Libvirt(Path(name))
        log = daemons.enter_context(open(peer.folder / "log", "wb"))
        for program in ("virtlogd", "libvirtd"):
            process = subprocess.Popen(peer.command(program), stdout=log, stderr=log)
            daemons.callback(process.wait)
            daemons.callback(process.terminate)
        peer.wait()
        yield peer


def install_libvirt() -> None:
    """What `--peers` does: the packages from apt, which starts nothing here."""
    packages = ["libvirt-daemon-system", "libvirt-daemon-driver-qemu", "libvirt-clients"]
    if shutil.which("libvirtd") is None or shutil.which("virsh") is None:
        sudo = [] if os.geteuid() == 0 else ["sudo"]
        subprocess.run([*sudo, "apt-get", "-qq", "update"], check=True)
        apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "install", "--no-install-recommends"]
        subprocess.run([*apt, *packages], check=True, stdout=subprocess.DEVNULL)
