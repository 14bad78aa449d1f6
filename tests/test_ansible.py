"""The playbook of examples/ansible, on VMs of this machine: each is a host of its own."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pages import sessions
from rig import kills
from rig.command import COMMAND
from rig.examples import ROOT
from rig.faults import digests
from rig.fleet import Fleet, Vm
from rig.machines import run

EXAMPLE = ROOT / "examples/ansible"
PAGE = (ROOT / "docs/fleets.md").read_text()
SHOWN = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COUNTS = re.compile(r"^(\S+) +: ok=\d+ +changed=(\d+) +unreachable=\d+ +failed=(\d+) ", re.MULTILINE)
VMS = {"kvm01": "web", "kvm02": "mail", "kvm03": "ci", "kvm04": "wiki", "kvm06": "db"}


@dataclass
class Hosts:
    """An inventory in `folder`, and the VMs of those hosts that have one that runs."""

    folder: Path
    vms: dict[str, Vm]
    shown: str = ""

    def play(self, *words: str, code: int) -> dict[str, tuple[int, int]]:
        """Run the playbook: how much it has changed, and how often it has failed, on each host."""
        self.shown = ansible("playbook", "fleet.yml", "-i", self.folder / "inventory.json", *words, code=code)
        return {host: (int(changed), int(failed)) for host, changed, failed in COUNTS.findall(self.shown)}

    def write(self, hosts: dict[str, dict[str, Any]]) -> None:
        """The inventory: hosts, and what is set for each."""
        common = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "qmpmerge_command": COMMAND,
            "qmpmerge_sockets": f"{self.folder}/{{{{ inventory_hostname }}}}/*.sock",
            "qmpmerge_snapshot": "2026-11-30",
            "qmpmerge_report": str(self.folder / "report.md"),
        }
        (self.folder / "inventory.json").write_text(json.dumps({"qemu": {"hosts": hosts, "vars": common}}))

    @property
    def report(self) -> str:
        """The last, with names as they are on the page."""
        last = max(self.folder.glob("report.md*"), key=lambda path: path.stat().st_mtime_ns)
        text = re.sub(rf"{self.folder}/kvm../(?=\w+\.sock)", "/run/qemu/", last.read_text())
        return re.sub(rf"{self.folder}/kvm../", "/vm/", text)

    @property
    def images(self) -> dict[str, dict[str, str]]:
        return {str(folder): digests(folder) for folder in self.folder.glob("kvm0*/vd?")}


def ansible(program: str, *words: str | Path, code: int = 0) -> str:
    command = [Path(sys.executable).with_name(f"ansible-{program}"), *words]
    done = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """
    `kvm01` has much to merge, `kvm02` nothing; on `kvm03` it is refused, the VM of `kvm04` is gone, `kvm05` does not answer.
    The QEMU of `kvm06` is killed in the middle of a merge, and after that `kvm07` is not begun.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    fleet = Fleet(tmp_path)
    with ExitStack() as stack:
        disks = {"kvm01": ("vda", "vdb"), "kvm02": ("vda",), "kvm03": ("vda",), "kvm06": ("vda",)}
        vms = {name: stack.enter_context(fleet.vm(name, its)) for name, its in disks.items()}
        for name, vm in vms.items():
            os.link(vm.target, tmp_path / name / f"{VMS[name]}.sock")
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "a.qcow2",
            "-F",
            "qcow2",
            tmp_path / "kvm03/vda/other.qcow2",
        )
        (tmp_path / "kvm04").mkdir()
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(tmp_path / "kvm04/wiki.sock"))
        hosts = Hosts(tmp_path, vms)
        hosts.write(settings(tmp_path, vms["kvm06"]))
        yield hosts


def settings(folder: Path, killed: Vm) -> dict[str, dict[str, Any]]:
    victim = f"QMPMERGE_VICTIM={killed.machine.process.pid} PYTHONPATH={kills.PATHS['PYTHONPATH']}"
    killing = f"{victim} exec {sys.executable} {kills.__file__} {folder}/notes daemon"
    no_route = script(folder / "ssh", "echo ssh: connect to host kvm05 port 22: No route to host >&2; exit 255")
    differs: dict[str, dict[str, Any]] = {
        "kvm02": {"qmpmerge_keep": 4},
        "kvm05": {"ansible_connection": "ssh", "ansible_ssh_executable": no_route},
        "kvm06": {"qmpmerge_command": script(folder / "killing", f'{killing} "-> job-finalize #1" "$@"')},
    }
    return {name: differs.get(name, {}) for name in (f"kvm{number:02}" for number in range(1, 8))}


def script(path: Path, line: str) -> str:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.timeout(300)  # some thirty modules of Ansible, each a process that compiles itself in 0.4 s of CPU
def test_a_fleet_is_checked_tidied_and_left_alone(hosts: Hosts) -> None:
    """What goes wrong on a host stops no other, but for an unknown outcome; and what was done is not done again."""
    before = hosts.images
    assert hosts.play("--check", "--tags", "tidy,report", "--limit", "kvm01", code=0) == {"kvm01": (1, 0)}
    assert hosts.images == before
    assert hosts.report.count("| planned | base.raw <-- b.qcow2 <-- c.qcow2 |") == 2
    assert not (hosts.folder / "report.md").exists(), "the report of what was done is left"

    counts = hosts.play("--extra-vars", '{"qmpmerge_serial": [4, 1]}', code=2)
    well, failed = (
        {"kvm01": (2, 0), "kvm02": (1, 0)},
        {"kvm03": (1, 1), "kvm04": (0, 1), "kvm05": (0, 1), "kvm06": (1, 1)},
    )
    assert counts == {**well, **failed, "kvm07": (0, 0)}, hosts.shown
    recap, report = (text.splitlines() for text in SHOWN.findall(PAGE))
    assert sessions.is_as_shown(recap, hosts.shown.splitlines()), hosts.shown
    assert sessions.is_as_shown(report, hosts.report.splitlines()), hosts.report

    hosts.write({"kvm01": {}, "kvm02": {"qmpmerge_keep": 1, "qmpmerge_speed": "16K"}})
    assert hosts.play("--skip-tags", "report", "--extra-vars", "qmpmerge_seconds=1", code=0) == {
        "kvm01": (0, 0),
        "kvm02": (1, 0),
    }, hosts.shown
    hosts.vms["kvm01"].check()
    (job,) = hosts.vms["kvm02"].machine.session.execute("query-jobs")
    assert job["status"] == "running", "what is not done in time is left to QEMU, and is no failure"


KEPT = 'echo "$@" >> "$0.asked"'
UNKNOWN = """
case $1 in
disks) echo '{"verdict": "well", "disks": [
    {"disk": "vda", "file": "/vm/a.qcow2", "read_only": false, "depth": 1},
    {"disk": "vdb", "file": "nbd+unix:/?socket=/vm/nbd", "read_only": false, "depth": 1}]}';;
snapshot) echo '{"verdict": "unknown", "error": {"message": "not proven", "hint": ""}}'; exit 6;;
esac
"""
KILLED = """
case $1 in
disks) echo '{"verdict": "well", "disks": [{"disk": "vda", "file": "/vm/a.qcow2", "read_only": false, "depth": 1}]}';;
*) kill -9 $$;;
esac
"""


def test_what_does_not_tell_its_outcome_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more is begun on its host, nor on any of the next batch, and there is a report."""
    monkeypatch.setenv("HOME", str(tmp_path))
    hosts = Hosts(tmp_path, {})
    said: dict[str, dict[str, Any]] = {
        name: {"qmpmerge_targets": ["web", "mail"], "qmpmerge_command": script(tmp_path / name, KEPT + says)}
        for name, says in (("kvm01", UNKNOWN), ("kvm02", KILLED), ("kvm03", KILLED))
    }
    said["kvm02"] |= {"qmpmerge_keep": 0, "qmpmerge_targets": ["web"]}
    hosts.write(said)
    counts = hosts.play("--extra-vars", '{"qmpmerge_serial": [2, 1]}', code=2)
    assert counts == {"kvm01": (1, 1), "kvm02": (0, 1), "kvm03": (0, 0)}, hosts.shown
    asked = {name: (tmp_path / f"{name}.asked").read_text().splitlines() for name in ("kvm01", "kvm02")}
    assert [line for line in asked["kvm01"] if not line.startswith("disks")] == [
        "snapshot web vda=/vm/web-vda-2026-11-30.qcow2 --json"
    ], "its other VM is left alone, and so is its disk that is no file"
    assert [line.split()[0] for line in asked["kvm02"]] == ["disks", "tidy", "disks"], "nothing to keep"
    for line in ("| kvm01 | web | | snapshot: unknown | |", "| kvm02 | | | tidy: no answer | |", "has ended with -9"):
        assert line in hosts.report, hosts.report
    assert hosts.report.count("UNKNOWN OUTCOME") == 2


def test_the_inventory_has_defaults_and_what_differs_from_them() -> None:
    hosts = json.loads(ansible("inventory", "--list"))["_meta"]["hostvars"]
    keep = {name: its.get("qmpmerge_keep") for name, its in hosts.items()}
    assert len(keep) == 40 and {name for name in keep if keep[name] == 7} == {f"kvm0{n}.example.com" for n in (7, 8, 9)}
